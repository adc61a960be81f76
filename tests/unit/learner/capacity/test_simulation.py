"""A simulated run against closed forms, and against the real fleet in one process."""

from __future__ import annotations

import math
from typing import Any

import pytest

from cluster.errors import ConfigError, FleetError
from cluster.fleet import InlineFleet
from cluster.simulation.specification import (
    RAY_CLIENT,
    DriverCosts,
    Failure,
    Fault,
    Host,
    SimulatedCluster,
)
from learner.capacity.service_times import ServiceTimes
from learner.capacity.simulation import SimulatedRun, simulate, simulated_run_fleet
from learner.config import RunConfig
from tests.distributed.stubs import slow_plan
from tests.small_run import small_config
from tests.unit.helpers import request

START, LOSS = 4.0, 1.0
HUGE = 1e15  # bytes/s


def times(**changes: Any) -> ServiceTimes:
    nothing: dict[str, Any] = dict.fromkeys(
        ("sample", "images", "commit", "learn", "publish", "load", "record", "driver"), 0.0
    )
    sizes = {"image_bytes": 0.0, "rollout_bytes": 48.0, "snapshot_bytes": 0.0}
    return ServiceTimes(**(nothing | sizes | {"score": {"reward-server": 0.0}} | changes))


def config(
    samplers: int = 1, groups: int = 8, servers: int = 1, staleness: int = 0, **changes: Any
) -> RunConfig:
    """Each worker on a GPU of its own."""
    return small_config(
        **{
            "groups_per_iteration": groups,
            "num_samplers": samplers,
            "num_reward_servers": servers,
            "max_staleness": staleness,
            "sampler": {"num_gpus": 1},
            "reward": {"num_gpus": 1},
            "learner": {"num_gpus": 1},
            "rewards": {"hps": {"enabled": False}},
            "heartbeat_s": 0,
        }
        | changes
    )


def cluster(hosts: int = 4, **changes: Any) -> SimulatedCluster:
    made = {"link_bytes_per_s": HUGE, "latency_s": 0.0, "start_s": START, "process_loss_s": LOSS}
    return SimulatedCluster(hosts=(Host(cpus=64, gpus=8),) * hosts, **(made | changes))


def run(
    of: RunConfig, times: ServiceTimes, on: SimulatedCluster | None = None, **options: Any
) -> SimulatedRun:
    return simulate(of, times, on or cluster(), **({"iterations": 4} | options))


def test_one_sampler_takes_the_sum_of_all_phases() -> None:
    """But for the record, during which it samples the next iteration."""
    found = run(
        config(),
        times(
            sample=1.0, score={"reward-server": 0.25}, commit=0.5, learn=2.0, publish=0.125,
            load=0.0625, record=0.03125,
        ),
    )  # fmt: skip
    assert found.seconds[1:] == pytest.approx([0.125 + 0.0625 + 8 * 1.0 + 0.25 + 0.5 + 2.0] * 3)
    assert found.images_per_s() == pytest.approx(32 / found.seconds[1])
    assert found.phases["sample"] == pytest.approx(8.0)
    assert found.restarts == 0


@pytest.mark.parametrize(("samplers", "groups"), [(1, 8), (2, 8), (3, 8), (4, 8), (8, 8), (16, 8)])
def test_equal_samplers_take_the_rounds_that_they_need(samplers: int, groups: int) -> None:
    found = run(config(samplers, groups), times(sample=2.0, learn=1.0))
    assert found.seconds[1:] == pytest.approx([2.0 * math.ceil(groups / samplers) + 1.0] * 3)


@pytest.mark.parametrize(("servers", "score"), [(1, 0.5), (1, 2.0), (2, 4.0)])
def test_samplers_and_reward_servers_are_a_tandem(servers: int, score: float) -> None:
    """The slower stage sets the pace; the other adds one group."""
    found = run(
        config(servers=servers, reward={"num_gpus": 1}),
        times(sample=1.0, score={"reward-server": score}),
    )
    assert found.seconds[-1] == pytest.approx(
        max(8 * 1.0 + score, 1.0 + 8 * score if servers == 1 else 8 / 2 * score + 2.0)
    )


