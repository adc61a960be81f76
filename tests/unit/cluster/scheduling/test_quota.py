"""Quotas of runs, by hand: at the start, by request, and of the autoscaler."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from cluster.control.control_actor import ScaleRequest
from cluster.errors import ConfigError
from cluster.placement.nodes import Node
from cluster.ray_backend import autoscaler
from cluster.ray_backend.autoscaler import Autoscaler
from cluster.roles import AutoscaleConfig, FleetPlan, QuotaConfig, Resources, Role
from cluster.scheduling.placement import place, quota_of
from cluster.scheduling.pool import State, Worker, WorkerPool
from cluster.scheduling.quota import RunQuota, Share


def quota(cpus: float = 0.0, gpus: float = 0.0) -> RunQuota:
    shares = {"sampler": Share(1.0, 1.0), "reward-server": Share(0.5, 0.25), "learner": Share(1.0)}
    return RunQuota(QuotaConfig(cpus=cpus, gpus=gpus), shares)


COUNTS = {"sampler": 2, "reward-server": 4, "learner": 1}


def test_what_workers_count_for() -> None:
    assert quota().reserved(COUNTS) == Share(5.0, 3.0)
    assert quota().reserved({"sampler": 3, "moments-server": 9}) == Share(3.0, 3.0)
    tenths = RunQuota(QuotaConfig(cpus=1.0), {"sampler": Share(0.1)})
    assert tenths.most("sampler", {}) == 10  # not 9, as sums of floats have it
    tenths.check({"sampler": 10})


@pytest.mark.parametrize(
    ("bounds", "role", "most"),
    [
        (quota(), "sampler", None),
        (quota(cpus=5), "sampler", 2),
        (quota(cpus=5.9), "sampler", 2),
        (quota(cpus=6), "sampler", 3),
        (quota(cpus=100, gpus=3), "sampler", 2),
        (quota(gpus=3), "reward-server", 4),
        (quota(gpus=3), "learner", None),  # it has no GPU
        (quota(cpus=1), "sampler", 0),  # a resumed run whose quota was lowered
    ],
)
def test_the_most_workers_of_a_role(bounds: RunQuota, role: str, most: int | None) -> None:
    assert bounds.most(role, COUNTS) == most


def test_a_refusal_says_what_there_is_and_fewer_are_never_refused() -> None:
    why = quota(gpus=3).refusal("sampler", 3, COUNTS)
    assert "3 workers of sampler" in why
    assert "6 CPUs and 4 GPUs" in why
    assert "its quota is 3 GPUs: sampler can have 2" in why
    assert quota(gpus=3).refusal("sampler", 2, COUNTS) == ""
    assert quota(gpus=1).refusal("sampler", 1, COUNTS) == ""


@pytest.mark.parametrize(("cpus", "gpus"), [(-1.0, 0.0), (0.0, -0.5), (float("nan"), 0.0)])
def test_bounds_that_are_none(cpus: float, gpus: float) -> None:
    with pytest.raises(ValueError, match="must be >= 0"):
        QuotaConfig(cpus=cpus, gpus=gpus)


def role(name: str, count: int, cpus: float = 0.0, gpus: float = 0.0, most: int = 0) -> Role:
    return Role(
        name=name,
        factory=object,
        config=None,
        resources=Resources(num_cpus=cpus, num_gpus=gpus),
        count=count,
        autoscale=AutoscaleConfig(max=most, every_s=1.0) if most else AutoscaleConfig(),
    )


def plan(samplers: Role, bounds: QuotaConfig, servers: int = 1) -> FleetPlan:
    return FleetPlan(
        sampler=samplers,
        reward_server=role("reward-server", servers, most=4),
        moments_server=role("moments-server", 1),
        learner=role("learner", 1),
        quota=bounds,
    )


NODES = [Node("a", 16.0, 8.0), Node("b", 16.0, 8.0)]


def test_a_start_above_the_quota_is_refused() -> None:
    wide = plan(role("sampler", 4, cpus=2.0, gpus=1.0), QuotaConfig(gpus=3))
    with pytest.raises(ConfigError, match=r"reserve 4 GPUs, more than quota\.gpus 3 \(sampler 4 x"):
        place(wide, NODES)
    with pytest.raises(ConfigError, match=r"reserve 8 CPUs, more than quota\.cpus 4"):
        place(plan(role("sampler", 4, cpus=2.0), QuotaConfig(cpus=4)), NODES)


def test_workers_without_num_cpus_share_the_quota_and_not_the_cluster() -> None:
    bounds = QuotaConfig(cpus=3)
    found = place(plan(role("sampler", 2), bounds), NODES)
    counts = {each.role: each.count for each in found.roles}
    assert {each.num_cpus for each in found.roles} == {0.37}  # of 8 that scaling may bring
    whole = quota_of(plan(role("sampler", 2), bounds), found.roles)
    assert whole.reserved(counts | {"reward-server": 4}).cpus <= 3
    assert place(plan(role("sampler", 2), QuotaConfig()), NODES).roles[0].num_cpus == 1.0


class Pools:
    """A pool of reward servers between 1 and 8, and samplers, with workers that are objects."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, bounds: QuotaConfig) -> None:
        monkeypatch.setattr(autoscaler, "actor_id", lambda handle: "")
        self.server = WorkerPool(role("reward-server", 2, cpus=1, most=8), launch, lambda w: None)
        self.sampler = WorkerPool(role("sampler", 2, cpus=1), launch, lambda w: None)
        learner = Worker(role("learner", 1), 0, None)
        shares = {name: Share(1.0) for name in ("sampler", "reward-server", "learner")}
        self.autoscaler = Autoscaler(
            [self.sampler, self.server], "", RunQuota(bounds, shares), others=lambda: [learner]
        )

    def ask(self, name: str, count: int) -> str:
        number = self.autoscaler.status().answered + 1
        self.autoscaler._grant(ScaleRequest(number=number, role=name, count=count))
        return dict(self.autoscaler.status().refusals).get(number, "")

    def wait(self, seconds: float) -> None:
        """Tasks waited so long for reward servers."""
        self.server.meter.waited(seconds)
        self.server.meter._since -= 10
        self.autoscaler.tick(0)


