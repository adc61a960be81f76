"""Weights taken up between tokens on Ray: a slow sampler, and the real loop."""

from __future__ import annotations

import dataclasses
import time

import numpy as np

from actors.sampler import Sampler
from cluster.ray_backend.fleet import RayFleet
from cluster.ray_session.session import RaySession
from learner.fleet_plan import fleet_plan
from tests.small_run import run_training, small_config

TOKEN_S = 0.03


class SlowSampler(Sampler):
    """Every token takes a while, as with a large policy."""

    def _take_up_offered(self) -> None:
        time.sleep(TOKEN_S)
        super()._take_up_offered()


def test_a_run_whose_samplers_take_weights_up_between_tokens(ray_session: RaySession) -> None:
    """Groups are under way when new weights come; none is older than the bound, and the learner,
    who checks that, is content."""
    config = small_config(
        max_staleness=1, iterations=4, weights={"take_up": "token"}, num_samplers=2
    )
    plan = fleet_plan(config)
    sampler = dataclasses.replace(plan.sampler, factory=SlowSampler)
    with RayFleet(dataclasses.replace(plan, sampler=sampler), ray_session) as fleet:
        done = run_training(config, fleet)
        assert fleet.restarts == 0
        assert not fleet._calls
    assert [iteration.metrics["version"] for iteration in done] == [1, 2, 3, 4]
    shares = []
    for number, iteration in enumerate(done):
        assert 0 <= iteration.metrics["policy/staleness"] <= 1
        groups = [group.rollouts for group in iteration.groups]
        assert all(max(number - 1, 0) <= g.version <= g.newest <= number for g in groups)
        assert all(np.all(np.diff(g.token_versions) >= 0) for g in groups if g.newest > g.version)
        share = float(np.mean([group.mixed_share for group in groups]))
        assert iteration.metrics["staleness/mixed_tokens"] == share
        shares.append(share)
    assert shares[0] == 0  # nothing newer was there
    assert max(shares) > 0