@pytest.mark.parametrize(("learn", "seconds"), [(3.0, 8.0), (20.0, 20.0)])
def test_sampling_ahead_hides_the_shorter_phase(learn: float, seconds: float) -> None:
    found = run(config(staleness=1), times(sample=1.0, learn=learn), iterations=6)
    assert found.seconds[2:5] == pytest.approx([seconds] * 3)


def test_tokens_and_images_share_a_gpu() -> None:
    found = run(config(), times(sample=1.0, images=0.5))
    assert found.seconds[-1] == pytest.approx(8 * 1.5)  # the last image decodes alone


def test_workers_on_cores_share_them() -> None:
    """Three samplers of one thread on two cores take as long as one and a half each."""
    of = config(3, 12, sampler={"num_gpus": 0}, reward={"num_gpus": 0}, learner={"num_gpus": 0})
    found = run(of, times(sample=1.0), SimulatedCluster(hosts=(Host(cpus=2),), latency_s=0.0))
    assert found.seconds[-1] == pytest.approx(12 / 2, rel=0.02)


def test_weights_cross_a_link_once_a_host_and_images_to_their_server() -> None:
    """16 samplers fill two hosts beside that of the learner."""
    of = config(16, 32, rollouts_per_group=4, reward={"num_gpus": 1})
    sizes = times(sample=1.0, snapshot_bytes=1e9, image_bytes=1e6, rollout_bytes=4 * 120.0)
    found = run(of, sizes, cluster(3, link_bytes_per_s=1e9), iterations=4)
    assert found.sent[0] == pytest.approx(2 * 4 * 1e9, rel=0.1)  # two hosts, four versions
    assert sum(found.received) == pytest.approx(sum(found.sent))
    assert found.seconds[-1] == pytest.approx(2.0 + 2.0, rel=0.1)  # 2 GB out of one link, 2 rounds


def test_a_killed_sampler_costs_its_restart_and_the_group_in_hand() -> None:
    calm = run(config(), times(sample=1.0, load=0.25, learn=1.0))
    begin = START + sum(calm.seconds[:2]) + 0.25
    fault = Failure(at_s=begin + 2.5, fault=Fault.KILLED, worker="sampler")
    found = run(config(), times(sample=1.0, load=0.25, learn=1.0), failures=[fault])
    assert found.restarts == 1
    lost = [after - before for before, after in zip(calm.seconds, found.seconds)]
    assert lost == pytest.approx([0.0, 0.0, LOSS + START + 0.25 + 0.5, 0.0])


def test_another_sampler_takes_over_meanwhile() -> None:
    fault = Failure(at_s=START + 2.5, fault=Fault.KILLED, worker="sampler-1")
    found = run(config(2, 20), times(sample=1.0), failures=[fault])
    assert found.restarts == 1
    assert 10.0 < found.seconds[0] < 14.0
    assert found.seconds[1:] == pytest.approx([10.0] * 3)


def test_a_worker_that_hangs_is_replaced_by_its_heartbeat() -> None:
    fault = Failure(at_s=START + 2.5, fault=Fault.HANGS, worker="reward-server")
    found = run(
        config(heartbeat_s=30.0), times(sample=1.0, score={"reward-server": 0.5}), failures=[fault]
    )
    assert found.restarts == 1
    assert 30.0 < found.seconds[0] < 55.0
    assert found.seconds[1:] == pytest.approx([8.5] * 3)


def test_a_lost_host_costs_its_workers_one_restart_each() -> None:
    """The first host has learner and the servers; eight samplers each are on the next two."""
    fault = Failure(at_s=40.0, fault=Fault.HOST_LOST, host=1, until_s=100.0)
    of = config(16, 64, heartbeat_s=60.0)
    calm = run(of, times(sample=5.0), cluster(3), iterations=12)
    found = run(of, times(sample=5.0), cluster(3), iterations=12, failures=[fault])
    assert 5 <= found.restarts <= 8
    assert sum(found.seconds) > sum(calm.seconds)
    assert found.seconds[-3:] == pytest.approx(calm.seconds[-3:], rel=0.3)


