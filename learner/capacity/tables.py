"""The processes on each GPU, as `learner.plan` prints them."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from cluster.program.console import make_console
from learner.capacity.budget import Budget
from learner.capacity.cards import Card
from learner.capacity.gpus import SPARE, Process

GB = 1e9


def show_gpus(budget: Budget, card: Card, shares: Mapping[str, float]) -> None:
    """Print the processes on each GPU, and whether they fit.

    Args:
        shares: with which they would; empty if none are known.
    """
    gpus, size = budget.gpus, card.memory
    if not gpus:
        print("No process asks for a GPU (--learner.num-gpus, --sampler.num-gpus, ...).")
        return
    table = Table(title=f"{len(gpus)} GPU{'s' * (len(gpus) > 1)} of {size / GB:.4g} GB")
    table.add_column("GPU")
    for heading in ("share", "GB of it", "GB needed"):
        table.add_column(heading, justify="right")
    for number, gpu in enumerate(gpus):
        for process in gpu.processes:
            name = f"{number}: {process.name}{'' if process.fits(size) else ', does not fit'}"
            limit = f"{min(process.share, 1.0) * size / GB:.1f}"
            table.add_row(name, f"{process.share:g}", limit, f"{process.memory / GB:.1f}")
        table.add_row("   together", "", "", f"{gpu.memory / GB:.1f}", end_section=True)
    make_console().print(table)
    unknown = {name for gpu in gpus for process in gpu.processes for name in process.unknown}
    if unknown:
        print(f"Not counted, since their sizes are not known: {', '.join(sorted(unknown))}")
    if budget.fits:
        return
    crowded = [process for gpu in gpus for process in gpu.processes if not process.fits(size)]
    remedy = ", ".join(f"--{name.replace('_', '-')} {share:g}" for name, share in shares.items())
    found = {process.name: remedy or advice(process) for process in crowded}
    print(
        f"Does not fit (a share of a GPU is that part of its memory, {SPARE:.0%} of it kept free): "
        + "; ".join(f"{name}: {what}" for name, what in found.items())
    )


def advice(process: Process) -> str:
    """What makes a process smaller, or its part of a GPU larger."""
    smaller = {
        "learner": "--learner.checkpointing, a lower --learner.microbatch, --learner.lora.rank",
        "sampler": "a lower --sampler.max-groups, --sampler.dtype bfloat16",
    }
    ways = ["a larger share (num_gpus)"] if process.share < 1 else []
    ways += [smaller[process.role]] if process.role in smaller else []
    return ", ".join([*ways, "or a card with more memory"])
