"""What is written is JSON that strict readers take: no NaN, in any file; and readers take null."""

from __future__ import annotations

import ast
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cluster import status
from cluster.control.control_actor import FleetStatus, PoolStatus, Progress, WorkerStatus
from cluster.io.strict_json import dumps, number
from cluster.spans import Span
from learner.checkpoints.manifest import Manifest
from learner.checkpoints.store import best_step
from learner.grpo.advantage import group_advantages
from learner.loggers.logger import Loggers
from learner.loggers.tensorboard import TensorBoard
from learner.monitoring.guards import Guards
from learner.monitoring.metrics import Recorder, read_metrics
from learner.monitoring.timeline import Trace
from learner.runs import records
from learner.runs.run_dir import RunDirectory
from learner.training.skips import GuardsConfig
from rewards.combine import Combiner, RewardTerm
from tests.small_run import small_config
from tests.unit.checkpoint_cases import Kept
from tests.unit.helpers import scored_group

ROOT = Path(__file__).parents[4]
ODD = {"iteration": 0, "a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.5}
DIGESTS = {"learner/runs/records.py"}
"""Where JSON is hashed and written nowhere."""

ENCODERS = ("json.dump", "json.dumps", "json.JSONEncoder")


def strict(text: str | bytes) -> Any:
    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_what_is_not_finite_is_null_however_deep() -> None:
    value = {"x": [np.float32("nan"), (math.inf, 1)], "y": {"z": np.float64(2.5)}, "n": np.int64(3)}
    assert strict(dumps(value)) == {"x": [None, [None, 1]], "y": {"z": 2.5}, "n": 3}
    plain = {"a": [1, 2.5, True, None, "ü"], "b": {}}
    assert dumps(plain) == json.dumps(plain)  # what was right stays as it was, to the byte
    assert math.isnan(number(None))
    assert number(2) == 2


def test_no_other_encoder_is_used() -> None:
    found = []
    for package in ("actors", "cluster", "learner", "rewards"):
        for file in (ROOT / package).rglob("*.py"):
            name = str(file.relative_to(ROOT))
            if name in DIGESTS or name == "cluster/io/strict_json.py":
                continue
            nodes = [
                n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Attribute)
            ]
            found += [f"{name}:{n.lineno}" for n in nodes if ast.unparse(n) in ENCODERS]
    assert found == []


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(str(tmp_path / "run"), small_config())


def test_a_runs_files_are_strict_and_can_be_read_again(run: RunDirectory) -> None:
    loggers = Loggers({"TensorBoard": TensorBoard(run.tensorboard)})
    recorder = Recorder(run, 0, rollouts=True, loggers=loggers)
    groups = [scored_group({"clip": [0.1, np.nan]}, errors=[None, "clip: boom"])]
    advantages = group_advantages(groups, {}, Combiner({"clip": RewardTerm()}))
    recorder.record(dict(ODD), groups, advantages, [Span("learner", "learn", 1.0, 1.5)])
    recorder.record_evaluation(1, {"fid": math.nan, "accuracy": 0.5})
    recorder.close()
    loggers.close()
    run.write_evaluation({"base": {"fid": math.inf, "density": 1.0}})
    (row,) = [strict(line) for line in run.metrics.read_text().splitlines()]
    assert row == {"iteration": 0, "a": None, "b": None, "c": None, "d": 1.5}
    assert strict(run.evaluations.read_text()) == {"step": 1, "fid": None, "accuracy": 0.5}
    assert strict(run.evaluation.read_text())["base"] == {"fid": None, "density": 1.0}
    assert strict(run.trace.read_text())
    assert read_metrics(run.metrics) == [row]
    table = run.read_evaluation()["base"]
    assert math.isnan(table["fid"])
    assert records.digests(run, 1) == records.digests(run, 1)
    events = EventAccumulator(str(run.tensorboard))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        "iteration",
        "d",
        "evaluation/accuracy",
        "exam/accuracy",
    }
    Recorder(run, 1, rollouts=True).close()  # resumed
    assert read_metrics(run.metrics) == [row]


def test_rows_of_earlier_versions_stay_as_they_are(run: RunDirectory) -> None:
    line = '{"iteration": 0, "fid/ema": NaN, "fid/batch": 2.0}\n'
    run.metrics.write_text(line)
    before = records.digests(run, 1)
    Recorder(run, 1, rollouts=False).close()
    assert run.metrics.read_text() == line
    assert records.digests(run, 1) == before


def test_guards_see_the_same_live_and_after_a_resume() -> None:
    config = GuardsConfig(patience=1)
    rows = [
        {"iteration": 0, "policy/mismatch_kl": math.inf, "policy/entropy": math.nan,
         "policy/base_entropy": 2.0, "reward_std/clip": math.nan, "groups/flat": 0},
        {"iteration": 1, "policy/mismatch_kl": 9.0},
    ]  # fmt: skip
    live, resumed = Guards(config, 4), Guards(config, 4)
    found = [live(row) for row in rows]
    assert [f.metrics["guards/kl_high"] for f in found] == [0, 1]
    assert [resumed(strict(dumps(row))) for row in rows] == found


def test_the_best_is_a_number() -> None:
    graded = {1: {"fid": math.nan}, 2: {"fid": math.inf}, 3: {"fid": 4.0}, 4: {"fid": -math.inf}}
    assert best_step("fid", graded) == 3
    assert best_step("fid", {1: {"fid": -math.inf}}) is None


def test_a_checkpoint_can_be_read_whatever_its_exam_found(tmp_path: Path) -> None:
    made = Kept(tmp_path / "run", keep_best="fid")
    made.save(1, figures={"fid": 2.0})
    made.save(2, figures={"fid": math.inf, "accuracy": math.nan})
    newest = made.open().newest()
    assert newest is not None
    assert newest.step == 2
    assert math.isnan(newest.manifest.figures["fid"])
    assert strict(made.run.best.read_text())["step"] == 1
    assert Manifest.from_bytes(newest.manifest.to_bytes(), "x").step == 2


def test_status_is_strict_and_invents_nothing() -> None:
    early = FleetStatus(
        pools=(PoolStatus(role="sampler", serving=0, starting=1, draining=0, queued=2, wanted=1),),
        singles=(WorkerStatus(name="learner", state="starting", actor="x"),),
    )
    found = strict(dumps(status.as_dict("A", early, {})))
    for name in ("said_s_ago", "iterations", "iterations_per_h", "images_per_s", "eta_s",
                 "free_bytes"):  # fmt: skip
        assert found[name] is None, name
    assert [role["queue_wait_s"] for role in found["roles"]] == [None, None]
    assert [role["queued"] for role in found["roles"]] == [None, 2]
    shown = io.StringIO()
    Console(file=shown, width=120).print(status.table(found))
    assert "2 in queue  " in shown.getvalue()
    assert "free on its disk" not in shown.getvalue()
    odd = FleetStatus(progress=Progress(metrics=ODD, iterations=3, free_bytes=0))
    found = strict(dumps(status.as_dict("A", odd, {})))
    assert found["metrics"]["a"] is None
    assert found["free_bytes"] == 0


def test_a_timeline_with_odd_numbers(tmp_path: Path) -> None:
    trace = Trace(tmp_path / "trace.json", resume=False)
    trace.idle({"learner": math.nan}, 1)
    trace.close()
    assert strict((tmp_path / "trace.json").read_text())[0]["args"] == {"learner": None}