def test_a_lost_learner_sends_the_run_back_to_its_checkpoint() -> None:
    of = config(output={"checkpoint_every": 2, "gallery_every": 0})
    calm = run(of, times(sample=1.0, learn=2.0), iterations=6)
    at = START + sum(calm.seconds[:3]) + 9.0
    fault = Failure(at_s=at, fault=Fault.KILLED, worker="learner")
    found = run(of, times(sample=1.0, learn=2.0), iterations=6, failures=[fault])
    assert found.restarts == 1
    assert len(found.seconds) == 7  # the third iteration twice


def test_a_straggler_gets_fewer_groups() -> None:
    slow = Failure(at_s=0.0, fault=Fault.SLOW, worker="sampler-3", factor=4.0)
    found = run(config(4, 64), times(sample=1.0), failures=[slow], iterations=4)
    assert found.seconds[-1] < 1.1 * 64 / 3.25 + 1.0  # an equal share would take 64
    short = Failure(at_s=0.0, fault=Fault.SLOW, worker="sampler-3", factor=4.0, until_s=30.0)
    again = run(config(4, 64), times(sample=1.0), failures=[short], iterations=4)
    assert again.seconds[-1] == pytest.approx(16.0)


def hostile(seed: int) -> SimulatedRun:
    """Much that happens at once."""
    varied = times(
        sample=1.0, images=0.25, score={"reward-server": 0.5}, learn=2.0, load=0.25, driver=0.002,
        image_bytes=3e6, rollout_bytes=2e5, snapshot_bytes=2e8, record=0.5,
        variation={"sample": 0.5, "score": 0.3, "images": 0.2, "learn": 0.1},
    )  # fmt: skip
    return run(
        config(10, 60, 2, 1, heartbeat_s=20.0),
        varied,
        cluster(3, link_bytes_per_s=1e9, latency_s=1e-3),
        iterations=6,
        seed=seed,
        failures=[
            Failure(at_s=9.0, fault=Fault.KILLED, worker="sampler-3"),
            Failure(at_s=12.0, fault=Fault.HANGS, worker="sampler-5"),
            Failure(at_s=15.0, fault=Fault.KILLED, worker="moments-server"),
            Failure(at_s=18.0, fault=Fault.KILLED, worker="reward-server-1"),
            Failure(at_s=0.0, fault=Fault.SLOW, worker="sampler-7", factor=8.0, until_s=60.0),
            Failure(at_s=25.0, fault=Fault.HOST_LOST, host=1, until_s=50.0),
        ],
    )


def test_equal_seeds_give_equal_runs() -> None:
    first = hostile(1)
    assert hostile(1) == first
    assert hostile(2).seconds != first.seconds
    assert first.restarts >= 7
    assert first.groups == 6 * 60  # the pipeline checked that each came once, of its version


@pytest.mark.parametrize("most", [1, 4, 8])
def test_groups_that_share_calls_are_answered_once_each(most: int) -> None:
    """Samplers and a server are killed with several groups in a call."""
    of = config(3, 48, 2, 1, sampler={"num_gpus": 1, "max_groups": most}, reward={"num_gpus": 1})
    some = times(sample=0.5, images=0.5, score={"reward-server": 0.5}, image_bytes=3e6)
    faults = [
        Failure(at_s=START + at, fault=Fault.KILLED, worker=name)
        for name, at in (("sampler-0", 3.0), ("sampler-1", 9.7), ("reward-server-0", 14.0))
    ]
    found = run(of, some, failures=faults)
    assert (found.restarts, found.groups) == (3, 4 * 48)
    assert found.seconds[-2] == pytest.approx(48 / 3, rel=0.4)


