"""GPU memory and seconds of a run, by arithmetic before it starts: `python -m learner.plan --preset
NAME`."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    import sys

    from cluster.program.start import run_command

    sys.exit(run_command("learner.plan"))

import bisect
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.table import Table

from actors.checkpoints.loading import count_parameters
from actors.checkpoints.sources import planned_policy, planned_tokenizer
from actors.models.base import PolicyArchitecture
from cluster.errors import ConfigError, TesseraError
from cluster.io.strict_json import dumps
from cluster.program.console import REFUSED, make_console
from cluster.program.gpu_memory import CONTEXT
from cluster.program.help import answer_help, asks_help
from cluster.program.invocation import command_of
from learner.capacity.budget import (
    Budget,
    Proposal,
    budget_of,
    fitting_shares,
    proposals,
    together,
)
from learner.capacity.cards import (
    DEFAULT_CARD,
    NETWORK,
    Card,
    card_named,
    key_of,
    recognised,
    this_gpu,
)
from learner.capacity.evaluation import EvaluationCost, evaluation_cost
from learner.capacity.gpus import SPARE, memory_of, of_sampler, rollouts_of
from learner.capacity.plan_document import (
    arguments,
    bottleneck_of,
    document,
    pools_to_write,
    with_prediction,
)
from learner.capacity.scale.as_configured import on_this_machine
from learner.capacity.scale.fewest import fewest_gpus
from learner.capacity.scale.iteration import Prediction
from learner.capacity.scale.split import Plan, Search, Site
from learner.capacity.scale.tables import (
    SIZES,
    show_costs,
    show_here,
    show_links,
    show_plan,
    show_split,
    show_staleness,
)
from learner.capacity.service_times import from_measured
from learner.capacity.tables import show_gpus
from learner.capacity.workload import Models
from learner.config import DEFAULT_PRESET, RunConfig, load_preset, to_dict, validate

MODULE = "learner.plan"
ABOUT = (
    "GPU memory of every process of a run, seconds of every phase of an iteration, and which other "
    "settings would be faster; by arithmetic. Takes the options of learner.run."
)
COMMON = {
    "what to plan": ("--preset", "--gpu", "--gpu-memory-gb", "--measured", "--json"),
    "a cluster": ("--gpus", "--gpus-per-node", "--link-gbit", "--scaling", "--price-per-gpu-hour"),
    "workers": ("--num-samplers", "--num-reward-servers", "--num-learners", "--sampler.num-gpus",
                "--reward.num-gpus", "--learner.num-gpus"),
    "what takes memory or time": ("--rollouts-per-group", "--sampler.max-groups", "--sampler.dtype",
                                  "--learner.microbatch", "--learner.precision",
                                  "--learner.checkpointing", "--loss.kl-coef",
                                  "--max-staleness"),
}  # fmt: skip
"""What --help shows; --help-all shows every option."""
GB = 1e9
ESTIMATE = "estimate by arithmetic, not measured on a GPU"
LEAST = {"gpu_memory_gb": 0, "gpus": 0, "gpus_per_node": 1, "link_gbit": 0, "price_per_gpu_hour": 0}
MOST = 1e6
AHEAD_TRIED = (0, 1, 2)  # values of max_staleness
SHOWN = 8  # settings that are proposed, at most
CONSEQUENCES = {
    "sampler.max_groups": "above 1, results depend on timing, and --reproducible refuses it",
    "max_staleness": "rollouts are so many updates old when they are learned from",
}


@dataclass(frozen=True, kw_only=True)
class Command:
    """Options beside those of the run."""

    preset: Annotated[str, tyro.conf.arg(aliases=("-p",))] = DEFAULT_PRESET
    """Shipped preset by name, or a YAML file by path."""
    gpu: str = ""
    """Kind of GPU: h200, h100, a100, l40s or 4090; empty: this machine's first one, or an h100
    without one."""
    gpu_memory_gb: float = 0.0
    """Memory of one GPU, GB; 0: of that kind."""
    gpus: int = 0
    """GPUs of a cluster, for which the best split is searched. 0: plan the settings as they are."""
    gpus_per_node: int = 8
    """GPUs of each node (with --gpus)."""
    link_gbit: float = 0.0
    """Gbit/s between nodes, one way (with --gpus); 0: an assumption by kind of GPU."""
    measured: str = ""
    """A run's directory, or a JSON file of `service_times`: its seconds replace the arithmetic."""
    scaling: Literal["strong", "weak"] = "strong"
    """Table of costs (with --gpus): strong keeps the groups of an iteration, weak those a GPU."""
    price_per_gpu_hour: float = 0.0
    """In any currency, for the table of costs."""
    json: bool = False
    """Print the plan document, one JSON object, for `cluster.deploy` and other programs."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """GPU memory and seconds of a run."""

    command: Annotated[Command, tyro.conf.arg(name="")] = field(default_factory=Command)
    run: Annotated[RunConfig, tyro.conf.arg(name="")] = field(default_factory=RunConfig)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    try:
        command, config = parse(arguments)
        card = card_of(command)
        models = Models(
            planned_policy(config.policy.source()), planned_tokenizer(config.tokenizer.source())
        )
        if command.gpus:
            return plan_cluster(command, config, models, card)
        budget, here = budget_of(config, models, card), None
        if command.measured:
            times = from_measured(Path(command.measured))
            here = on_this_machine(config, models, times)
        if command.json:
            print(dumps(as_document(command, config, models, budget, card, here), indent=2))
            return 0
        found = proposals(config, models, card) if budget.gpus else []
        best = together(config, models, card) if budget.gpus else None
    except TesseraError as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED
    show_learner(config, models, card)
    show_gpus(budget, card, fitting_shares(config, budget.gpus, card))
    if here is not None:
        show_here(here, config, command.measured)
    if budget.gpus:
        show_seconds(config, budget, evaluation_cost(config, models, card), card)
        show_proposals(budget, found, best)
    return 0


def plan_cluster(command: Command, config: RunConfig, models: Models, card: Card) -> int:
    """Print the best split of `--gpus` GPUs; returns the exit status.

    Raises:
        ConfigError: no split fits the memory of these GPUs.
    """
    gbit = command.link_gbit or NETWORK[key_of(card.name) or DEFAULT_CARD]
    site = Site(card=card, gpus_per_node=command.gpus_per_node, link=gbit * 1e9 / 8)
    measured = from_measured(Path(command.measured)) if command.measured else None
    search = Search(config, models, site, measured)
    plan = fewest_gpus(search, command.gpus)
    if plan is None:
        raise ConfigError(
            f"no split of {command.gpus} GPUs of {card.memory / GB:.4g} GB fits the workers' "
            "memory (--gpus 0 shows what each needs): "
            "--learner.checkpointing, a lower --learner.microbatch, or more GPUs"
        )
    basis = f"measured in {command.measured}, scaled" if measured else ESTIMATE
    if command.json:
        settings = search.configured(plan.split, config.max_staleness)
        found = document(settings, command.preset, load_preset(command.preset), models)
        images, top = plan.images, plan.prediction.bottleneck
        whole = with_prediction(found, key_of(card.name), plan.seconds, images, top)
        print(dumps({**whole, "object_store_bytes": round(plan.store())}, indent=2))
        return 0
    show_split(plan, site, command.gpus)
    show_plan(plan, site, basis)
    show_staleness([(ahead, fewest_gpus(search, command.gpus, ahead)) for ahead in AHEAD_TRIED])
    show_links(plan, site)
    sizes = sorted({*SIZES, command.gpus})
    show_costs(cost_rows(search, command, sizes), command.price_per_gpu_hour, command.scaling)
    print(
        f"Assumed: nodes of {site.gpus_per_node} GPUs, {gbit:g} Gbit/s between them one way, the "
        "driver on the first; workers are told their groups by one driver "
        f"({plan.times.driver * 1e3:.1f} ms a group). Evaluations, checkpoints and failures are "
        "not counted"
    )
    if search.unknown:
        print(f"Not counted, since their work is not known: {', '.join(search.unknown)}")
    show_run(search.configured(plan.split, config.max_staleness), command.preset)
    return 0


def show_run(config: RunConfig, preset: str) -> None:
    """Print the command of a run, and what its preset must say."""
    base = load_preset(preset)
    flags = " ".join(arguments(config, base))
    print(f"As a run: {command_of('learner.run')} --preset {preset} {flags}")
    if pools := pools_to_write(config, base):
        print(f"In the preset, a YAML file: {pools}")


def cost_rows(
    search: Search, command: Command, sizes: Sequence[int]
) -> list[tuple[int, Plan | None]]:
    """The best plan of each number of GPUs."""
    if command.scaling == "strong":
        return [(size, fewest_gpus(search, size)) for size in sizes]
    return [(size, search.scaled(size / command.gpus).best(size)) for size in sizes]


def as_document(
    command: Command,
    config: RunConfig,
    models: Models,
    budget: Budget,
    card: Card,
    here: Prediction | None,
) -> dict[str, Any]:
    """The plan document of the settings as they are."""
    found = document(config, command.preset, load_preset(command.preset), models)
    phases = [(f"{phase.role}: {phase.name}", phase.seconds) for phase in budget.phases]
    images = config.groups_per_iteration * config.rollouts_per_group
    seconds = budget.seconds if budget.gpus else None
    top = bottleneck_of(phases) if budget.gpus else ""
    if here is not None:
        seconds, top = here.seconds, here.bottleneck
    return with_prediction(found, key_of(card.name) if budget.gpus else "", seconds, images, top)


def card_of(command: Command) -> Card:
    """The kind of GPU that is planned for.

    Raises:
        ConfigError: its name is not known.
    """
    name, memory = this_gpu()
    card = card_named(command.gpu or DEFAULT_CARD)
    if name and not command.gpu:
        card = recognised(name, memory) or dataclasses.replace(card, memory=memory)
        if name != card.name:
            print(
                f"{name} is in no table of figures: seconds are those of one {card.name} (--gpu)",
                file=sys.stderr if command.json else sys.stdout,
            )
    return dataclasses.replace(card, memory=command.gpu_memory_gb * GB or card.memory)


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
    for name, least in LEAST.items():
        value = getattr(parsed.command, name)
        if not least <= value <= MOST:
            option = name.replace("_", "-")
            raise ConfigError(f"--{option} must be from {least} to {MOST:g}, found {value:g}")
    return parsed.command, validate(to_dict(parsed.run), "command line")


def largest_microbatch(config: RunConfig, architecture: PolicyArchitecture, limit: float) -> int:
    """Most rollouts of one pass within `limit` bytes; 0 if not even one fits."""
    sizes = range(1, rollouts_of(config) + 1)
    return bisect.bisect_right(
        sizes, limit, key=lambda size: memory_of(config, architecture, size).total
    )


def show_learner(config: RunConfig, models: Models, card: Card) -> None:
    """Print the learner's parts, and the largest microbatch in its share of a GPU."""
    policy = models.policy
    found, share = memory_of(config, policy), min(config.learner.num_gpus, 1.0) or 1.0
    usable = share * card.memory * (1 - SPARE) - CONTEXT
    size = count_parameters(policy) / 1e6
    table = Table(title=f"{size:.0f} M parameters, {policy.num_tokens} tokens")
    table.add_column("one learner")
    table.add_column("GB", justify="right")
    for name, value in dataclasses.asdict(found).items():
        table.add_row(name, f"{value / GB:.2f}")
    table.add_row("together", f"{found.total / GB:.2f}", end_section=True)
    sampler = of_sampler(config, policy, models.tokenizer)
    table.add_row("one sampler, with images", f"{sampler / GB:.2f}")
    make_console().print(table)
    fits = "fits" if found.total <= usable else "does not fit"
    part = f"its {share:g} of " if share < 1 else ""
    largest = largest_microbatch(config, policy, usable)
    print(
        f"The learner {fits} {part}{card.memory / GB:g} GB ({SPARE:.0%} kept free, and "
        f"{CONTEXT / GB:g} GB for CUDA); the largest learner.microbatch that does: "
        f"{largest or 'none'}"
    )


