"""`python -m learner.rollouts`: which rollouts, in which order, and what is shown and written."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from cluster.errors import ConfigError
from cluster.messages import Condition
from learner.grpo.advantage import group_advantages
from learner.rollouts import main, sheets
from learner.rollouts.images import decode_images, read_rollouts
from learner.rollouts.parquet import rollout_table, write_rollouts
from learner.rollouts.selection import Numbers
from learner.rollouts.shown import grid_lines
from learner.runs import records
from learner.runs.run_dir import RunDirectory
from rewards.combine import Combiner, RewardTerm
from tests.small_run import small_config
from tests.unit.helpers import scored_group

CONDITIONS = [Condition(text="a Zebra", class_index=3), Condition(text="two cats")]
CLIP = {1: [[0.1, 0.9], [0.3, 0.2]], 2: [[0.5, np.nan], [0.6, 0.4]]}
"""Iteration -> scores of two groups of two rollouts; one image could not be scored."""


def a_run(folder: Path) -> RunDirectory:
    run = RunDirectory.create(str(folder / "run"), small_config())
    for iteration, scores in CLIP.items():
        groups = []
        for number, values in enumerate(scores):
            errors = ["clip: boom" if np.isnan(value) else None for value in values]
            group = scored_group({"clip": values}, group=number, errors=errors, tokens=16)
            request = replace(group.rollouts.request, condition=CONDITIONS[number])
            logprobs = -np.arange(32, dtype=np.float32).reshape(2, 16) / iteration
            rollouts = replace(group.rollouts, request=request, logprobs=logprobs)
            groups.append(replace(group, rollouts=rollouts))
        found = group_advantages(groups, {}, Combiner({"clip": RewardTerm()}))
        write_rollouts(records.rollout_file(run, iteration),
                       rollout_table(iteration, groups, found, iteration))  # fmt: skip
    return run


def shown(run: RunDirectory, capsys: pytest.CaptureFixture[str], *options: str) -> list[str]:
    """Names of the rollouts in the table, in its order."""
    assert main([str(run.path), *options]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    return [line[0] for line in lines if line and line[0].count(".") == 2]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "1.0.0 1.0.1 1.1.0 1.1.1 2.0.0 2.0.1 2.1.0 2.1.1"),
        (["--sort", "clip"], "1.0.1 2.1.0 2.0.0 2.1.1 1.1.0 1.1.1 1.0.0 2.0.1"),
        (["--sort", "clip", "--ascending", "--limit", "2"], "1.0.0 1.1.1"),
        (["--sort", "logprob"], "2.0.0 2.1.0 1.0.0 1.1.0 2.0.1 2.1.1 1.0.1 1.1.1"),
        (["--sort", "advantage", "--limit", "1"], "1.0.1"),
        (["--iterations", "2-", "--groups", "1"], "2.1.0 2.1.1"),
        (["--classes", "3"], "1.0.0 1.0.1 2.0.0 2.0.1"),
        (["--text", "zebra", "--errors", "none"], "1.0.0 1.0.1 2.0.0"),
        (["--errors", "only"], "2.0.1"),
        (["--at-least", "clip=0.3", "--at-most", "clip=0.5"], "1.1.0 2.0.0 2.1.1"),
        (["--at-most", "clip=1", "logprob=-10"], "1.0.1 1.1.1 2.1.1"),
    ],
)
def test_rollouts_are_chosen_and_sorted(
    options: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shown(a_run(tmp_path), capsys, *options) == expected.split()


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--sort", "clp"], 2, "did you mean 'clip'? there are clip, advantage, logprob, entropy"),
        (["--at-least", "hps=0"], 2, "no 'hps'"),
        (["--at-least", "clip>0"], 2, "as in clip=0.3, found 'clip>0'"),
        (["--at-most", "clip=x"], 2, "found 'clip=x'"),
        (["--iterations", "x"], 2, "written as 5, 10-20"),
        (["--iterations", "9-3"], 2, "end before they begin"),
        (["--iterations", "7"], 1, "rollouts of iterations 1 to 2, none of 7"),
        (["--at-least", "clip=5"], 1, "none of 8 rollouts matches"),
        (["--ascending"], 2, "--sort"),
        (["--png"], 2, "--png needs --out"),
        (["--limit", "-1"], 2, "must be >= 0"),
        (["--show", "1.0"], 2, "as in 50.3.7, found '1.0'"),
        (["--show", "1.2.0"], 2, "iteration 1 has groups 0 to 1 of rollouts 0 to 1"),
    ],
)
def test_what_is_not_there_is_refused(
    options: list[str], status: int, message: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert main([str(a_run(tmp_path).path), *options]) == status
    assert message in capsys.readouterr().err


def test_a_run_is_needed_and_its_rollouts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    run = RunDirectory.create("runs/mine", small_config())
    assert main(["mine"]) == 1
    assert "unless --output.rollouts is off" in capsys.readouterr().err
    assert main(["mien"]) == 2
    assert "did you mean 'mine'?" in capsys.readouterr().err
    assert run.path == RunDirectory.existing("mine").path


def test_one_in_full(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = a_run(tmp_path)
    row = read_rollouts(run).to_pylist()[5]
    assert main([str(run.path), "--show", "2.0.1"]) == 0
    text = capsys.readouterr().out
    for part in ("3 a Zebra", "error: clip: boom", "weights of version 0", "seed 7"):
        assert part in text
    for name in ("tokens", "logprobs", "entropies"):
        grid = np.array(row[name]).reshape(4, 4)
        assert "\n".join(grid_lines("", grid)[1:]) in text
    assert "1 of 2" in shown_line(run, "2.1.0", "clip", capsys)


def shown_line(
    run: RunDirectory, rollout: str, figure: str, capsys: pytest.CaptureFixture[str]
) -> str:
    assert main([str(run.path), "--show", rollout]) == 0
    lines = capsys.readouterr().out.splitlines()
    return next(line for line in lines if line.split()[:1] == [figure])


def test_what_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sheets, "SHEET", 3)
    run, out = a_run(tmp_path), tmp_path / "out"
    options = ["--sort", "clip", "--limit", "5", "--out", str(out), "--png", "--device", "cpu"]
    names = shown(run, capsys, *options)
    rows = json.loads((out / "rollouts.json").read_text())["rollouts"]
    assert [f"{r['iteration']}.{r['group']}.{r['rollout']}" for r in rows] == names
    with (out / "rollouts.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [float(r["reward_clip"]) for r in table] == [r["reward_clip"] for r in rows]
    assert "tokens" not in table[0]
    assert sorted(file.name for file in out.glob("sheet*")) == ["sheet_001.png", "sheet_002.png"]
    whole = {(r["iteration"], r["group"], r["rollout"]): r["tokens"]
             for r in read_rollouts(run).to_pylist()}  # fmt: skip
    tokens = [whole[r["iteration"], r["group"], r["rollout"]] for r in rows]
    images = decode_images(run.read_config(), np.array(tokens, np.int32), "cpu")
    for name, image in zip(names, images, strict=True):
        assert np.array_equal(np.asarray(Image.open(out / "images" / f"{name}.png")), image)
    before = sorted(out.rglob("*"))
    assert main([str(run.path), *options]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert sorted(out.rglob("*")) == before


@pytest.mark.parametrize("size", [8, 300])
def test_images_of_any_size_fit_on_a_sheet(size: int, tmp_path: Path) -> None:
    rows = read_rollouts(a_run(tmp_path), columns=None)
    rows = rows.append_column("logprob", pa.nulls(8, pa.float64()))
    rows = rows.append_column("entropy", pa.nulls(8, pa.float64()))
    images = np.full((8, size, size, 3), 200, np.uint8)
    assert sheets.write_sheets(tmp_path, rows, images) == 1
    sheet = np.asarray(Image.open(tmp_path / "sheet_001.png"))
    assert sheet.shape[1] < 8 * (sheets.LARGEST + 2 * sheets.GAP) + sheets.GAP
    assert (sheet == 200).all(-1).sum() >= 8 * min(size, sheets.LARGEST) ** 2


def test_ranges_of_iterations() -> None:
    numbers = Numbers.parse("1-3, 7,20-")
    assert [n for n in range(25) if n in numbers] == [1, 2, 3, 7, 20, 21, 22, 23, 24]
    assert 5 in Numbers.parse("-5")
    for text in ("", "-", "a", "1,,2", "3--4"):
        with pytest.raises(ConfigError, match="iterations"):
            Numbers.parse(text)
