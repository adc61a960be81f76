"""Further systems of the miniature, as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from actors.sample import main as sample
from learner.evaluate import main as evaluate
from learner.plan import main as plan
from learner.run import main
from learner.runs.records import TUNED
from tests.small_run import flags, recorded

NETWORKS = "package://learner.miniature/networks/vqgan"
SMALL = [*flags(), "--evaluation.num-images", "10", "--inline"]


def test_a_vqgan_is_tuned_evaluated_resumed_and_sampled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without guidance, which taming's policies do not have; filters sharpen them instead."""
    run = tmp_path / "run"
    options = ["--preset", "miniature-vqgan", *SMALL, "--run-dir", str(run)]
    assert main([*options, "--iterations", "1"]) == 0
    table = json.loads((run / "evaluation.json").read_text())
    assert list(table) == ["base", TUNED]
    assert (run / "report.html").is_file()
    assert main(["--resume", "--run-dir", str(run), "--inline", "--iterations", "2"]) == 0
    assert len(recorded(run)) == 2
    out = tmp_path / "evaluation"
    rows = ["--samplings", "top_p=0.92", "--bootstrap", "2"]
    assert evaluate([str(run), "--out", str(out), "--inline", *rows, "--num-images", "20"]) == 0
    drawn = ["--classes", "3", "--num-images", "2", "--device", "cpu", "--out"]
    assert sample(["--run", str(run), *drawn, str(tmp_path / "tuned")]) == 0
    capsys.readouterr()
    shipped = ["--checkpoint", f"{NETWORKS}/policy.safetensors", *drawn]
    assert sample([*shipped, str(tmp_path / "a")]) == 2
    assert "name it with --tokenizer" in capsys.readouterr().err
    its = ["--tokenizer", f"{NETWORKS}/tokenizer.safetensors"]
    assert sample([*shipped, str(tmp_path / "b"), *its]) == 0
    assert sample([*shipped, str(tmp_path / "c"), *its, "--cfg-scale", "2"]) == 2
    assert "trained without a null class" in capsys.readouterr().err


@pytest.mark.parametrize("command", [main, plan])
def test_a_vqgan_without_starting(
    command: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert callable(command)
    options = ["--dry-run"] if command is main else []
    assert command(["--preset", "miniature-vqgan", *options]) == 0
    capsys.readouterr()
    guided = ["--preset", "miniature-vqgan", "--dry-run", "--evaluation.cfg-scales", "1.5"]
    assert main(guided) == 2
    assert "evaluation.cfg_scales: expected none" in "".join(capsys.readouterr())
