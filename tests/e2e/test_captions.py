"""The preset miniature-captions from its start to its evaluation, a resume, and its samples."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from actors import sample
from learner import evaluate, plan
from learner.miniature.build import NETWORKS
from learner.monitoring.metrics import read_metrics
from learner.run import main
from tests.small_run import OPTIONS, flags

SMALL = {**OPTIONS, "iterations": 2, "evaluation": {"num_images": 40, "cfg_scales": 2}}
PRESET = ["--preset", "miniature-captions"]


def test_it_runs_resumes_and_evaluates(tmp_path: Path) -> None:
    run = tmp_path / "run"
    there = ["--inline", "--run-dir", str(run)]
    assert main([*PRESET, *there, *flags(SMALL)]) == 0
    table = json.loads((run / "evaluation.json").read_text())
    assert set(table) >= {"base", "base, CFG 2", "tuned"}
    for figures in table.values():
        assert 0 <= figures["r_precision"] <= 1
        assert "accuracy" not in figures
    text = (run / "report.html").read_text()
    assert "R-precision" in text
    assert main([*there, "--resume", "--iterations", "3"]) == 0
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["iteration"] for row in rows] == [1, 2, 3]
    assert all(math.isfinite(row["fid/ema"]) for row in rows)
    assert "reward/hps" not in " ".join(rows[0])
    assert len(set(json.loads((run / "evaluation.json").read_text())) - set(table)) == 0


def test_samples_of_captions_and_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    networks = NETWORKS / "captions"
    out, file = tmp_path / "samples", tmp_path / "s.npz"
    arguments = ["--checkpoint", str(networks / "policy.safetensors"), "--out", str(out)]
    arguments += ["--tokenizer", str(NETWORKS / "tokenizer.safetensors")]
    captions = ["--captions", str(networks / "captions.parquet")]
    assert sample.main([*arguments, *captions, "--num-images", "3", "--npz", str(file)]) == 0

    assert np.load(file)["arr_0"].shape[1:] == (8, 8, 3)
    assert plan.main(PRESET) == 0
    assert "No process asks for a GPU" in capsys.readouterr().out


def test_real_images_with_their_captions(tmp_path: Path) -> None:
    """The ceiling of the R-precision, by the command of the learner's page."""
    options = ["--inline", "--out", str(tmp_path / "out"), "--bootstrap", "0"]
    assert evaluate.main(["digits:held-out", *PRESET, *options]) == 0
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text())["rows"].values()
    assert row["figures"]["r_precision"]["value"] == pytest.approx(0.755, abs=0.02)
