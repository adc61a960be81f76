"""An iteration's seconds and every GPU's memory, and what other settings would change of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from learner.capacity.cards import Card
from learner.capacity.gpus import Gpu, fits, pack, processes, rollouts_of
from learner.capacity.seconds import Phase
from learner.capacity.workload import Models, phases_of, sampling_of
from learner.config import RunConfig, merge, to_dict, validate
from rewards.scorers.text_image import TextImageConfig

WORTH = 0.02  # least gain that is proposed, as a share of the iteration
ROUNDS = 8  # settings that are changed together, at most
STEP = 0.05  # of proposed shares of a GPU
SPLITS = (1, 2, 3, 4, 6, 8, 12)  # microbatches of all rollouts that are tried
AHEAD = "max_staleness"  # the one setting here that changes what is learned
LEARNING = ("moments-server", "learner")  # roles of the phases after the last score
Changes = Mapping[str, Any]
"""Option, as sampler.dtype -> value."""


@dataclass(frozen=True)
class Budget:
    """What an iteration costs."""

    phases: tuple[Phase, ...]
    seconds: float
    """Of an iteration."""
    sampling: float
    """Seconds from its first request to its last score."""
    gpus: tuple[Gpu, ...]
    fits: bool
    unknown: tuple[str, ...]
    """Networks whose work is not counted."""


@dataclass(frozen=True)
class Proposal:
    """A change of settings, and the budget with it."""

    changes: Changes
    budget: Budget
    gain: float
    """Seconds of an iteration."""

    def __str__(self) -> str:
        return ", ".join(f"{name} {_text(value)}" for name, value in self.changes.items())


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value}"


def budget_of(config: RunConfig, models: Models, card: Card) -> Budget:
    phases, unknown = phases_of(config, models, card)
    gpus = pack(processes(config, models.policy, models.tokenizer))
    calls = len(sampling_of(config, models).calls)
    return Budget(
        phases=tuple(phases),
        seconds=iteration_seconds(phases, gpus, calls, config.max_staleness),
        sampling=sampling_seconds(phases, gpus, calls),
        gpus=tuple(gpus),
        fits=fits(gpus, card.memory),
        unknown=tuple(unknown),
    )


def iteration_seconds(
    phases: Sequence[Phase], gpus: Sequence[Gpu], calls: int, staleness: int
) -> float:
    """Seconds of an iteration from those of its phases, each of one worker. Learning comes after
    all scores; with staleness, beside the sampling of the next iteration."""
    sampling = sampling_seconds(phases, gpus, calls)
    learning = sum(phase.seconds for phase in phases if not _before(phase))
    if not staleness:
        return sampling + learning
    return max(sampling, learning, *(_on(gpu, phases) for gpu in gpus))


def sampling_seconds(phases: Sequence[Phase], gpus: Sequence[Gpu], calls: int) -> float:
    """Seconds from the first request to the last score.

    Processes that share a GPU take turns. Others work side by side, piece by piece: what follows
    the longest of them is the work on the last of the sampler's `calls`.
    """
    before = [phase for phase in phases if _before(phase)]
    longest, busiest = max(
        ((_on(gpu, before), gpu) for gpu in gpus), key=lambda found: found[0], default=(0.0, None)
    )
    beside = [each for each in before if busiest is None or not _holds(busiest, each.role)]
    return longest + sum(phase.seconds for phase in beside) / max(calls, 1)


def _before(phase: Phase) -> bool:
    return phase.role not in LEARNING and phase.name != "load"


def _holds(gpu: Gpu, role: str) -> bool:
    return any(process.role == role for process in gpu.processes)


def _on(gpu: Gpu, phases: Sequence[Phase]) -> float:
    """Seconds that a GPU is in use by phases of its processes."""
    each = [process.role for process in gpu.processes]
    return sum(phase.seconds * each.count(phase.role) for phase in phases)


def changed(config: RunConfig, changes: Changes) -> RunConfig:
    """Raises ConfigError for values that the configuration refuses."""
    nested: dict[str, Any] = {}
    for name, value in changes.items():
        *path, last = name.split(".")
        place = nested
        for key in path:
            place = place.setdefault(key, {})
        place[last] = value
    return validate(merge(to_dict(config), nested), "learner.plan")


def proposals(config: RunConfig, models: Models, card: Card) -> list[Proposal]:
    """Changes of one setting that make an iteration shorter and fit, the best of each setting, in
    the order of what they gain."""
    now, best = budget_of(config, models, card), dict[tuple[str, ...], Proposal]()
    for changes in candidates(config):
        found = proposed(config, changes, now, models, card)
        key = tuple(changes)
        if found and (key not in best or found.gain > best[key].gain + WORTH * now.seconds):
            best[key] = found
    return sorted(best.values(), key=lambda each: -each.gain)


def together(config: RunConfig, models: Models, card: Card) -> Proposal | None:
    """Changes that neither need another GPU nor change what is learned, made one after the other,
    the best first; None without any."""
    first = now = budget_of(config, models, card)
    made: dict[str, Any] = {}
    for _ in range(ROUNDS):
        found = [
            each
            for each in proposals(changed(config, made), models, card)
            if len(each.budget.gpus) <= len(first.gpus) and AHEAD not in each.changes
        ]
        if not found:
            break
        made |= found[0].changes
        now = found[0].budget
    return Proposal(made, now, first.seconds - now.seconds) if made else None


def proposed(
    config: RunConfig, changes: Changes, now: Budget, models: Models, card: Card
) -> Proposal | None:
    """A change that gains enough and fits, if need be with other shares of the GPU."""
    after = changed(config, changes)
    found = budget_of(after, models, card)
    if now.seconds - found.seconds < WORTH * now.seconds:
        return None
    if not found.fits:
        shares = fitting_shares(after, found.gpus, card)
        if not shares:
            return None
        changes = {**changes, **shares}
        found = budget_of(changed(config, changes), models, card)
    return Proposal(changes, found, now.seconds - found.seconds) if found.fits else None


def fitting_shares(config: RunConfig, gpus: Sequence[Gpu], card: Card) -> dict[str, float]:
    """Shares with which the processes of a single GPU fit it: what each needs, and the rest to the
    learner; empty if they do not, or if there are other GPUs or pools."""
    names = {"learner": "learner", "sampler": "sampler", "reward-server": "reward"}
    found = list(gpus[0].processes) if len(gpus) == 1 else []
    if not found or any(each.role not in names or each.share >= 1 for each in found):
        return {}
    needs = {f"{names[each.role]}.num_gpus": each.least_share(card.memory) for each in found}
    steps = {name: math.ceil(need / STEP - 1e-9) for name, need in needs.items()}
    counts = [f"{names[each.role]}.num_gpus" for each in found]
    left = round(1 / STEP) - sum(steps[name] for name in counts)
    if left < 0:
        return {}
    if "learner.num_gpus" in steps:
        steps["learner.num_gpus"] += left
    return {name: round(count * STEP, 2) for name, count in steps.items()}


def candidates(config: RunConfig) -> Iterator[dict[str, Any]]:
    """Changes worth trying."""
    sampler, learner = config.sampler, config.learner
    groups, most = 2 * sampler.max_groups, config.groups_per_iteration // config.num_samplers
    while groups <= most and not config.reproducible:  # which takes groups one by one
        yield {"sampler.max_groups": groups}
        groups *= 2
    if sampler.kernels != "auto":
        yield {"sampler.kernels": "auto"}
    for name in ("dtype", "image_dtype"):
        if getattr(sampler, name) != "bfloat16":
            yield {f"sampler.{name}": "bfloat16"}
    exact = {
        f"rewards.{name}.precision": "bf16"
        for name, scorer in config.rewards.scorers().items()
        if isinstance(scorer, TextImageConfig) and scorer.precision == "fp32"
    }
    if exact:
        yield exact
    if learner.precision != "bf16":
        yield {"learner.precision": "bf16"}
    if learner.compile == "never":
        yield {"learner.compile": "auto"}
    rollouts = rollouts_of(config)
    sizes = [-(-rollouts // split) for split in SPLITS]
    if learner.checkpointing:
        yield {"learner.checkpointing": False}
        yield from ({"learner.checkpointing": False, "learner.microbatch": size} for size in sizes)
    yield from ({"learner.microbatch": size} for size in sizes if size > learner.microbatch)
    yield from _more_workers(config)


def _more_workers(config: RunConfig) -> Iterator[dict[str, Any]]:
    if not config.max_staleness:
        yield {AHEAD: 1}
    roles = {"learner": config.learner, "sampler": config.sampler, "reward": config.reward}
    for name, role in roles.items():
        if 0 < role.num_gpus < 1:
            yield {f"{name}.num_gpus": 1.0}
    if config.sampler.num_gpus:
        yield {"num_samplers": 2 * config.num_samplers}
    if config.reward.num_gpus and not config.reward.on:
        yield {"num_reward_servers": 2 * config.num_reward_servers}
    if config.learner.num_gpus:
        gpus = max(config.learner.num_gpus, 1.0)
        yield {"num_learners": 2 * config.num_learners, "learner.num_gpus": gpus}