def show_seconds(
    config: RunConfig, budget: Budget, evaluations: EvaluationCost, card: Card
) -> None:
    """Print the phases of an iteration and what bounds them, and what evaluations take."""
    images = config.groups_per_iteration * config.rollouts_per_group
    table = Table(title=f"an iteration of {images} images on {card.name}: {ESTIMATE}")
    for heading in ("phase", "of each"):
        table.add_column(heading)
    table.add_column("s", justify="right")
    table.add_column("bound by")
    for phase in budget.phases:
        table.add_row(phase.name, phase.role, f"{phase.seconds:.2f}", phase.bound)
    make_console().print(table)
    if budget.unknown:
        print(f"Not counted, since their work is not known: {', '.join(budget.unknown)}")
    if config.reproducible:
        print("Not counted: what deterministic algorithms cost (--reproducible)")
    whole = config.iterations * budget.seconds / 3600
    if not budget.fits:
        print("These settings do not fit: the times are what they would be.")
    print(
        f"An iteration {budget.seconds:.1f} s, {images / budget.seconds:.0f} images/s; "
        f"{config.iterations} iterations {whole:.1f} h ({ESTIMATE})"
    )
    if evaluations.count:
        print(
            f"{evaluations.count} evaluations of {config.evaluation.num_images:,} images: "
            f"{evaluations.each:.0f} s each while training, {evaluations.total / 60:.1f} min in all"
        )
    if evaluations.unknown:
        print(f"Not counted, since their work is not known: {', '.join(evaluations.unknown)}")
    if seed := config.rewards.sampled_for_seed:
        minutes = seed / images * budget.sampling / 60
        print(f"Before the first one, {seed} images start the history: {minutes:.1f} min")


def show_proposals(budget: Budget, found: Sequence[Proposal], best: Proposal | None) -> None:
    """Print which settings would be faster."""
    if not found:
        print(
            "No single change makes these settings fit."
            if not budget.fits
            else "No other setting that fits is faster by more than 2 %."
        )
        return
    table = Table(title=f"one change at a time: {ESTIMATE}")
    table.add_column("setting")
    for heading in ("s saved", "iteration", "GPUs"):
        table.add_column(heading, justify="right")
    for each in found[:SHOWN]:
        gpus, seconds = len(each.budget.gpus), each.budget.seconds
        table.add_row(str(each), f"{each.gain:.2f}", f"{seconds:.1f}", f"{gpus}")
    make_console().print(table)
    if best is not None:
        print(
            f"Without another GPU, together: {best}. An iteration {best.budget.seconds:.2f} s "
            f"instead of {budget.seconds:.2f}"
        )
    for name, what in CONSEQUENCES.items():
        if any(name in each.changes for each in found):
            print(f"{name}: {what}.")
