"""Seconds that each piece of an iteration takes its worker, and the bytes that it sends: from the
arithmetic of models and cards, from a run that was recorded, or from a file."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actors.checkpoints.loading import count_parameters
from actors.checkpoints.sources import planned_policy, planned_tokenizer
from cluster.errors import ConfigError, DataError, nearest
from cluster.io.run_layout import TRACE
from cluster.io.starts import START, read_events
from cluster.io.strict_json import MALFORMED
from cluster.roles import FleetPlan
from learner.capacity import run_spans
from learner.capacity.cards import Card
from learner.capacity.gpus import WIDTH, pack, processes
from learner.capacity.run_spans import Device, Measured
from learner.capacity.seconds import Phase
from learner.capacity.workload import Models, phases_of
from learner.config import RunConfig
from learner.fleet_plan import fleet_plan
from learner.runs.run_dir import RunDirectory
from rewards.networks.features_check import feature_dim

DRIVER = 1.8e-3  # s of CPU a group: tests.bench.pipeline, 2026-11-24
RECORD = 3.6e-5  # s a rollout: tests.bench.iteration, 2026-11-29 (5.8 ms for 160)
NUMBERS = 12  # bytes of a token's number, logprob and entropy
SECTION = "service_times"
"""Key of these in the JSON of a bench."""


@dataclass(frozen=True, kw_only=True)
class ServiceTimes:
    """Seconds of work, each as its worker takes it alone on its CPU or GPU, and bytes."""

    sample: float
    """A group's tokens."""
    images: float
    """A group's images."""
    score: Mapping[str, float]
    """Pool of reward servers, by its role's name -> a group's scores and features there."""
    commit: float
    """An iteration, by the moments server."""
    learn: float
    """An iteration, by each learner."""
    publish: float
    """A version, by the learner."""
    load: float
    """A version, by each sampler."""
    record: float
    """An iteration, by the driver."""
    driver: float
    """The driver's CPU, a group."""
    variation: Mapping[str, float] = field(default_factory=dict)
    """Phase (a name of this class) -> standard deviation over mean; 0 where it has none."""
    image_bytes: float
    """A group's images."""
    rollout_bytes: float
    """A group's tokens, logprobs, entropies."""
    snapshot_bytes: float
    """The weights of one version."""

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            numbers = value.items() if isinstance(value, Mapping) else [("", value)]
            for key, number in numbers:
                name = f"{item.name}.{key}" if key else item.name
                if isinstance(number, bool) or not isinstance(number, int | float):
                    raise ConfigError(f"{name} must be a number, found {number!r}")
                if not 0 <= number < math.inf:
                    raise ConfigError(f"{name} must be finite and >= 0, found {number!r}")

    def varies(self, phase: str) -> float:
        """Standard deviation of a phase's seconds over their mean."""
        return self.variation.get(phase, 0.0)


