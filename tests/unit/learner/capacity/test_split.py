"""The search for the best split against every split, and what must hold of the best."""

from __future__ import annotations

import dataclasses
import itertools
from functools import cache

import pytest

from learner.capacity.budget import changed
from learner.capacity.cards import CARDS
from learner.capacity.gpus import fits, pack, processes
from learner.capacity.scale.fewest import WORTH, fewest_gpus
from learner.capacity.scale.split import MAIN, OWN, PAIRED, SHARED, Search, Site, Split, steps
from learner.capacity.service_times import ServiceTimes
from learner.config import RunConfig, load_preset, to_dict, validate
from tests.unit.learner.capacity.test_budget import MODELS

SITE = Site(card=CARDS["h200"], gpus_per_node=4, link=12.5e9)
EXTRA = {"num_servers": 1, "num_gpus": 0.5}


@cache
def run_of(groups: int, pool: bool = False) -> RunConfig:
    config = dataclasses.replace(load_preset("paper-fixed"), groups_per_iteration=groups)
    if not pool:
        return config
    return changed(config, {"rewards.hps.pool": "extra", "reward_pools": {"extra": EXTRA}})


def every_split(search: Search, gpus: int, groups: int, rollouts: int) -> list[Split]:
    found = []
    for learners in range(1, min(gpus, rollouts) + 1):
        for samplers in range(1, min(gpus, groups) + 1):
            every = dict.fromkeys(search.pools, samplers)
            found.append(Split(samplers=samplers, servers=every, learners=learners, layout=PAIRED))
            if learners == 1:
                found.append(Split(samplers=samplers, servers=every, learners=1, layout=SHARED))
            for counts in itertools.product(range(1, gpus + 1), repeat=len(search.pools)):
                servers = dict(zip(search.pools, counts))
                found.append(Split(samplers=samplers, servers=servers, learners=learners))
    return [split for split in found if split.gpus <= gpus]


@pytest.mark.parametrize(("groups", "pool"), [(3, False), (8, False), (5, True)])
def test_the_search_finds_the_best_of_all(groups: int, pool: bool) -> None:
    config = run_of(groups, pool)
    search = Search(config, MODELS, SITE)
    assert len(search.pools) == 1 + pool
    for gpus, staleness in itertools.product((1, 2, 3, 5, 6), (0, 1)):
        every = every_split(search, gpus, groups, groups * config.rollouts_per_group)
        least = min(
            search.plan(split, staleness).seconds for split in every if fits_memory(search, split)
        )
        best = search.best(gpus, staleness)
        assert best is not None
        assert best.seconds == pytest.approx(least, rel=1e-9)


def fits_memory(search: Search, split: Split) -> bool:
    """By the arithmetic of the run's own budget, each worker on the GPU that the split gives it."""
    found = pack(processes(search.configured(split, 0), MODELS.policy, MODELS.tokenizer))
    return fits(found, SITE.card.memory) and len(found) == split.gpus


@pytest.mark.parametrize("preset", ["paper-fixed", "llamagen-b-256"])
def test_more_gpus_faster_links_and_staleness_are_never_slower(preset: str) -> None:
    config, before = load_preset(preset), None
    for gpus in (1, 2, 3, 5, 8, 12, 16, 24, 40, 64):
        rows = []
        for gbit in (10, 100, 400):
            search = Search(config, MODELS, dataclasses.replace(SITE, link=gbit * 1e9 / 8))
            plans = [search.best(gpus, staleness) for staleness in (0, 1, 2)]
            seconds = [plan.seconds for plan in plans if plan is not None]
            assert len(seconds) == 3
            assert seconds == sorted(seconds, reverse=True)
            assert all(plan.split.gpus <= gpus for plan in plans if plan is not None)
            rows.append(seconds)
        for slower, faster in itertools.pairwise(rows):
            assert all(fast <= slow + 1e-12 for slow, fast in zip(slower, faster))
        if before is not None:
            assert all(
                now <= then + 1e-12
                for then_row, now_row in zip(before, rows)
                for then, now in zip(then_row, now_row)
            )
        before = rows


