"""GPU memory of a run, computed before it starts: `python -m learner.plan --preset NAME`."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    import sys

    from cluster.program.start import run_command

    sys.exit(run_command("learner.plan"))

import bisect
import dataclasses
import sys
from dataclasses import dataclass, field
from typing import Annotated

import tyro
from pydantic import Field
from rich.table import Table

from actors.checkpoints.loading import count_parameters
from actors.checkpoints.sources import planned_policy, planned_tokenizer
from actors.models.base import PolicyArchitecture
from cluster.errors import ConfigError, TesseraError
from cluster.program.console import REFUSED, make_console
from cluster.program.help import answer_help, asks_help
from cluster.program.invocation import command_of
from learner.capacity.gpus import Gpu, memory_of, of_sampler, pack, processes, rollouts_of
from learner.capacity.memory import LearnerMemory
from learner.config import DEFAULT_PRESET, RunConfig, load_preset, to_dict, validate

MODULE = "learner.plan"
ABOUT = (
    "GPU memory of a run: of the learner in parts, and of every process on each GPU. Takes the "
    "options of learner.run."
)
COMMON = {
    "what to plan": ("--preset", "--gpu-memory-gb"),
    "workers": ("--num-samplers", "--num-reward-servers", "--num-learners", "--sampler.num-gpus",
                "--reward.num-gpus", "--learner.num-gpus"),
    "what takes memory": ("--rollouts-per-group", "--learner.microbatch", "--learner.precision",
                          "--learner.checkpointing", "--sampler.dtype", "--loss.kl-coef"),
}  # fmt: skip
"""What --help shows; --help-all shows every option."""
GB = 1e9
DEFAULT_GPU_GB = 80.0
SPARE = 0.1  # share of a GPU that is left to the allocator and to kernels' workspaces


@dataclass(frozen=True, kw_only=True)
class Command:
    """Options beside those of the run."""

    preset: Annotated[str, tyro.conf.arg(aliases=("-p",))] = DEFAULT_PRESET
    """Shipped preset by name, or a YAML file by path."""
    gpu_memory_gb: Annotated[float, Field(ge=0)] = 0.0
    """Memory of one GPU, GB; 0: of this machine's first one, or 80 without one."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """GPU memory of a run."""

    command: Annotated[Command, tyro.conf.arg(name="")] = field(default_factory=Command)
    run: Annotated[RunConfig, tyro.conf.arg(name="")] = field(default_factory=RunConfig)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    try:
        command, config = parse(arguments)
        policy, tokenizer = config.policy, config.tokenizer
        architecture = planned_policy(policy.source())
        codes = planned_tokenizer(tokenizer.source())
        gpus = pack(processes(config, architecture, codes))
        sampler = of_sampler(config, architecture, codes)
    except TesseraError as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED
    size = (command.gpu_memory_gb or detected_gb()) * GB
    show(config, architecture, sampler, size, beside_learner(gpus, memory_of(config, architecture)))
    show_gpus(gpus, size)
    return 0


def parse(arguments: list[str] | None) -> tuple[Command, RunConfig]:
    """Raises ConfigError for impossible values, SystemExit for --help and unknown options."""
    command, _ = tyro.cli(Command, args=arguments, return_unknown_args=True, add_help=False)
    base = load_preset(command.preset)
    if asks_help(arguments):
        arguments = answer_help(arguments, command_of(MODULE), ABOUT, COMMON, Command(), base)
    default = Arguments(command=command, run=base)
    try:
        parsed = tyro.cli(Arguments, args=arguments, default=default, prog=command_of(MODULE))
    except ValueError as error:  # of a dataclass's own check
        raise ConfigError(f"command line: {error}") from None
    if parsed.command.gpu_memory_gb < 0:
        raise ConfigError(f"--gpu-memory-gb must be >= 0, found {parsed.command.gpu_memory_gb:g}")
    return parsed.command, validate(to_dict(parsed.run), "command line")


def beside_learner(gpus: list[Gpu], learner: LearnerMemory) -> float:
    """Bytes on a learner's GPU beside its own memory: contexts, other processes."""
    name = "learner"
    shared = [gpu for gpu in gpus if any(p.name.startswith(name) for p in gpu.processes)]
    return max((gpu.memory - learner.total for gpu in shared), default=0.0)


def detected_gb() -> float:
    """Memory of this machine's first GPU, or the default."""
    import torch

    if not torch.cuda.is_available():
        return DEFAULT_GPU_GB
    return torch.cuda.get_device_properties(0).total_memory / GB


def largest_microbatch(config: RunConfig, architecture: PolicyArchitecture, limit: float) -> int:
    """Most rollouts of one pass within `limit` bytes; 0 if not even one fits."""
    sizes = range(1, rollouts_of(config) + 1)
    return bisect.bisect_right(
        sizes, limit, key=lambda size: memory_of(config, architecture, size).total
    )


def show(
    config: RunConfig,
    architecture: PolicyArchitecture,
    sampler: float,
    gpu: float,
    beside: float,
) -> None:
    """Print the learner's parts, and the largest microbatch.

    Args:
        beside: of `beside_learner`.
    """
    found, usable = memory_of(config, architecture), gpu * (1 - SPARE) - beside
    size = count_parameters(architecture) / 1e6
    table = Table(title=f"{size:.0f} M parameters, {architecture.num_tokens} tokens")
    table.add_column("one learner")
    table.add_column("GB", justify="right")
    for name, value in dataclasses.asdict(found).items():
        table.add_row(name, f"{value / GB:.2f}")
    table.add_row("together", f"{found.total / GB:.2f}", end_section=True)
    table.add_row("one sampler, with images", f"{sampler / GB:.2f}")
    make_console().print(table)
    fits = "fits" if found.total <= usable else "does not fit"
    others = f", {beside / GB:.1f} GB beside it" if beside else ""
    largest = largest_microbatch(config, architecture, usable)
    print(
        f"The learner {fits} {gpu / GB:g} GB ({SPARE:.0%} kept free{others}); the largest "
        f"learner.microbatch that does: {largest or 'none'}"
    )


def show_gpus(gpus: list[Gpu], size: float) -> None:
    """Print the processes on each GPU, and whether they fit."""
    if not gpus:
        print("No process asks for a GPU (--learner.num-gpus, --sampler.num-gpus, ...).")
        return
    table = Table(title=f"{len(gpus)} GPU{'s' * (len(gpus) > 1)} of {size / GB:g} GB")
    table.add_column("GPU")
    for heading in ("share", "GB"):
        table.add_column(heading, justify="right")
    for number, gpu in enumerate(gpus):
        for process in gpu.processes:
            share = f"{process.share:g}"
            table.add_row(f"{number}: {process.name}", share, f"{process.memory / GB:.1f}")
        fits = "" if gpu.memory <= size * (1 - SPARE) else ", does not fit"
        table.add_row(f"   together{fits}", "", f"{gpu.memory / GB:.1f}", end_section=True)
    make_console().print(table)
    unknown = {name for gpu in gpus for process in gpu.processes for name in process.unknown}
    if unknown:
        print(f"Not counted, since their sizes are not known: {', '.join(sorted(unknown))}")
    crowded = [str(at) for at, gpu in enumerate(gpus) if gpu.memory > size * (1 - SPARE)]
    if crowded:
        print(
            f"GPU {', '.join(crowded)} does not fit ({SPARE:.0%} kept free): give its processes "
            "larger shares (num_gpus), so that fewer are together, or lower learner.microbatch"
        )
