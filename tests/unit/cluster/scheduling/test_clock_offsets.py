"""Clocks of other hosts, found out from when answers came."""

from __future__ import annotations

import numpy as np
import pytest

from cluster import clock
from cluster.messages import GroupScores
from cluster.scheduling.clock_offsets import DRIFT, Bounds, ClockOffsets, OnThisClock
from cluster.spans import Span
from learner.monitoring.timeline import Usage


def scores(*spans: Span) -> GroupScores:
    return GroupScores(
        key=("train", 0, 0), scores={"clip": np.zeros(1)}, features={}, errors=(None,), spans=spans
    )


def test_answers_of_this_clock_are_left_alone() -> None:
    offsets, answer = ClockOffsets(), scores(Span("reward-server", "score", 100.1, 101.0))
    assert offsets.aligned(answer, 100.0, 101.2) is answer


@pytest.mark.parametrize("ahead", [300.0, -300.0, 86400.0, 0.5, -0.5])
def test_spans_of_a_clock_that_differs_lie_within_their_call(ahead: float) -> None:
    offsets = ClockOffsets()
    for sent, wait, answer_after in [(100.0, 0.2, 0.02), (103.0, 0.01, 0.3), (106.0, 0.05, 0.05)]:
        start, end = sent + wait, sent + wait + 1.0
        moved = offsets.aligned(
            [scores(Span("s-0", "queue", start + ahead, start + 0.5 + ahead),
                    Span("s-0", "score", start + ahead, end + ahead))],
            sent, end + answer_after,
        )  # fmt: skip
        for span in moved[0].spans:
            assert sent <= span.start <= span.end <= end + answer_after
            assert span.seconds in (pytest.approx(0.5), pytest.approx(1.0))
    # the calls together bound it by the shortest wait on either side
    assert moved[0].spans[1].start == pytest.approx(106.05, abs=0.01)


def test_work_before_the_call_does_not_bound_the_clock() -> None:
    load, sample = Span("s-0", "load", 390.0, 395.0), Span("s-0", "sample", 401.0, 402.0)
    moved = ClockOffsets().aligned([scores(load, sample)], 100.99, 102.01)
    assert moved[0].spans[1].start == pytest.approx(101.0, abs=0.01)
    assert moved[0].spans[0].seconds == pytest.approx(5.0)


def test_answers_by_name_are_moved_together() -> None:
    """As the moments server's, one a feature space."""
    spaces = {"features": scores(Span("m", "moments", 401.0, 402.0)),
              "clip": scores(Span("m", "moments", 402.0, 403.0))}  # fmt: skip
    moved = ClockOffsets().aligned(spaces, 100.99, 103.01)
    starts = {space: answer.spans[0].start for space, answer in moved.items()}
    assert starts["clip"] - starts["features"] == pytest.approx(1.0)
    assert starts["features"] == pytest.approx(101.0, abs=0.52)  # by the last one's bounds


def test_a_replacement_on_another_host_has_a_clock_of_its_own() -> None:
    offsets = ClockOffsets()
    offsets.aligned(Span("s-0", "score", 400.0, 401.0), 99.99, 101.01)
    moved = offsets.aligned(Span("s-0", "score", 50.0, 51.0), 199.99, 201.01)
    assert moved.start == pytest.approx(200.0, abs=0.02)
    same = Span("s-0", "score", 300.0, 301.0)
    assert offsets.aligned(same, 299.99, 301.01) is same


def test_an_answer_that_is_repeated_tells_nothing() -> None:
    offsets = ClockOffsets()
    answer = offsets.aligned(Span("m", "moments", 400.0, 410.0), 99.99, 110.01)
    offsets.aligned(Span("m", "moments", 400.0, 410.0), 120.0, 120.1)
    again = offsets.aligned(Span("m", "moments", 430.0, 431.0), 129.99, 131.01)
    assert again.start - answer.start == pytest.approx(30.0, abs=0.02)


def test_clocks_that_drift_apart_are_followed() -> None:
    offsets, ahead = ClockOffsets(), 60.0
    for sent in np.arange(0.0, 36000.0, 10.0):  # 0.36 s an hour apart, as bad as quartz gets
        ahead += 10 * DRIFT / 2
        moved = offsets.aligned(
            Span("s-0", "score", sent + 0.005 + ahead, sent + 1.005 + ahead), sent, sent + 1.01
        )
        assert moved.start == pytest.approx(sent + 0.005, abs=0.006)


def test_bounds_that_exclude_each_other_begin_anew() -> None:
    assert Bounds(4.0, 5.0, 0.0).narrowed(4.5, 9.0, 0.0) == Bounds(4.5, 5.0, 0.0)
    assert Bounds(4.0, 5.0, 0.0).narrowed(-1.0, 1.0, 0.0).offset == 0.0


def test_a_role_on_this_clock() -> None:
    class Far:
        def step(self) -> GroupScores:
            now = clock.epoch() + 500
            return scores(
                Span("learner-0", "learn", now, now), Span("learner-1", "learn", now, now)
            )

        def restore(self) -> int:
            return 7

    role, before = OnThisClock(Far(), ClockOffsets()), clock.epoch()
    assert all(before <= span.start <= clock.epoch() for span in role.step().spans)
    assert role.restore() == 7


def test_the_idle_shares_of_hosts_whose_clocks_differ() -> None:
    """Unmoved, a sampler that is behind would be taken for one that did nothing."""
    offsets, usage = ClockOffsets(), Usage(100.0)
    behind = Span("sampler-0", "sample", 100.01 - 300, 105.01 - 300)
    usage.add([offsets.aligned(behind, 100.0, 105.02), Span("learner", "learn", 105.02, 110.02)])
    shares = {use.role: use.busy for use in usage.shares()}
    assert shares == {
        "sampler": pytest.approx(0.5, abs=0.01),
        "learner": pytest.approx(0.5, abs=0.01),
    }
