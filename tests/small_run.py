"""A run of the miniature that takes seconds, for tests that need the whole loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from cluster.fleet import Fleet
from cluster.messages import MAIN_SPACE
from learner.config import RunConfig, load_preset, merge, to_dict, validate
from learner.loop import Iteration, prepare, train
from learner.monitoring.metrics import read_metrics, repeatable
from learner.rollouts.feature_space import RewardSpace, read_moments, set_reference
from rewards.distribution.reference import Reference

OPTIONS = {
    "iterations": 4,
    "groups_per_iteration": 4,
    "rollouts_per_group": 4,
    "rewards": {"loo_fid": {"seed_images": 40}},
    "learner": {"lr": 1e-3, "microbatch": 8, "num_threads": 1},
    "evaluation": {"num_images": 40},
    "output": {"checkpoint_every": 2, "gallery_every": 2, "gallery_columns": 3},
}
"""Changes to the miniature preset."""


def plain_miniature() -> dict[str, Any]:
    """The miniature's values with LOO-FID in one space, not joint, and no real images in the loss:
    for tests of what that does, and of runs with references of their own."""
    plain = {"rewards": {"loo_fid": {"joint": False}}, "real": {"weight": 0.0}}
    values = merge(to_dict(load_preset("miniature")), plain)
    values["rewards"]["further"] = {}
    return values


def small_config(**changes: Any) -> RunConfig:
    return validate(merge(merge(plain_miniature(), OPTIONS), changes), "test")


def default_config(**changes: Any) -> RunConfig:
    """The default preset with the same changes, as `flags` gives them on a command line."""
    return validate(merge(merge(to_dict(load_preset("miniature")), OPTIONS), changes), "test")


def flags(options: dict[str, Any] = OPTIONS, prefix: str = "--") -> list[str]:
    """The same changes as command line options."""
    found: list[str] = []
    for key, value in options.items():
        name = prefix + key.replace("_", "-")
        found += flags(value, name + ".") if isinstance(value, dict) else [name, str(value)]
    return found


def moments_of_main(config: RunConfig) -> tuple[RewardSpace, Reference]:
    """The stored reference of `rewards.loo_fid`, and its space."""
    return read_moments(config, config.rewards.spaces()[MAIN_SPACE])


def run_training(
    config: RunConfig, fleet: Fleet, enough: Callable[[int], bool] = lambda done: False
) -> list[Iteration]:
    """The main loop alone, its iterations kept in memory; ends early after `enough` of them."""
    iterations: list[Iteration] = []
    fleet.broadcast(0)
    space = set_reference(config, fleet)
    prepare(config, fleet, space)
    train(config, fleet, space, 0, iterations.append, lambda: enough(len(iterations)))
    return iterations


def fingerprint(iterations: list[Iteration]) -> list[tuple]:
    """What equal runs have in common: metrics without times, tokens, rewards."""
    return [
        (
            repeatable(done.metrics),
            [group.rollouts.tokens.tolist() for group in done.groups],
            {name: values.tolist() for name, values in done.advantages.rewards.items()},
        )
        for done in iterations
    ]


def recorded(run: Path) -> list[tuple]:
    """The same, from a run directory."""
    files = sorted((run / "rollouts").glob("*.parquet"))
    columns = [
        "tokens", "reward_clip", "reward_hps", "reward_loo_fid", "advantage", "policy_version"
    ]  # fmt: skip
    rollouts = [pq.read_table(file, columns=columns).to_pydict() for file in files]
    return [
        (repeatable(row), table)
        for row, table in zip(read_metrics(run / "metrics.jsonl"), rollouts, strict=True)
    ]
