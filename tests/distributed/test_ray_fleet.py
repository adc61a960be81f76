"""The Ray fleet gives what the inline fleet gives, for any number of workers and any lost one."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest

from cluster.errors import FleetError, StopRequestedError, TesseraError
from cluster.fleet import InlineFleet
from cluster.ray_backend.fleet import RayFleet
from cluster.ray_session.session import RaySession
from learner.fleet_plan import fleet_plan
from tests.distributed.stubs import echo_plan, requests, slow_plan
from tests.small_run import fingerprint, run_training, small_config

JOINT = {
    "loo_fid": {"joint": True, "joint_dim": 4, "seed_images": 200},
    "further": {"pixels": {"features": {"network": "pixels"}, "seed_images": 200}},
}
"""The joint space, whose history has full rank only with enough seed images: moments are prepared
off the critical path. A further space beside it."""
GROUP = {"transport": "collective"}
SLOW = pytest.mark.slow  # the same with one more, or with none to choose from


@pytest.mark.parametrize(
    ("samplers", "servers", "options"),
    [
        (2, 2, {"rewards": JOINT, "max_staleness": 1}),
        pytest.param(1, 1, {}, marks=SLOW),
        pytest.param(3, 2, {}, marks=SLOW),
        pytest.param(2, 1, {"weights": GROUP, "max_staleness": 1}, marks=SLOW),
    ],
    ids=["2-2-joint-ahead", "1-1", "3-2", "2-1-broadcast-ahead"],
)
def test_equals_inline_bit_for_bit(
    ray_session: RaySession, samplers: int, servers: int, options: dict[str, Any]
) -> None:
    config = small_config(num_samplers=samplers, num_reward_servers=servers, **options)
    with InlineFleet(fleet_plan(config)) as fleet:
        expected = fingerprint(run_training(config, fleet))
    with RayFleet(fleet_plan(config), ray_session) as fleet:
        assert fingerprint(run_training(config, fleet)) == expected
        assert (fleet._weights._number >= 3) is ("weights" in options)  # what went by the group
        assert fleet._weights._failures == 0


def test_answers_keep_the_order_of_the_requests(ray_session: RaySession) -> None:
    with RayFleet(echo_plan(), ray_session) as fleet:
        images = fleet.sample_images(requests(12))
    assert [int(image[0, 0]) for image in images] == list(range(12))


def test_groups_that_share_calls_keep_their_scores(ray_session: RaySession) -> None:
    plan = slow_plan(0.0, 0.0)
    sampler, server = replace(plan.sampler, max_groups=4), replace(plan.reward_server, max_groups=4)
    with RayFleet(replace(plan, sampler=sampler, reward_server=server), ray_session) as fleet:
        fleet.broadcast(1)
        found = fleet.collect(fleet.submit(requests(24)))
    assert [int(group.scores.scores["score"][0]) for group in found] == [*range(1000, 1024)]


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("raises", "the policy has no class 7"),
        ("crashes", r"^sampler failed: ZeroDivisionError: a bug \(stubs\.py, line \d+\)$"),
        ("dies", r"sampler was lost \(its process .*\), after 1 replacements in an hour: look"),
    ],
)
def test_failures_say_who_and_why(ray_session: RaySession, behaviour: str, message: str) -> None:
    with (
        RayFleet(echo_plan(behaviour), ray_session) as fleet,
        pytest.raises(TesseraError, match=message),
    ):
        fleet.sample_images(requests(3))


def test_a_worker_that_cannot_start_says_why(ray_session: RaySession) -> None:
    with (
        pytest.raises(FleetError, match=r"^sampler could not start: .*no such weights[^\n]*$"),
        RayFleet(echo_plan("cannot start"), ray_session),
    ):
        pass


SILENT = r"sampler did not answer within 1 s \(--timeout-s\): it has had the tokens of group 0 of "


def test_every_wait_has_a_bound(ray_session: RaySession) -> None:
    with RayFleet(echo_plan("hangs", restarts=0), ray_session) as fleet:
        fleet._supervisor._plan = echo_plan("hangs", timeout_s=1.0)
        start = time.monotonic()
        with pytest.raises(FleetError, match=SILENT):
            fleet.sample_images(requests(1))
        assert time.monotonic() - start < 10


def test_a_wait_ends_when_a_stop_is_asked_for(ray_session: RaySession) -> None:
    stop = []
    with RayFleet(echo_plan("hangs"), ray_session, lambda: bool(stop)) as fleet:
        stop.append(True)
        with pytest.raises(StopRequestedError):
            fleet.sample_images(requests(1))


def test_more_than_the_machine_has_is_refused_before_anything_starts(
    ray_session: RaySession,
) -> None:
    plan = fleet_plan(small_config(sampler={"num_gpus": 1.0}))
    with pytest.raises(TesseraError, match="asks for 2 GPUs, but there are 0"):
        RayFleet(plan, ray_session)