def launch(role: Role, index: int, addition: bool, late: bool) -> Any:
    return Worker(role, index, None, addition=addition, state=State.SERVING)


def test_requests_beyond_the_quota_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pools = Pools(monkeypatch, QuotaConfig(cpus=6))
    assert pools.autoscaler.status().reserved == Share(5.0)
    assert "sampler can have 3 beside the others" in pools.ask("sampler", 4)
    assert pools.sampler.target == 2
    assert pools.ask("sampler", 3) == ""
    assert pools.autoscaler.status().reserved == Share(6.0)
    assert "quota is 6 CPUs" in pools.ask("reward-server", 3)
    assert pools.ask("sampler", 1) == ""
    assert pools.ask("reward-server", 4) == ""


def test_workers_that_are_leaving_count_until_they_are_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pools = Pools(monkeypatch, QuotaConfig(cpus=5))
    pools.sampler.workers[1].take()
    pools.ask("sampler", 1)
    assert len(pools.sampler.workers) == 2
    assert "quota" in pools.ask("reward-server", 3)
    assert pools.ask("sampler", 2) == ""  # it stays instead


def test_the_autoscaler_stays_within_the_quota_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pools = Pools(monkeypatch, QuotaConfig(cpus=6))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            pools.wait(60.0)
    assert pools.server.target == 3
    (why,) = pools.autoscaler.status().held_back
    assert why.startswith("reward-server: 6 workers would be started")
    assert "6 CPUs leaves room for 3" in why
    assert len([text for text in caplog.messages if "held" in text or "quota" in text]) == 2
    pools.ask("sampler", 1)
    pools.wait(60.0)
    assert pools.server.target == 4
