"""The main loop: sample and score, commit the moments, learn, broadcast. The same on any fleet."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.errors import DataError
from cluster.fleet import Fleet, StopRequestedError
from cluster.messages import MAIN_SPACE, Condition, SampleRequest, ScoredGroup, Span
from learner.advantage import Advantages, group_advantages
from learner.batch import make_batch
from learner.conditions import ConditionStream
from learner.config import RunConfig
from learner.distribution import RewardSpace
from learner.learner import StepReport
from rewards.combine import Combiner
from rewards.config import LOO_FID
from rewards.moments_server import DistributionReward

QUANTILES = {"p05": 0.05, "p95": 0.95}


@dataclass(frozen=True)
class Iteration:
    """Everything that happened in one iteration, for whoever keeps records."""

    row: dict[str, Any]
    """Metrics, ready for JSON."""
    groups: Sequence[ScoredGroup]
    advantages: Advantages
    spans: tuple[Span, ...]
    advice: tuple[str, ...] = ()
    """What is wrong with the settings, and what to change; said once."""


def train(
    config: RunConfig,
    fleet: Fleet,
    space: RewardSpace,
    first: int,
    after: Callable[[Iteration], None],
    should_stop: Callable[[], bool],
    run: str = "",
    combiner: Combiner | None = None,
) -> int:
    """Iterate from `first` to the end, or until a stop is asked for.

    Args:
        space: of the distribution reward, as `set_reference` gave it.
        run: name of the run, the other half of a commit's key.
        combiner: of the rewards, with the anchors of a resumed run; None makes a new one.
        after: called with every finished iteration (records, checkpoints, progress).

    Returns:
        How many iterations are done.
    """
    stream = ConditionStream(
        config.conditions.conditions(), config.groups_per_iteration, config.seed
    )
    combiner = combiner or Combiner(config.rewards.terms())
    for iteration in range(first, config.iterations):
        started = time.time()
        try:
            ticket = fleet.submit(_requests(config, stream.draw(iteration), "train", iteration))
            groups = fleet.collect(ticket)
        except StopRequestedError:
            return iteration
        check_failures(groups, config.max_failed_share)
        features, valid, classes = _features(groups, space)
        answer = fleet.moments.commit(iteration, features, valid, run=run, classes=classes)
        fleet.refresh_moments()
        distribution = {LOO_FID: answer.rewards.reshape(len(groups), -1)}
        advantages = group_advantages(groups, distribution, combiner)
        report = fleet.learner.step(make_batch(iteration, groups, advantages))
        learned = time.time()
        version = fleet.broadcast()
        spans = _spans(groups, answer, report, Span("driver", "broadcast", learned, time.time()))
        row = _row(iteration, version, groups, answer, advantages, report, fleet)
        row |= _times(spans, started, groups)
        after(Iteration(row, groups, advantages, spans, answer.warnings))
        if should_stop():
            return iteration + 1
    return config.iterations


def prepare(config: RunConfig, fleet: Fleet, space: RewardSpace) -> dict[str, float]:
    """Before the first iteration: from images of the base policy, the start of the moments'
    history and the entropy that controllers are anchored to."""
    conditions, size = config.conditions.conditions(), config.rollouts_per_group
    groups = -(-config.rewards.loo_fid.seed_images // size)
    asked = spread(conditions, groups)
    seeds = fleet.collect(fleet.submit(_requests(config, asked, "moments", 0)))
    check_failures(seeds, config.max_failed_share)
    features, valid, _ = _features(seeds, space)
    entropy = float(np.mean([group.rollouts.entropies.mean() for group in seeds]))
    fleet.learner.start(entropy)
    fid = fleet.moments.seed(features[valid])
    fleet.refresh_moments()
    return {"fid": fid, "entropy": entropy}


def spread(conditions: Sequence[Condition], count: int) -> list[Condition]:
    """So many conditions: one after the other, again and again; or, if there are more conditions
    than that, evenly from the first to the last."""
    step = max(len(conditions) / count, 1.0)
    return [conditions[int(index * step) % len(conditions)] for index in range(count)]


def check_failures(groups: Sequence[ScoredGroup], allowed: float) -> None:
    """Stop when too many images could not be scored: that is no accident any more.

    Raises:
        DataError: with the first error.
    """
    errors = [error for group in groups for error in group.scores.errors]
    failed = [error for error in errors if error]
    if len(failed) > allowed * len(errors):
        raise DataError(
            f"{len(failed)} of {len(errors)} images could not be scored, more than the share "
            f"{allowed:g} (max_failed_share) allows; the first error: {failed[0]}"
        )


def _requests(
    config: RunConfig, conditions: Sequence[Condition], stream: str, iteration: int
) -> list[SampleRequest]:
    return [
        SampleRequest(
            stream=stream,
            iteration=iteration,
            group=group,
            condition=condition,
            num_rollouts=config.rollouts_per_group,
            seed=config.seed,
            spec=config.sampling,
        )
        for group, condition in enumerate(conditions)
    ]


def _features(
    groups: Sequence[ScoredGroup], space: RewardSpace
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features (N, D) in the reward's space, validity (N,) and classes (N,; -1 of captions) of a
    batch, in the order of its groups."""
    features = concatenate_features([group.scores.features[MAIN_SPACE] for group in groups])
    valid = np.concatenate([group.scores.valid for group in groups])
    asked = [group.rollouts.request.condition.class_index for group in groups]
    each = [-1 if index is None else index for index in asked]
    classes = np.repeat(each, [group.rollouts.request.num_rollouts for group in groups])
    return space(features, classes), valid, classes


