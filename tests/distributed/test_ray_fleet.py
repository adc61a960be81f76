"""The Ray fleet gives what the inline fleet gives, however many workers it has and whoever dies."""

from __future__ import annotations

import os
import time

import numpy as np
import pytest

from cluster.errors import FleetError, StopRequestedError, TesseraError
from cluster.fleet import InlineFleet
from cluster.messages import Condition, RolloutGroup, SampleRequest, SamplingSpec
from cluster.ray_backend.fleet import RayFleet
from cluster.ray_session.session import RaySession
from cluster.roles import FleetPlan, Resources, Role
from cluster.spans import Span
from learner.fleet_plan import fleet_plan
from tests.distributed.kills import kill_when_asked_for
from tests.small_run import fingerprint, run_training, small_config
from tests.stand_ins import drawn

START_S = 120.0


@pytest.fixture(scope="module")
def inline() -> list[tuple]:
    config = small_config()
    with InlineFleet(fleet_plan(config)) as fleet:
        return fingerprint(run_training(config, fleet))


@pytest.mark.parametrize(("samplers", "servers"), [(1, 1), (4, 2)])
def test_equals_inline_bit_for_bit(
    ray_session: RaySession, inline: list[tuple], samplers: int, servers: int
) -> None:
    config = small_config(num_samplers=samplers, num_reward_servers=servers)
    with RayFleet(fleet_plan(config), ray_session) as fleet:
        assert fingerprint(run_training(config, fleet)) == inline


def test_moments_prepared_off_the_critical_path_are_the_same(ray_session: RaySession) -> None:
    """The joint space, whose history has full rank only with enough seed images."""
    config = small_config(
        num_samplers=2,
        rewards={"loo_fid": {"joint": True, "joint_dim": 4, "seed_images": 200}},
    )
    with InlineFleet(fleet_plan(config)) as fleet:
        expected = fingerprint(run_training(config, fleet))
    with RayFleet(fleet_plan(config), ray_session) as fleet:
        assert fingerprint(run_training(config, fleet)) == expected


@pytest.mark.slow  # test_failures.py has these and others, over whole runs
@pytest.mark.parametrize("role", ["sampler", "reward_server"])
def test_a_killed_worker_is_replaced_and_nothing_changes(
    ray_session: RaySession, inline: list[tuple], role: str
) -> None:
    config = small_config(num_samplers=2, num_reward_servers=2)
    with RayFleet(fleet_plan(config), ray_session) as fleet:
        samplers, servers = fleet.pools
        victims = (samplers if role == "sampler" else servers).workers
        killed = kill_when_asked_for(fleet, victims, iteration=1)
        assert fingerprint(run_training(config, fleet)) == inline
        assert len(killed) == 1
        assert fleet.restarts == 1


class Echo:
    """Stands in for every role; what it does is in its config."""

    def __init__(self, config: str, name: str) -> None:
        self.config, self.name = config, name
        if config == "cannot start":
            raise TesseraError("no such weights")

    def load_weights(self, snapshot: object) -> int:
        return 0

    def snapshot(self) -> str:
        return "weights"

    def sample(self, requests: list[SampleRequest]) -> list[RolloutGroup]:
        (request,) = requests
        match self.config:
            case "raises":
                raise TesseraError("the policy has no class 7")
            case "crashes":
                raise ZeroDivisionError("a bug")
            case "dies":
                os._exit(1)
            case "hangs":
                time.sleep(60)
        return [drawn(request)]

    def images(self, group: RolloutGroup) -> tuple[np.ndarray, Span]:
        return np.full((2, 2), group.tokens[0, 0]), Span(self.name, "decode", 0.0, 0.0)


def echo_plan(sampler: str = "", *, timeout_s: float = START_S, restarts: int = 1) -> FleetPlan:
    def role(name: str, config: str = "") -> Role:
        return Role(name=name, factory=Echo, config=config, resources=Resources(num_cpus=0.1))

    return FleetPlan(
        sampler=role("sampler", sampler),
        reward_server=role("reward-server"),
        moments_server=role("moments-server"),
        learner=role("learner"),
        timeout_s=timeout_s,
        max_restarts=restarts,
    )


def requests(count: int) -> list[SampleRequest]:
    return [
        SampleRequest(
            stream="gallery",
            iteration=0,
            group=group,
            condition=Condition(text=""),
            num_rollouts=1,
            seed=0,
            spec=SamplingSpec(),
        )
        for group in range(count)
    ]


def test_answers_keep_the_order_of_the_requests(ray_session: RaySession) -> None:
    with RayFleet(echo_plan(), ray_session) as fleet:
        images = fleet.sample_images(requests(12))
    assert [int(image[0, 0]) for image in images] == list(range(12))


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("raises", "the policy has no class 7"),
        ("crashes", r"^sampler failed: ZeroDivisionError: a bug \(test_ray_fleet\.py, line \d+\)$"),
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
