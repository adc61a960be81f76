"""Steps of a learner on stored rollouts, and their numbers beside the recorded ones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from cluster.errors import CheckpointError, ConfigError, DataError
from cluster.io.run_layout import POLICY_FILE, step_name, steps_in
from cluster.io.strict_json import number
from cluster.model_files.tensors import read_tensors
from cluster.weights import open_snapshot
from learner.checkpoints.checkpoint import Checkpoint, verify
from learner.checkpoints.resume import fields_of
from learner.config import RunConfig, to_dict, validate
from learner.fleet_plan import fleet_plan
from learner.grpo.entropy import EntropyConfig
from learner.grpo.loss import LossConfig
from learner.monitoring.metrics import read_metrics
from learner.rollouts.selection import Numbers
from learner.rollouts.stored_batches import StoredBatches
from learner.runs.records import ITERATION
from learner.runs.run_dir import RunDirectory
from learner.training.learner import Learner
from learner.training.optimizer import OptimizerConfig
from learner.training.real_tokens import RealTokensConfig
from learner.training.skips import GuardsConfig

BASE_ENTROPY = "policy/base_entropy"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The run's settings that a learner reads."""

    learner: OptimizerConfig = field(default_factory=OptimizerConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    entropy: EntropyConfig = field(default_factory=EntropyConfig)
    real: RealTokensConfig = field(default_factory=RealTokensConfig)
    guards: GuardsConfig = field(default_factory=GuardsConfig)

    @classmethod
    def of(cls, config: RunConfig) -> Settings:
        return cls(**{name: getattr(config, name) for name in cls.__dataclass_fields__})

    def put_into(self, config: RunConfig) -> RunConfig:
        """The run's configuration with these settings.

        Raises:
            ConfigError: they are impossible together.
        """
        return validate(to_dict(replace(config, **vars(self))), "command line")


@dataclass(frozen=True)
class Replay:
    """What is replayed; iterations count from 0 here, as the learner counts them."""

    run: RunDirectory
    config: RunConfig
    """The run's, with other settings where some are asked for."""
    changed: tuple[str, ...]
    """Names of these."""
    batches: StoredBatches
    records: Mapping[int, Mapping[str, Any]]
    """Iteration -> its line of metrics.jsonl."""
    start: Checkpoint | None
    """None: the base policy."""
    last: int
    """The last iteration."""

    @classmethod
    def prepare(
        cls, run: RunDirectory, settings: Settings, iterations: str, from_step: int | None
    ) -> Replay:
        """Find start, rollouts and records.

        Args:
            iterations: ranges of their numbers in the records; empty: all.
            from_step: of the checkpoint to start from, 0: the base policy; None: the newest
                checkpoint before the first of `iterations`.

        Raises:
            ConfigError, DataError, CheckpointError: impossible settings, or what is missing.
        """
        recorded = run.read_config()
        config = settings.put_into(recorded)
        before, after = fields_of(recorded), fields_of(config)
        batches = StoredBatches(run, config)
        records = {row[ITERATION] - batches.base: row for row in read_metrics(run.metrics)}
        kept = [iteration for iteration in batches.kept() if iteration in records]
        if not kept:
            raise DataError(
                f"{run.path} keeps no rollouts with their metrics: a run writes them after each "
                "iteration, unless --output.rollouts is off"
            )
        steps = [0, *steps_in(run.checkpoints)]
        begin, last = _range(kept, steps, batches.base, iterations, from_step)
        return cls(
            run=run,
            config=config,
            changed=tuple(name for name, value in after.items() if value != before[name]),
            batches=batches,
            records=records,
            start=verify(run.checkpoints / step_name(begin)) if begin else None,
            last=last,
        )

    @property
    def first(self) -> int:
        """The first iteration."""
        return self.start.step if self.start else 0

    @property
    def not_promised(self) -> str:
        """Why replayed numbers need not equal the recorded ones; empty if they must, on the same
        kind of machine."""
        config = self.config
        if self.changed:
            return (
                "other settings than the run's cannot give its numbers: leave out "
                f"{', '.join(self.changed)}"
            )
        if config.num_learners > 1:
            return (
                f"the run's {config.num_learners} learners added in another order than one does, "
                "so numbers differ in their last bits"
            )
        if config.learner.num_gpus and not config.reproducible:
            return "the run was on a GPU without --reproducible, which adds in no fixed order"
        return ""

    def __iter__(self) -> Iterator[Replayed]:
        """Take the steps, one after the other."""
        role = fleet_plan(self.config).learner
        config = replace(role.config, wire_dtype="float32")  # of the weights that are compared
        learner = Learner(config, name=role.worker_name(0))
        if self.start is not None:
            learner.restore(self.start.path)
        elif (entropy := self.records.get(0, {}).get(BASE_ENTROPY)) is not None:
            learner.start(entropy)
        for iteration in range(self.first, self.last + 1):
            found = learner.step(self.batches(iteration)).metrics
            record = self.records[iteration]
            yield Replayed(
                iteration + self.batches.base,
                {n: (number(record[n]), _finite(v)) for n, v in found.items() if n in record},
                tuple(name for name in found if name not in record),
                _weights_off(self.run, iteration + 1, learner),
            )


@dataclass(frozen=True)
class Replayed:
    """Numbers of one iteration, recorded and replayed."""

    number: int
    """Of the iteration, in the records."""
    values: Mapping[str, tuple[float, float]]
    """Metric -> recorded, replayed; NaN where not finite."""
    unrecorded: tuple[str, ...]
    """Metrics that the record lacks, of an early version or without some setting."""
    weights: float | None
    """Largest difference from the checkpoint after the iteration; None: there is none."""

    @property
    def differing(self) -> tuple[str, ...]:
        return tuple(name for name, pair in self.values.items() if not _same(*pair))

    @property
    def comparable(self) -> bool:
        """Whether the run kept a number or the weights of this iteration."""
        return bool(self.values) or self.weights is not None

    @property
    def equal(self) -> bool:
        """Whether something can be compared, and all of it is equal, bit for bit."""
        return self.comparable and not self.differing and not self.weights


def _same(recorded: float, replayed: float) -> bool:
    return recorded == replayed or (math.isnan(recorded) and math.isnan(replayed))


def _finite(value: float) -> float:
    """As records keep a number: NaN where it is not finite."""
    return value if math.isfinite(value) else math.nan


def _range(
    kept: list[int], steps: list[int], base: int, iterations: str, from_step: int | None
) -> tuple[int, int]:
    """The first and the last iteration.

    Args:
        kept: iterations that can be replayed.
        steps: of checkpoints, and 0.
        base: number of the first iteration in the records.

    Raises:
        ConfigError: no such checkpoint, or nothing to replay.
        DataError: rollouts between the two are missing.
    """
    numbers = Numbers.parse(iterations or "0-")
    chosen = [iteration for iteration in kept if iteration + base in numbers]
    if from_step is not None and from_step not in steps:
        raise ConfigError(f"--from-step {from_step}: there are {', '.join(map(str, steps))}")
    before = chosen[0] if chosen and iterations else 0
    begin = max(step for step in steps if step <= before) if from_step is None else from_step
    chosen = [iteration for iteration in chosen if iteration >= begin]
    if not chosen:
        raise ConfigError(
            f"nothing to replay: the run keeps iterations {kept[0] + base} to {kept[-1] + base}, "
            f"--iterations is {iterations or 'all'}, and the start is after {begin} of them"
        )
    if gaps := sorted(set(range(begin, chosen[-1] + 1)) - set(kept)):
        raise DataError(
            f"the rollouts of iteration {gaps[0] + base} are not kept, and no later step is right "
            f"without theirs: start from a later checkpoint (--from-step; {steps} are there)"
        )
    return begin, chosen[-1]


def _weights_off(run: RunDirectory, step: int, learner: Learner) -> float | None:
    """Largest difference between the learner's weights and those of a checkpoint; None if there is
    none of this step."""
    file = run.checkpoints / step_name(step) / POLICY_FILE
    try:
        kept = read_tensors(str(file)) if file.is_file() else {}
    except CheckpointError:  # an active run removes old ones
        kept = {}
    if not kept:
        return None
    own = open_snapshot(learner.snapshot()).tensors
    off = [(own[name].double() - kept[name].double()).abs().max() for name in own]
    return float(torch.stack(off).max())  # NaN where one is, unlike Python's max
