"""Service times by arithmetic, out of a recorded trace, and out of a file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ConfigError, DataError
from cluster.spans import Span
from learner.capacity import run_spans
from learner.capacity.cards import CARDS
from learner.capacity.run_spans import Device, alone
from learner.capacity.service_times import (
    ServiceTimes,
    from_arithmetic,
    from_measured,
    score_bytes,
)
from learner.capacity.workload import phases_of
from learner.config import load_preset, validate
from learner.monitoring.timeline import Trace
from learner.runs.run_dir import RunDirectory
from tests.unit.learner.capacity.test_budget import MODELS

TIMES: dict[str, Any] = {
    "sample": 0.03, "images": 0.01, "score": {"reward-server": 0.007}, "commit": 0.012,
    "learn": 0.1, "publish": 0.002, "load": 0.001, "record": 0.008, "driver": 0.002,
    "image_bytes": 3072, "rollout_bytes": 3072, "snapshot_bytes": 1.8e6,
}  # fmt: skip


def test_arithmetic_gives_a_groups_part_of_the_planners_phases() -> None:
    config, card = load_preset("paper-fixed"), CARDS["h200"]
    times = from_arithmetic(config, MODELS, card)
    seconds = {phase.name: phase.seconds for phase in phases_of(config, MODELS, card)[0]}
    groups = config.groups_per_iteration
    assert times.sample * groups == pytest.approx(seconds["sample"])
    assert times.images * groups == pytest.approx(seconds["images"])
    assert times.score["reward-server"] * groups == pytest.approx(
        seconds["score"] + seconds["features"]
    )
    assert times.learn == seconds["learn"]
    assert times.image_bytes == 12 * 256 * 256 * 3
    assert times.rollout_bytes == 12 * 256 * (4 + 4 + 4)
    assert times.snapshot_bytes == pytest.approx(2 * 343e6, rel=0.01)
    assert score_bytes(config, MODELS) == 12 * 2048 * 4


def test_arithmetic_knows_no_cpus() -> None:
    with pytest.raises(ConfigError, match=r"would compute on CPUs .* --measured"):
        from_arithmetic(load_preset("miniature"), MODELS, CARDS["h200"])


def test_sharing_is_taken_out_of_spans() -> None:
    """Two threads on one core for a second each, then one of them alone."""
    core = Device(capacity=1, demands={"sampler": 1, "learner": 2})
    spans = [Span("sampler-0", "sample", 0.0, 2.0), Span("sampler-1", "sample", 0.0, 1.0)]
    assert alone(spans, [core]) == pytest.approx([1.5, 0.5])
    assert alone(spans, []) == [2.0, 1.0]
    two = Device(capacity=2, demands={"sampler": 1, "learner": 2})
    beside = [Span("learner", "learn", 0.0, 3.0), Span("sampler-0", "sample", 0.0, 3.0)]
    assert alone(beside, [two]) == pytest.approx([2.0, 2.0])
    gpu = Device(capacity=1, demands={"sampler-1": 1, "learner": 1})  # not sampler-0
    assert alone(beside, [gpu]) == pytest.approx([3.0, 3.0])
    assert alone([], [two]) == []


def write_run(folder: Path, iterations: int, slow: float = 1.0) -> Path:
    """A run of the miniature with made-up spans: two samplers with five groups each."""
    config = validate({"num_samplers": 2, "seed": 3}, "test")
    run = RunDirectory.create(str(folder / "run"), config)
    trace, now = Trace(run.trace, resume=False), 100.0
    for iteration in range(iterations):
        factor = slow if iteration == 0 else 1.0
        spans = []
        for sampler in range(2):
            at = now + 20 * sampler  # one after the other, so that none shares
            spans.append(Span(f"sampler-{sampler}", "load", at, at + 0.25))
            at += 0.25
            for _ in range(5):
                spans.append(Span(f"sampler-{sampler}", "sample", at, at + factor))
                spans.append(Span(f"sampler-{sampler}", "decode", at, at + factor / 2))
                at += factor
        at = now + 50
        for worker, phase, took in (
            ("reward-server", "queue", 9.0),
            ("reward-server", "score", 2.0),
            ("moments-server", "moments", 0.5),
            ("moments-server", "decompose", 7.0),
            ("learner", "pack", 0.125),
            ("learner", "learn", 4.0),
            ("driver", "wait_learner", 4.0),
            ("driver", "record", 0.0625),
        ):
            spans.append(Span(worker, phase, at, at + took))
            at += took
        trace.add(spans)
        trace.idle({}, iteration + 1)
        now += 100
    trace.close()
    hardware = {"cores": 4, "hosts": 1, "gpus": []}
    event = {"event": "start", "time": "2026-11-29T07:00:00+00:00", "hardware": hardware}
    (run.path / "starts.jsonl").write_text(json.dumps(event) + "\n")
    return run.path


def test_a_recorded_run_gives_its_times(tmp_path: Path) -> None:
    times = from_measured(write_run(tmp_path, 6, slow=10.0))  # a slow start does not count
    assert (times.sample, times.images) == pytest.approx((1.0, 0.5))
    assert times.score == pytest.approx({"reward-server": 0.2})
    assert (times.commit, times.learn, times.publish) == pytest.approx((0.5, 4.0, 0.125))
    assert (times.load, times.record) == pytest.approx((0.25, 0.0625))
    assert times.varies("sample") == pytest.approx(0, abs=1e-3)
    assert times.rollout_bytes == 16 * 16 * 12


def test_a_run_that_was_killed_is_read(tmp_path: Path) -> None:
    path = write_run(tmp_path, 6)
    trace = path / "trace.json"
    trace.write_bytes(trace.read_bytes()[:-30])
    assert from_measured(path).sample == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (run / "trace.json").unlink(), "trace.json cannot be read"),
        (lambda run: (run / "starts.jsonl").unlink(), "on which machine it ran"),
        (lambda run: (run / "trace.json").write_text("[\nx\ny\n]"), "line 2: expected an event"),
    ],
)
def test_runs_that_say_too_little_are_refused(spoil: Any, message: str, tmp_path: Path) -> None:
    run = write_run(tmp_path, 6)
    spoil(run)
    with pytest.raises(DataError, match=message):
        from_measured(run)


def test_too_short_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected at least 3 iterations after a warm-up"):
        from_measured(write_run(tmp_path, 2))


def test_a_directory_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        from_measured(tmp_path / "nothing")


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_file_gives_its_times(wrapped: bool, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    file.write_text(json.dumps({"service_times": TIMES, "date": "x"} if wrapped else TIMES))
    assert from_measured(file) == ServiceTimes(**TIMES)
    file.write_text(json.dumps(dataclasses.asdict(ServiceTimes(**TIMES))))
    assert from_measured(file) == ServiceTimes(**TIMES)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "expected a JSON object of service times"),
        ("[1]", "expected a JSON object of service times"),
        (json.dumps(TIMES | {"sampel": 1}), "unknown field 'sampel': did you mean 'sample'"),
        (json.dumps({"sample": 1}), "lacks images, score, commit"),
        (json.dumps(TIMES | {"learn": -1}), "learn must be finite and >= 0, found -1"),
        (json.dumps(TIMES | {"learn": "1"}), "learn must be a number, found '1'"),
        (json.dumps(TIMES | {"learn": True}), "learn must be a number, found True"),
        (json.dumps(TIMES | {"score": 1}), "score must be an object of numbers, found 1"),
        (json.dumps(TIMES | {"score": {"a": None}}), "score.a must be a number, found None"),
        (json.dumps(TIMES).replace("0.1", "1e999"), "learn must be finite"),
    ],
)
def test_files_that_say_something_else_are_refused(
    content: str, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "bench.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=message):
        from_measured(file)


def test_iterations_without_a_phase_count_as_none_of_it(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    trace = Trace(path, resume=False)
    for iteration in range(5):
        trace.add([Span("learner", "learn", 10.0 * iteration, 10.0 * iteration + 2)])
        if iteration == 3:
            trace.add([Span("learner", "save", 10.0 * iteration + 3, 10.0 * iteration + 4)])
        trace.idle({}, iteration + 1)
    trace.close()
    found = run_spans.measure(path, [])
    assert found["learner", "learn"].seconds == pytest.approx(2.0)
    assert found["learner", "save"].seconds == 0