def test_groups_that_share_calls_cost_the_driver_less() -> None:
    spent = {}
    for most in (1, 8):
        of = config(4, 64, 4, sampler={"num_gpus": 1, "max_groups": most})
        costs = cluster(driver=DriverCosts(remote_s=1.0))
        found = run(of, times(sample=0.5, score={"reward-server": 0.5}), costs, iterations=2)
        spent[most] = found.driver_s / found.groups
    assert spent[1] == pytest.approx(3.0, rel=0.1)  # tokens, images, scores
    assert spent[8] < spent[1] / 3


def test_results_have_the_order_of_the_fleet_in_one_process() -> None:
    of = config(3)
    asked = [request(group, 1) for group in range(7)]
    with InlineFleet(slow_plan(0.0)) as fleet:
        fleet.broadcast(1)
        real = fleet.collect(fleet.submit(asked))
    varied = times(sample=1.0, variation={"sample": 1.0}, score={"reward-server": 0.5})
    with simulated_run_fleet(of, varied, cluster()) as simulated:
        simulated.fleet.broadcast(1)
        made = simulated.fleet.collect(simulated.fleet.submit(asked))
    assert [(g.rollouts.request, g.scores.key) for g in made] == [
        (g.rollouts.request, g.scores.key) for g in real
    ]


def test_reward_servers_scale_by_their_queue() -> None:
    auto = {"num_gpus": 1, "max": 6, "target_wait_s": 1.0, "every_s": 5.0}
    of = config(4, 64, 1, 1, reward=auto)
    slow = times(sample=0.5, score={"reward-server": 0.5})
    found = run(of, slow, iterations=6)
    fixed = run(config(4, 64, 1, 1), slow, iterations=6)
    assert fixed.seconds[3] == pytest.approx(32.0, rel=0.05)
    assert found.seconds[3] < 16.0


def test_the_drivers_own_time_counts() -> None:
    slow = run(config(16, 64), times(sample=0.01, driver=0.1))
    assert slow.seconds[2] == pytest.approx(6.4, rel=0.05)
    assert slow.driver_ms_per_group == pytest.approx(100.0)
    costs = run(config(4, 16), times(sample=0.1), cluster(driver=RAY_CLIENT))
    assert 0.1 < costs.driver_ms_per_group < 50.0


def test_a_worker_that_fails_too_often_ends_the_run_as_a_real_one_would() -> None:
    faults = [Failure(at_s=10.0 + 10 * i, fault=Fault.KILLED, worker="sampler") for i in range(4)]
    with pytest.raises(FleetError, match=r"sampler.*raise --max-restarts"):
        run(config(), times(sample=1.0), failures=faults, iterations=20)


def test_a_fleet_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="GPU"):
        run(config(16), times(sample=1.0), cluster(1))


@pytest.mark.parametrize(
    ("made", "fault"),
    [
        (lambda: Failure(at_s=1.0, fault=Fault.KILLED), "names a worker"),
        (lambda: Failure(at_s=1.0, fault=Fault.HOST_LOST, host=0), "from 1 on"),
        (lambda: Failure(at_s=2.0, fault=Fault.SLOW, worker="a", until_s=1.0), "until_s"),
        (lambda: Failure(at_s=2.0, fault=Fault.SLOW, worker="a", factor=0.0), "factor"),
        (lambda: SimulatedCluster(hosts=()), "at least one host"),
        (lambda: cluster(link_bytes_per_s=0.0), "link_bytes_per_s"),
        (lambda: cluster(start_s=math.nan), "start_s"),
        (lambda: Host(cpus=0), "cpus > 0"),
    ],
)
def test_what_cannot_be_simulated_is_refused(made: Any, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        made()


def test_unknown_workers_of_failures_are_refused() -> None:
    fault = Failure(at_s=1.0, fault=Fault.KILLED, worker="smapler-0")
    with pytest.raises(ConfigError, match=r"smapler-0.*sampler"):
        run(config(2), times(sample=1.0), failures=[fault])


def test_costs_of_the_driver_default_to_none() -> None:
    assert DriverCosts() == DriverCosts(group_s=0.0, measured=False)