def from_arithmetic(config: RunConfig, models: Models, card: Card) -> ServiceTimes:
    """By the arithmetic of `learner.capacity.seconds`. Its phases are those of the worker with the
    largest part of an iteration.

    Raises:
        ConfigError: a role computes on a CPU, of which no card's figures speak.
    """
    plan = fleet_plan(config)
    cpu = [role.name for role in plan.roles if role.name != "moments-server"]
    cpu = [name for name in cpu if not _role(plan, name).resources.num_gpus]
    if cpu:
        raise ConfigError(
            f"{', '.join(cpu)} would compute on CPUs (num_gpus 0), whose speed is in no table: "
            "measure it, with --measured and a run's directory"
        )
    phases, _ = phases_of(config, models, card)

    def seconds(name: str, role: str = "") -> float:
        return sum(p.seconds for p in phases if p.name == name and role in ("", p.role))

    groups = -(-config.groups_per_iteration // config.num_samplers)
    served = {role.name: config.groups_per_iteration / role.count for role in plan.servers}
    return ServiceTimes(
        sample=seconds("sample") / groups,
        images=seconds("images") / groups,
        score={name: _scoring(phases, name) / count for name, count in served.items()},
        commit=seconds("moments"),
        learn=seconds("learn"),
        publish=seconds("publish"),
        load=seconds("load"),
        record=RECORD * config.groups_per_iteration * config.rollouts_per_group,
        driver=DRIVER,
        **sizes(config, models),
    )


def _role(plan: FleetPlan, name: str) -> Any:
    return next(role for role in plan.roles if role.name == name)


def _scoring(phases: list[Phase], pool: str) -> float:
    return sum(each.seconds for each in phases if each.role == pool)


def sizes(config: RunConfig, models: Models) -> dict[str, Any]:
    """The bytes of `ServiceTimes`."""
    policy = models.policy
    side = policy.grid * models.tokenizer.downsampling
    width = WIDTH[config.weights.wire(config.sampler.dtype)]
    return {
        "image_bytes": float(config.rollouts_per_group * side * side * 3),
        "rollout_bytes": float(config.rollouts_per_group * policy.num_tokens * NUMBERS),
        "snapshot_bytes": float(width * count_parameters(policy)),
    }


def score_bytes(config: RunConfig, models: Models) -> float:
    """Bytes of a group's features, nearly all of what a reward server answers."""
    side = models.policy.grid * models.tokenizer.downsampling
    spaces = config.rewards.spaces().values()
    dims = sum(feature_dim(each.features, side) for each in spaces)
    return float(config.rollouts_per_group * dims * 4)


def from_measured(path: Path) -> ServiceTimes:
    """From a run's directory (trace.json, starts.jsonl), or a JSON file with the fields of
    `ServiceTimes`, by themselves or under `service_times`.

    Raises:
        ConfigError, DataError: neither, damaged, or too short a run.
    """
    if path.is_file():
        return _from_file(path)
    run = RunDirectory.existing(path)
    config = run.read_config()
    models = Models(
        planned_policy(config.policy.source()), planned_tokenizer(config.tokenizer.source())
    )
    found = run_spans.measure(run.path / TRACE, devices(run, config, models))
    return _assembled(found, config, models)


def _from_file(path: Path) -> ServiceTimes:
    try:
        values = json.loads(path.read_bytes())
        values = values.get(SECTION, values)
        given = {str(name): value for name, value in values.items()}
    except (OSError, *MALFORMED) as error:
        raise ConfigError(
            f"{path}: expected a JSON object of service times, found: {error}"
        ) from None
    fields = {item.name: item for item in dataclasses.fields(ServiceTimes)}
    for name in given:
        if name not in fields:
            close = nearest(name, fields, cutoff=0.5)
            hint = f"did you mean {close!r}?" if close else f"there are {', '.join(fields)}"
            raise ConfigError(f"{path}: unknown field {name!r}: {hint}")
    missing = [n for n, f in fields.items() if n not in given and n != "variation"]
    if missing:
        raise ConfigError(f"{path}: lacks {', '.join(missing)}")
    for name in ("score", "variation"):
        if not isinstance(given.get(name, {}), dict):
            raise ConfigError(f"{path}: {name} must be an object of numbers, found {given[name]!r}")
    try:
        return ServiceTimes(**given)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def devices(run: RunDirectory, config: RunConfig, models: Models) -> list[Device]:
    """What the workers of a run shared: the cores, where all were on one machine, and its GPUs.

    Raises:
        DataError: the run did not record its machine.
    """
    starts = [event for event in read_events(run.path) if event["event"] == START]
    if not starts:
        raise DataError(f"{run.path} does not say on which machine it ran (starts.jsonl)")
    hardware, plan = starts[-1]["hardware"], fleet_plan(config)
    found = []
    if hardware["hosts"] == 1:
        threads = {r.name: float(r.resources.num_threads) for r in plan.roles}
        on_gpus = {role.name for role in plan.roles if role.resources.num_gpus}
        cpu = {name: count for name, count in threads.items() if name not in on_gpus}
        found.append(Device(capacity=float(hardware["cores"]), demands=cpu | {"driver": 1.0}))
        gpus = pack(processes(config, models.policy, models.tokenizer))
        found += [Device(capacity=1.0, demands={p.name: 1.0 for p in g.processes}) for g in gpus]
    return found


def _assembled(
    found: Mapping[tuple[str, str], Measured], config: RunConfig, models: Models
) -> ServiceTimes:
    groups = config.groups_per_iteration
    none = Measured(0.0, 0.0, 1.0)

    def of(role: str, phase: str) -> Measured:
        return found.get((role, phase), none)

    if missing := [p for p in ("sample", "decode") if ("sampler", p) not in found]:
        raise DataError(f"the trace has no {' and no '.join(missing)} of samplers")
    pools = [role.name for role in fleet_plan(config).servers]
    load, learn = of("sampler", "load"), of("learner", "learn")
    phases = {
        "sample": of("sampler", "sample"),
        "images": of("sampler", "decode"),
        "commit": of("moments-server", "moments"),
        "learn": learn,
        "publish": of("learner", "pack"),
        "load": load,
        "record": of("driver", "record"),
    }
    return ServiceTimes(
        sample=phases["sample"].seconds / groups,
        images=phases["images"].seconds / groups,
        score={pool: of(pool, "score").seconds / groups for pool in pools},
        commit=phases["commit"].seconds,
        learn=learn.seconds / learn.workers,
        publish=phases["publish"].seconds / phases["publish"].workers,
        load=load.seconds / load.workers,
        record=phases["record"].seconds,
        driver=DRIVER,
        variation={name: each.variation for name, each in phases.items()}
        | {"score": max((of(pool, "score").variation for pool in pools), default=0.0)},
        **sizes(config, models),
    )
