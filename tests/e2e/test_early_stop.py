"""Training that ends before its last iteration, since evaluations do not improve."""

from __future__ import annotations

import json
from pathlib import Path

from cluster.control.discovery import left_behind
from learner.monitoring.metrics import read_metrics
from learner.run import main
from tests.small_run import OPTIONS, flags

STILL = {**OPTIONS, "iterations": 8, "learner": {"lr": 1e-12, "microbatch": 8}}
"""A policy that hardly learns: the first evaluation stays the best one."""
EARLY = [
    *("--evaluation.every", "1", "--evaluation.num-images", "20", "--evaluation.cfg-scales", "2"),
    *("--evaluation.patience", "2", "--output.keep-best", "fid", "--output.keep-checkpoints", "1"),
]


def done(run: Path) -> list[int]:
    return [row["iteration"] for row in read_metrics(run / "metrics.jsonl")]


def test_it_ends_as_at_the_last_iteration_and_can_go_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    there = ["--inline", "--run-dir", str(run)]
    assert main([*there, *flags(STILL), *EARLY]) == 0
    assert done(run) == [1, 2, 3]
    reason = "training ends after 3 of 8 iterations: fid has not improved in 2 evaluations (best: "
    log = (run / "run.log").read_text()
    assert log.count(reason) == 1
    steps = sorted(path.name for path in (run / "checkpoints").glob("step_*"))
    assert steps == ["step_000001", "step_000003"]  # the best, and the last
    assert json.loads((run / "best.json").read_text())["step"] == 1
    assert "tuned" in json.loads((run / "evaluation.json").read_text())
    assert (run / "report.html").is_file()
    assert left_behind(run)["stage"] == "finished"

    assert main([*there, "--resume"]) == 0  # says so again, and does again what follows
    assert done(run) == [1, 2, 3]
    assert (run / "run.log").read_text().count(reason) == 2

    assert main([*there, "--resume", "--iterations", "5", "--evaluation.patience", "0"]) == 0
    assert done(run) == [1, 2, 3, 4, 5]
