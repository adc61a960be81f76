"""The fleet of one process: groups decoded together, fleets of evaluations."""

from __future__ import annotations

import numpy as np
import pytest

from actors.sampler import Sampler
from cluster.errors import DataError, FleetError
from cluster.fleet import InlineFleet, decoded_together
from cluster.messages import SamplingSpec
from cluster.roles import Resources, Role
from learner.fleet_plan import fleet_plan, sampling_plan, scoring_plan
from tests.small_run import small_config
from tests.unit.helpers import request


def test_parts_are_alike_and_of_the_sizes_that_a_sampler_keeps() -> None:
    cold = SamplingSpec(temperature=0.5)
    requests = [*(request(group) for group in range(12)), request(12, spec=cold), request(13)]
    parts = list(decoded_together(requests, sampler_role(8)))
    assert [len(part) for part in parts] == [8, 4, 1, 1]
    assert [asked for part in parts for asked in part] == requests
    assert [len(part) for part in decoded_together(requests, sampler_role(1))] == [1] * 14


def test_larger_groups_than_planned_go_together_in_smaller_numbers() -> None:
    guided = SamplingSpec(cfg_scale=2.0, guidance="guided")
    requests = [request(group, 10) for group in range(7)] + [request(7, 10, spec=guided)] * 3
    requests += [request(8, 50)] * 2
    parts = list(decoded_together(requests, sampler_role(8, max_rows=8 * 5)))
    assert [(len(part), part[0].rows) for part in parts] == [
        (4, 10), (2, 10), (1, 10), (2, 20), (1, 20), (1, 50), (1, 50)
    ]  # fmt: skip


def sampler_role(max_groups: int, max_rows: int = 0) -> Role:
    sizes = {"max_groups": max_groups, "max_rows": max_rows}
    return Role(name="sampler", factory=Sampler, config=None, resources=Resources(), **sizes)


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


def test_a_fleet_without_a_learner_samples_as_one_with_it_does() -> None:
    config = small_config()
    asked = [request(group, 4, panel="judge") for group in range(3)]
    with InlineFleet(fleet_plan(config)) as fleet:
        fleet.broadcast(0)
        expected = list(fleet.stream(asked))
    with InlineFleet(sampling_plan(config)) as fleet:
        found = list(fleet.stream(asked))
        for touch in (lambda: fleet.learner, lambda: fleet.moments, lambda: fleet.broadcast(0)):
            with pytest.raises(FleetError, match=r"no (learner|moments-server): it was started to"):
                touch()
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.rollouts.version == 0
        np.testing.assert_array_equal(ours.rollouts.tokens, theirs.rollouts.tokens)
        for name, values in {**theirs.scores.scores, **theirs.scores.features}.items():
            np.testing.assert_array_equal(
                {**ours.scores.scores, **ours.scores.features}[name], values
            )


def test_given_images_are_scored_as_sampled_ones_are() -> None:
    config = small_config()
    asked = [request(group, 4, panel="judge") for group in range(3)]
    with InlineFleet(sampling_plan(config)) as fleet:
        expected, images = list(fleet.stream(asked)), fleet.sample_images(asked)
    with InlineFleet(scoring_plan(config)) as fleet:
        found = list(fleet.score_images(zip(asked, images, strict=True)))
        assert [scores.key for scores in found] == [one.key for one in asked]
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_array_equal(
                ours.features["features"], theirs.scores.features["features"]
            )
            np.testing.assert_array_equal(ours.scores["clip"], theirs.scores.scores["clip"])
        with pytest.raises(
            DataError,
            match=r"expected images \(4, H, W, 3\) uint8, or as many of several sizes, found \(3, ",
        ):
            list(fleet.score_images([(asked[0], images[0][:3])]))
        with pytest.raises(FleetError, match="this fleet has no sampler: it was started to"):
            list(fleet.stream(asked))