def concatenate_features(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Features (K, D) of groups -> (N, D). A group of which no image could be scored has (K, 0),
    and becomes NaN."""
    dim = max(part.shape[1] for part in parts)
    whole = [p if p.shape[1] == dim else np.full((len(p), dim), np.nan, p.dtype) for p in parts]
    return np.concatenate(whole)


def _spans(
    groups: Sequence[ScoredGroup], answer: DistributionReward, report: StepReport, *more: Span
) -> tuple[Span, ...]:
    of_groups = (span for group in groups for span in (*group.rollouts.spans, *group.scores.spans))
    return (*of_groups, *answer.spans, *report.spans, *more)


def _row(
    iteration: int,
    version: int,
    groups: Sequence[ScoredGroup],
    answer: DistributionReward,
    advantages: Advantages,
    report: StepReport,
    fleet: Fleet,
) -> dict[str, Any]:
    rewards = advantages.rewards
    return {
        "iteration": iteration,
        "version": version,
        **{f"reward/{name}": float(np.nanmean(values)) for name, values in rewards.items()},
        **{f"reward_std/{name}": float(np.nanstd(values)) for name, values in rewards.items()},
        **{
            f"reward_{label}/{name}": float(np.nanquantile(values, share))
            for label, share in QUANTILES.items()
            for name, values in rewards.items()
        },
        **{f"reward_clipped/{name}": share for name, share in advantages.clipped.items()},
        "fid/ema": answer.fid,
        "fid/batch": answer.batch_fid,
        "fid/effective_size": answer.effective_size,
        "fid/gap": answer.gap,
        "fid/bias": answer.bias,
        "fid/lag": answer.lag,
        "fid/positive_share": answer.positive_share,
        "fid/between_classes": answer.between_classes,
        "fid/within_classes": answer.within_classes,
        "images/failed": int((~advantages.valid).sum()),
        "groups/flat": advantages.flat_groups,
        **report.metrics,
        "fleet/restarts": fleet.restarts,
    }


def _times(
    spans: Sequence[Span], started: float, groups: Sequence[ScoredGroup]
) -> dict[str, float]:
    """Seconds of each phase, added over workers, and the rate of the whole."""
    seconds: dict[str, float] = {}
    for span in spans:
        key = f"time/{span.phase}"
        seconds[key] = seconds.get(key, 0.0) + span.seconds
    whole = time.time() - started
    images = sum(group.rollouts.request.num_rollouts for group in groups)
    return {**seconds, "time/iteration": whole, "time/images_per_s": images / whole}
