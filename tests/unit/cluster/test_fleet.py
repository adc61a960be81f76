"""Groups that the fleet of one process decodes together."""

from __future__ import annotations

import numpy as np
import pytest

from actors.sampler import Sampler
from cluster.fleet import InlineFleet, decoded_together
from cluster.messages import SamplingSpec
from learner.fleet_plan import fleet_plan
from tests.small_run import small_config
from tests.unit.helpers import request


def test_parts_are_alike_and_of_the_sizes_that_a_sampler_keeps() -> None:
    cold = SamplingSpec(temperature=0.5)
    requests = [*(request(group) for group in range(12)), request(12, spec=cold), request(13)]
    parts = list(decoded_together(requests, 8))
    assert [len(part) for part in parts] == [8, 4, 1, 1]
    assert [asked for part in parts for asked in part] == requests
    assert [len(part) for part in decoded_together(requests, 1)] == [1] * 14


def test_groups_decoded_together_are_those_decoded_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    sample = Sampler.sample

    def counted(sampler: Sampler, requests: list) -> list:
        sizes.append(len(requests))
        return sample(sampler, requests)

    monkeypatch.setattr(Sampler, "sample", counted)
    found = []
    for most in (1, 4):
        with InlineFleet(fleet_plan(small_config(sampler={"max_groups": most}))) as fleet:
            fleet.broadcast(0)
            found.append(fleet.collect(fleet.submit([request(group, 4) for group in range(6)])))
    assert sizes == [1] * 6 + [4, 2]
    for apart, together in zip(*found, strict=True):
        assert apart.rollouts.request == together.rollouts.request
        np.testing.assert_array_equal(apart.rollouts.tokens, together.rollouts.tokens)
        np.testing.assert_allclose(apart.scores.scores["clip"], together.scores.scores["clip"])
