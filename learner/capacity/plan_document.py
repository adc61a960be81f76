"""The plan document of `learner.plan --json`: what a deployment asks a cluster for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from actors.checkpoints.loading import count_parameters
from cluster.errors import ConfigError
from cluster.roles import FleetPlan, Role
from learner.capacity.gpus import memory_of, of_sampler, pack, processes
from learner.capacity.storage import checkpoint_bytes, store_need
from learner.capacity.workload import Models
from learner.config import RunConfig, dotted, to_dict
from learner.evaluation.held_out import GROUP
from learner.fleet_plan import fleet_plan
from rewards.config import RewardServerConfig
from rewards.networks.features_check import feature_dim
from rewards.preflight import server_memory

VERSION = 1
PROCESS = 1e9  # bytes of Python with torch and Ray: 2.3 GiB were measured of six that share pages
CUDA_PROCESS = 3e9  # with CUDA's libraries; assumed, not measured
MATRICES = 8  # D x D, float64, of the moments server: sums, decomposition, its workspaces
JUDGED = 28_600  # bytes an evaluated image, measured in tests.bench.evaluation (1.33 GiB of 50,000)
CHECKPOINT_COPY = 12  # bytes a parameter: weights and AdamW's averages, written by a thread
LOADED = 4  # bytes a parameter of a file of weights that is being read
DRIVER = "driver"
POOLS = "reward_pools."
LABELS = ".labels."
"""In the dotted name of a label that a role's nodes must have."""


def document(config: RunConfig, preset: str, base: RunConfig, models: Models) -> dict[str, Any]:
    """Workers and sizes of a run, as JSON values. What it is predicted to take is the caller's.

    Args:
        base: the preset's configuration; what differs from it becomes arguments.

    Raises:
        ConfigError: pools of reward servers differ from the preset's.
    """
    if pools := pools_to_write(config, base):
        raise ConfigError(
            f"preset {preset}: the plan gives its pools other servers or GPUs, for which there are "
            f"no options: write {pools} into the preset, a YAML file"
        )
    plan = fleet_plan(config)
    gpus = pack(processes(config, models.policy, models.tokenizer))
    return {
        "version": VERSION,
        "preset": preset,
        "gpus": len(gpus),
        "arguments": ["--preset", preset, *arguments(config, base)],
        "roles": [*(_role(role, plan, config, models) for role in plan.roles), _driver(config)],
        "object_store_bytes": store_need(config).total,
        "checkpoint_bytes": checkpoint_bytes(config),
    }


def arguments(config: RunConfig, base: RunConfig) -> list[str]:
    """Flags of learner.run that make `config` of `base`, but for `pools_to_write`."""
    wanted, there = dotted(to_dict(config)), dotted(to_dict(base))
    changed = [name for name, value in wanted.items() if there.get(name) != value]
    changed = [name for name in changed if not name.startswith(POOLS)]
    plain = [word for name in changed if LABELS not in name for word in _flag(name, wanted[name])]
    labels: dict[str, list[str]] = {}
    for name in wanted:  # one flag names all labels of a role
        role, mark, key = name.partition(LABELS)
        if mark and any(each.startswith(role + mark) for each in changed):
            labels.setdefault(role, []).append(f"{key}={wanted[name]}")
    return plain + [word for role, given in labels.items() for word in (f"--{role}.labels", *given)]


def pools_to_write(config: RunConfig, base: RunConfig) -> str:
    """What a preset must say of its pools to be `config`, as one line of YAML; empty if it does.
    Pools have no flags, since their names are the user's."""
    wanted, there = to_dict(config)["reward_pools"], to_dict(base)["reward_pools"]
    changed = {
        name: {key: value for key, value in pool.items() if there.get(name, {}).get(key) != value}
        for name, pool in wanted.items()
    }
    changed = {name: pool for name, pool in changed.items() if pool}
    if not changed:
        return ""
    text = yaml.safe_dump(changed, default_flow_style=True, width=1000)
    return f"reward_pools: {text.strip()}"


def _flag(name: str, value: Any) -> Iterator[str]:
    *path, last = name.replace("_", "-").split(".")
    if isinstance(value, bool):
        yield f"--{'.'.join([*path, last if value else f'no-{last}'])}"
        return
    yield f"--{'.'.join([*path, last])}"
    yield from map(str, value if isinstance(value, list | tuple) else [value])


def _role(role: Role, plan: FleetPlan, config: RunConfig, models: Models) -> dict[str, Any]:
    asked, scaled = role.resources, role.autoscale
    return {
        "name": role.name,
        "count": role.count,
        "min": scaled.bounded(1) if scaled.on else role.count,
        "max": role.max_count,
        "num_cpus": float(asked.num_cpus or asked.num_threads),
        "num_gpus": asked.num_gpus,
        "memory_bytes": round(host_memory(role, plan, config, models)),
        "labels": dict(asked.labels),
        "accelerator_type": asked.accelerator_type,
    }


def _driver(config: RunConfig) -> dict[str, Any]:
    images = max(config.evaluation.num_images, GROUP)
    return {
        "name": DRIVER,
        "count": 1,
        "min": 1,
        "max": 1,
        "num_cpus": 1.0,
        "num_gpus": 0.0,
        "memory_bytes": round(PROCESS + 2 * JUDGED * images),  # real images beside generated ones
        "labels": {},
        "accelerator_type": "",
    }


def host_memory(role: Role, plan: FleetPlan, config: RunConfig, models: Models) -> float:
    """Bytes of main memory of one worker, without the object store: an estimate, from above."""
    policy, tokenizer = models.policy, models.tokenizer
    parameters = count_parameters(policy)
    on_gpu = role.resources.num_gpus > 0
    process = CUDA_PROCESS if on_gpu else PROCESS
    if role is plan.moments_server:
        side = policy.grid * tokenizer.downsampling
        spaces = config.rewards.spaces().values()
        dims = [feature_dim(each.features, side) for each in spaces]
        return process + sum(MATRICES * 8 * dim**2 for dim in dims)
    if role is plan.learner:
        computes = 0.0 if on_gpu else memory_of(config, policy).total
        return process + computes + (LOADED + CHECKPOINT_COPY) * parameters
    if role is plan.sampler:
        computes = 0.0 if on_gpu else of_sampler(config, policy, tokenizer)
        return process + computes + LOADED * (parameters + count_parameters(tokenizer))
    assert isinstance(role.config, RewardServerConfig)
    features = role is plan.feature_server("rewards")
    return process + server_memory(role.config, features=features).total


def with_prediction(
    found: Mapping[str, Any], gpu: str, seconds: float | None, images: int, bottleneck: str
) -> dict[str, Any]:
    """A document with what is predicted of an iteration of so many images.

    Args:
        seconds: None: not known.
    """
    rate = images / seconds if seconds else None
    return {
        **found,
        "gpu": gpu,
        "iteration_s": seconds,
        "images_per_s": rate,
        "bottleneck": bottleneck,
    }


def bottleneck_of(phases: Sequence[tuple[str, float]]) -> str:
    """The longest of some named times; empty without any."""
    return max(phases, key=lambda each: each[1])[0] if phases else ""
