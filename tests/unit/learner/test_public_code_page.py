"""The page for users of the public code: every variable is on it, every option exists, and what it
says of the preset is so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from learner.config import RunConfig, load_preset, merge, to_dict, validate
from learner.run import REFUSED, main

PAGE = Path("learner/coming-from-the-public-code.md")
PRESET = "paper-llamagen-l-256"
DEFAULTS: dict[str, Any] = {
    "PER_PROC_BATCH_SIZE": 12,
    "NUM_GENERATIONS": 12,
    "INNER_EPOCHS": 2,
    "MAX_ITERATIONS": 600,
    "W_CLIP": 1.0,
    "W_HPS": 1.0,
    "W_FID": 1.0,
    "FID_BETA": 0.5,
    "FID_STATS_NPZ": "imagenet_train_incv3_299_original.npz",
    "FID_INIT_GEN_NPZ": "pretrained_gen_stats.npz",
    "ENT_COEF_BASE": 2.2e-3,
    "ENT_MIN": 7e-5,
    "ENT_MAX": 4e-3,
    "ENT_TARGET_FRAC": 0.78,
    "ENT_DEADBAND": 0.015,
    "ENT_K": 3.0,
    "WARMUP_FRAC": 0.05,
    "DECAY_START_FRAC": 0.85,
    "GPT_CKPT": "pretrained_models/c2i_L_256.pt",
    "VQ_CKPT": "pretrained_models/vq_ds16_c2i.pt",
    "OUT_DIR": "grpo_runs/run1",
    "SAMPLES_DIR": "$OUT_DIR/samples",
    "SAVE_EVERY": 200,
    "SAVE_SAMPLES_EVERY": 100,
    "NUM_SAMPLE_IMAGES": 8,
    "NPROC_PER_NODE": 1,
    "NNODES": 1,
    "OMP_NUM_THREADS": 1,
    "HF_HOME": ".cache/huggingface",
}
"""What train.sh of bugrabaran/ar-policy-tuning at fac5b31 takes from the environment."""


def table(first: str) -> list[list[str]]:
    """Rows of the table whose first heading this is, each with five cells."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    start = next(at for at, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def number(cell: str) -> Any:
    """A cell's value."""
    plain = cell.strip("`")
    try:
        return float(plain)
    except ValueError:
        return yaml.safe_load(plain)


ROWS = [*table("variable"), *table("argument")]


def option(values: Any, path: str) -> Any:
    for part in path.split("."):
        values = values[part]
    return values


def test_every_variable_is_there_with_its_default() -> None:
    found = {row[0].strip("`"): number(row[1]) for row in table("variable")}
    assert found == DEFAULTS
    text = PAGE.read_text(encoding="utf-8")
    assert all(name in text for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT"))


@pytest.mark.parametrize("row", [row for row in ROWS if row[2]], ids=lambda row: row[0])
def test_every_option_exists_and_has_the_value_in_the_preset(row: list[str]) -> None:
    _, default, name, there, same = row
    path = name.strip("`")
    if path.startswith("--"):
        assert path == "--run-dir"
        return
    values = to_dict(load_preset(PRESET))
    found = option(values, path)
    assert found == pytest.approx(number(there)) if there else False
    if same.startswith("yes"):
        assert found == pytest.approx(number(default))


@pytest.mark.parametrize("row", [row for row in ROWS if row[2]], ids=lambda row: row[0])
def test_every_option_takes_the_variables_default(row: list[str]) -> None:
    _, default, name, _, same = row
    path = name.strip("`")
    if path.startswith("--") or path == "ray.address":
        return
    value: Any = number(default)
    value = int(value) if isinstance(value, float) and value == int(value) else value
    for part in reversed(path.split(".")):
        value = {part: value}
    config = validate(merge(to_dict(load_preset(PRESET)), value), "the variables")
    assert isinstance(config, RunConfig)
    if same.startswith("yes"):
        assert config == load_preset(PRESET)


def test_paths_of_options_in_the_text_exist() -> None:
    """Those in backticks that look like options, beside the tables."""
    values = to_dict(RunConfig())
    text = PAGE.read_text(encoding="utf-8")
    named = [word for word in text.split("`")[1::2] if word.count(".") in (1, 2)]
    sections = {key for key, value in values.items() if isinstance(value, dict)}
    checked = [name for name in named if name.split(".")[0] in sections and " " not in name]
    assert len(checked) > 30
    for name in checked:
        option(values, name)


def test_the_command_is_one_that_the_program_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = PAGE.read_text(encoding="utf-8")
    command = text.split("```")[1].replace("\\\n", " ").split()
    assert command[:3] == ["python", "-m", "learner.run"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TESSERA_WEIGHTS", str(tmp_path))
    assert main([*command[3:], "--dry-run"]) == REFUSED
    told = capsys.readouterr().err  # all that is wrong is that the files are not there
    for file in ("c2i_L_256.pt", "vq_ds16_c2i.pt", "_original.npz", "pretrained_gen_stats.npz"):
        assert file in told
    assert told.count("no such file") + told.count("found none at") == 4
    assert "evaluation.images: expected imagenet256" in told
    assert "the run cannot start, 5 problems" in told