def test_the_best_split_is_a_run_that_fits_and_validates() -> None:
    for preset, pool in (("paper-fixed", True), ("paper-fixed", False), ("llamagen-b-256", False)):
        config = run_of(12, pool) if preset == "paper-fixed" else load_preset(preset)
        search = Search(config, MODELS, SITE)
        for gpus in (1, 2, 7, 16):
            plan = search.best(gpus, 1)
            assert plan is not None
            made = search.configured(plan.split, 1)
            assert validate(to_dict(made), "test") == made
            packed = pack(processes(made, MODELS.policy, MODELS.tokenizer))
            assert fits(packed, SITE.card.memory)
            assert len(packed) == plan.split.gpus <= gpus


def test_what_does_not_fit_is_left_out() -> None:
    config = load_preset("paper-fixed")
    small = dataclasses.replace(SITE, card=dataclasses.replace(SITE.card, memory=56e9))
    search = Search(config, MODELS, small)
    assert search.best(1, 0) is None  # learner, sampler and reward server do not fit one
    plan = search.best(2, 0)
    assert plan is not None
    assert plan.split.layout == PAIRED
    tiny = dataclasses.replace(SITE, card=dataclasses.replace(SITE.card, memory=4e9))
    assert Search(config, MODELS, tiny).best(64, 0) is None


@pytest.mark.parametrize("preset", ["paper-fixed", "llamagen-b-256"])
@pytest.mark.parametrize("gpus", [1, 8, 256])
def test_gpus_that_gain_next_to_nothing_are_left_over(preset: str, gpus: int) -> None:
    search = Search(load_preset(preset), MODELS, SITE)
    fastest, found = search.best(gpus), fewest_gpus(search, gpus)
    assert fastest is not None
    assert found is not None
    assert found.split.gpus <= fastest.split.gpus
    assert found.seconds <= fastest.seconds * WORTH
    fewer = search.best(found.split.gpus - 1) if found.split.gpus > 1 else None
    assert fewer is None or fewer.seconds > fastest.seconds * WORTH
    assert found.split.gpus < fastest.split.gpus or (preset, gpus) != ("paper-fixed", 256)


def test_measured_seconds_replace_the_arithmetic() -> None:
    config = load_preset("paper-fixed")
    search = Search(config, MODELS, SITE)
    plan = search.best(8, 0)
    assert plan is not None
    doubled = ServiceTimes(
        **{
            name: {pool: 2 * s for pool, s in value.items()}
            if name == "score"
            else value
            if name == "variation" or name.endswith("bytes")
            else 2 * value
            for name, value in vars(search.plan(search.best(1, 0).split, 0).times).items()  # type: ignore[union-attr]
        }
    )
    measured = Search(config, MODELS, SITE, doubled).plan(plan.split, 0)
    for name in ("sample", "images", "learn", "commit"):
        assert getattr(measured.times, name) == pytest.approx(2 * getattr(plan.times, name))
    slow_scores = dataclasses.replace(doubled, score={MAIN: 50.0})
    asked = Search(config, MODELS, SITE, slow_scores).best(16, 1)
    assert asked is not None
    assert asked.split.servers[MAIN] > plan.split.servers[MAIN] / 2
    assert asked.prediction.bottleneck == MAIN


def test_steps_are_where_the_largest_part_shrinks() -> None:
    assert steps(12, 64) == [1, 2, 3, 4, 6, 12]
    assert steps(12, 5) == [1, 2, 3, 4]
    assert steps(7, 64) == [1, 2, 3, 4, 7]
    for parts in range(1, 60):
        shares = {-(-parts // count) for count in range(1, parts + 1)}
        assert [-(-parts // count) for count in steps(parts, parts)] == sorted(shares, reverse=True)


def test_nodes_are_filled_in_order() -> None:
    split = Split(samplers=3, servers={MAIN: 2}, learners=2)
    hosts = split.hosts(4)
    assert [(h.learners, h.samplers, dict(h.servers)) for h in hosts] == [
        (2, 2, {}),
        (0, 1, {MAIN: 2}),
    ]
    paired = Split(samplers=3, servers={MAIN: 3}, learners=2, layout=PAIRED).hosts(4)
    assert [(h.learners, h.samplers, dict(h.servers)) for h in paired] == [
        (2, 2, {MAIN: 2}),
        (0, 1, {MAIN: 1}),
    ]
    assert Split(samplers=5, servers={}, learners=1, layout=SHARED).gpus == 5
    assert OWN != PAIRED
