"""What a run takes of its GPUs, before it is started: `python -m learner.plan --preset NAME`.

Arithmetic alone (`learner.memory`): no GPU, no weights. Scorers are not counted.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from typing import Annotated

import tyro
from rich.table import Table

from actors.models.loading import count_parameters
from actors.models.sources import PolicyArchitecture, Source, planned_policy
from cluster.console import REFUSED, make_console
from cluster.errors import TesseraError
from cluster.invocation import command_of
from learner.config import DEFAULT_PRESET, RunConfig, load_preset
from learner.memory import LearnerMemory, learner_memory, sampler_memory

GB = 1e9
SPARE = 0.1  # share of a GPU that is left to the allocator and to kernels' workspaces


@dataclass(frozen=True, kw_only=True)
class Command:
    """Memory of learner and sampler under a preset."""

    preset: Annotated[str, tyro.conf.arg(aliases=("-p",))] = DEFAULT_PRESET
    """Shipped preset by name, or a YAML file by path."""
    gpu_memory_gb: float = 80.0
    """Memory of one GPU, GB."""
    num_learners: int = 0
    """Learners that share the work; 0 is the preset's number."""


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    command = tyro.cli(Command, args=arguments, prog=command_of("learner.plan"))
    try:
        config = load_preset(command.preset)
        if command.num_learners:
            config = dataclasses.replace(config, num_learners=command.num_learners)
        source = config.policy
        architecture = planned_policy(Source.of(source.checkpoint, source.architecture, source.ema))
    except TesseraError as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED
    show(config, architecture, command.gpu_memory_gb * GB)
    return 0


def memory_of(
    config: RunConfig, architecture: PolicyArchitecture, microbatch: int = 0
) -> LearnerMemory:
    """Of a run's learner; microbatch 0 is the configuration's."""
    options = config.learner
    return learner_memory(
        architecture,
        microbatch=microbatch or min(options.microbatch, rollouts_of(config)),
        precision=options.precision,
        checkpointing=options.checkpointing,
        reference=config.loss.kl_coef > 0 and options.reference_device == "learner",
        learners=config.num_learners,
        guided=config.sampling.learned().guided_sampling,
    )


def rollouts_of(config: RunConfig) -> int:
    """Most rollouts of an iteration that one learner has."""
    return -(-config.groups_per_iteration * config.rollouts_per_group // config.num_learners)


def largest_microbatch(config: RunConfig, architecture: PolicyArchitecture, limit: float) -> int:
    """Most rollouts of one pass that fit `limit` bytes; 0 if not even one does."""
    found = 0
    while found < rollouts_of(config):
        if memory_of(config, architecture, found + 1).total > limit:
            break
        found += 1
    return found


def show(config: RunConfig, architecture: PolicyArchitecture, gpu: float) -> None:
    """Print the plan."""
    found, usable = memory_of(config, architecture), gpu * (1 - SPARE)
    size = count_parameters(architecture) / 1e6
    table = Table(title=f"{size:.0f} M parameters, {architecture.num_tokens} tokens")
    table.add_column("one learner")
    table.add_column("GB", justify="right")
    for name, value in dataclasses.asdict(found).items():
        table.add_row(name, f"{value / GB:.2f}")
    table.add_row("together", f"{found.total / GB:.2f}", end_section=True)
    sampler = sampler_memory(
        architecture,
        rollouts=config.rollouts_per_group,
        dtype=config.sampler.dtype,
        guided=config.sampling.guided_sampling,
        max_groups=config.sampler.max_groups,
    )
    table.add_row("one sampler, but for images", f"{sampler / GB:.2f}")
    make_console().print(table)
    fits = "fits" if found.total <= usable else "does not fit"
    largest = largest_microbatch(config, architecture, usable)
    print(
        f"The learner {fits} {gpu / GB:g} GB ({SPARE:.0%} kept free); the largest "
        f"learner.microbatch that does: {largest or 'none'}"
    )


if __name__ == "__main__":
    from learner.plan import main as imported_main

    sys.exit(imported_main())
