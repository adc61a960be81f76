"""From spans to shares, by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster import clock
from cluster.spans import Span, Stopwatch, role_of
from learner.monitoring.timeline import RoleUse, Trace, Usage, bottleneck


def test_shares_by_hand() -> None:
    usage = Usage(start=100.0)
    usage.add([
        Span("sampler-0", "sample", 100, 104), Span("sampler-0", "decode", 104, 105),
        Span("sampler-1", "sample", 100, 106),
        Span("reward-server", "queue", 100, 106), Span("reward-server", "score", 106, 108),
        Span("driver", "wait_groups", 100, 108), Span("learner", "learn", 108, 110),
    ])  # fmt: skip
    found = {use.role: use for use in usage.shares()}
    assert found["sampler"] == RoleUse("sampler", 2, pytest.approx(11 / 20))
    assert found["reward-server"].busy == pytest.approx(0.2)  # waiting in a queue is no work
    assert found["learner"].idle == pytest.approx(0.8)
    assert "driver" not in found
    assert usage.shares()[0].role == "sampler"


def test_loading_and_packing_weights_is_work() -> None:
    usage = Usage(100.0)
    usage.add([Span("sampler", "load", 100, 103), Span("sampler", "sample", 103, 110)])
    usage.add([Span("learner", "pack", 101, 102), Span("learner", "learn", 102, 106)])
    assert {use.role: use.busy for use in usage.shares()} == pytest.approx(
        {"sampler": 1.0, "learner": 5 / 9}
    )


def test_overlapping_spans_of_a_worker_count_once() -> None:
    usage = Usage(start=0.0)
    usage.add([Span("learner", "learn", 0, 6), Span("learner", "publish", 4, 8)])
    usage.add([Span("learner", "learn", 7, 10)])
    assert usage.shares() == [RoleUse("learner", 1, 1.0)]


def test_who_came_later_is_not_blamed_for_the_time_before() -> None:
    usage = Usage(start=0.0)
    usage.add([Span("sampler-0", "sample", 0, 10), Span("sampler-0", "sample", -5, -1)])
    usage.add([Span("sampler-0", "sample", 10, 20), Span("sampler-1", "sample", 15, 20)])
    assert usage.shares() == [RoleUse("sampler", 2, 1.0)]


@pytest.mark.parametrize(
    ("shares", "staleness", "text"),
    [
        ([("sampler", 2, 0.97), ("learner", 1, 0.4)], 1, "samplers were busy 97%: --num-samplers"),
        ([("learner", 1, 0.9)], 0, "the learner was busy 90%: --num-learners"),
        ([("reward-server", 1, 0.85)], 0, "busy 85%: --num-reward-servers"),
        ([("reward-aesthetic", 1, 0.85)], 0, "num_servers of reward_pools.aesthetic"),
        ([("sampler", 2, 0.55), ("learner", 1, 0.45)], 0, "--max-staleness 1"),
        ([("sampler", 2, 0.7), ("learner", 1, 0.7)], 1, "--max-staleness 2"),
    ],
)
def test_the_bottleneck_and_its_flag(shares: list, staleness: int, text: str) -> None:
    assert text in bottleneck([RoleUse(*share) for share in shares], staleness)


def test_one_process_is_its_own_bottleneck() -> None:
    assert "leave --inline out" in bottleneck([RoleUse("sampler", 1, 0.9)], 0, inline=True)
    assert bottleneck([], 0) == ""


def test_flags_exist(capsys: pytest.CaptureFixture[str]) -> None:
    from learner.run import main

    with pytest.raises(SystemExit):
        main(["--help-all"])
    text = capsys.readouterr().out
    flags = ["--num-samplers", "--num-reward-servers", "--num-learners", "--max-staleness"]
    output = ["no-rollouts", "--output.checkpoint-every"]
    for flag in (*flags, *output, "--rewards.loo-fid.num-threads"):
        assert flag in text, flag


@pytest.mark.parametrize(
    ("name", "role"),
    [("sampler-12", "sampler"), ("reward-server", "reward-server"), ("learner-0", "learner")],
)
def test_roles_of_workers(name: str, role: str) -> None:
    assert role_of(name) == role


def test_a_stopwatch_times_failures_too() -> None:
    clock = Stopwatch("me")
    with pytest.raises(ValueError, match="no"), clock("work"):
        raise ValueError("no")
    (span,) = clock.take()
    assert (span.worker, span.phase) == ("me", "work")
    assert span.seconds >= 0
    assert clock.take() == ()


def test_the_trace_has_queues_apart_and_idle_shares(tmp_path: Path) -> None:
    trace = Trace(tmp_path / "trace.json", resume=False)
    trace.add([Span("server", "queue", 0.0, 2.0), Span("server", "score", 1.0, 3.0)])
    trace.idle({"server": 0.25}, 1)
    trace.close()
    events = json.loads((tmp_path / "trace.json").read_text())
    rows = {event["args"]["name"]: event["tid"] for event in events if event["ph"] == "M"}
    assert rows.keys() == {"server", "server queue"}
    (counter,) = (event for event in events if event["ph"] == "C")
    assert counter["args"] == {"server": 0.25}
    again = Trace(tmp_path / "trace.json", resume=True)
    again.close()
    assert json.loads((tmp_path / "trace.json").read_text()) == events


def test_a_run_that_goes_on_where_the_clock_is_behind_keeps_its_order(tmp_path: Path) -> None:
    path, ahead = tmp_path / "trace.json", clock.epoch() + 300
    first = Trace(path, resume=False)
    first.add([Span("learner", "learn", ahead, ahead + 2)])
    first.close()
    resumed, now = Trace(path, resume=True), clock.epoch()
    resumed.add([Span("learner", "learn", now, now + 1)])
    resumed.idle({"learner": 0.0}, 2)
    resumed.close()
    before, after, idle = [event for event in json.loads(path.read_text()) if event["ph"] != "M"]
    assert after["ts"] >= before["ts"] + before["dur"]
    assert after["ts"] - before["ts"] < 10e6
    assert idle["ts"] >= after["ts"]
    assert after["dur"] == 1e6


def test_a_damaged_time_does_not_keep_a_run_from_going_on(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text('[\n{"name": "learn", "ph": "X", "ts": "soon", "dur": null, "tid": 1}\n')
    Trace(path, resume=True).close()
