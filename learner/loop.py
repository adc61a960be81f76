"""The main loop: sample and score, commit the moments, learn, broadcast. The same on any fleet."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.errors import DataError, FleetError, StopRequestedError
from cluster.fleet import Fleet
from cluster.messages import MAIN_SPACE, Condition, GroupScores, SampleRequest, ScoredGroup
from cluster.spans import Span, Stopwatch
from learner.config import RunConfig
from learner.grpo.advantage import Advantages, group_advantages
from learner.monitoring.rows import all_spans, iteration_metrics, times
from learner.rollouts.feature_space import RewardSpace, seed_moments
from learner.rollouts.prefetch import Pipeline, requests_for
from learner.training.batch import make_batch
from rewards.combine import Combiner
from rewards.config import LOO_FID
from rewards.distribution.distribution_reward import DistributionReward
from rewards.distribution.moments import Moments


@dataclass(frozen=True)
class Iteration:
    """Everything that happened in one iteration, for whoever keeps records."""

    metrics: dict[str, Any]
    """One line of metrics.jsonl."""
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
    pipeline: Pipeline | None = None,
) -> int:
    """Iterate from `first` to the end, or until a stop is asked for.

    Args:
        space: of the distribution reward, as `set_reference` gave it.
        run: name of the run, the other half of a commit's key.
        combiner: of the rewards, with the anchors of a resumed run; None makes a new one.
        pipeline: with the groups that a resumed run had on their way; None makes a new one.
        after: called with every finished iteration (records, checkpoints, progress).

    Returns:
        How many iterations are done.
    """
    combiner = combiner or Combiner(config.rewards.terms())
    pipeline, clock, ended = pipeline or Pipeline(config, fleet), Stopwatch(), time.time()
    pipeline.begin(first)
    for iteration in range(first, config.iterations):
        try:
            with clock("wait_groups"):
                groups = pipeline.take(iteration)
        except StopRequestedError:
            return iteration
        scores = [group.scores for group in groups]
        check_failures(scores, config.max_failed_share)
        features, valid, classes = _features([g.rollouts.request for g in groups], scores, space)
        with clock("wait_moments"):
            answer = fleet.moments.commit(iteration, features, valid, run=run, classes=classes)
        check_history(answer, iteration, config.max_staleness)
        fleet.refresh_moments()
        distribution = {LOO_FID: answer.rewards.reshape(len(groups), -1)}
        advantages = group_advantages(groups, distribution, combiner)
        with clock("wait_learner"):
            report = fleet.learner.step(make_batch(iteration, groups, advantages))
        with clock("broadcast"):
            fleet.broadcast(iteration + 1)
            pipeline.release(iteration)
        spans = (*all_spans(groups, answer, report), *clock.take())
        metrics = iteration_metrics(
            iteration, config.max_staleness, groups, answer, advantages, report, fleet.restarts
        )
        metrics |= times(spans, ended, groups)
        ended = time.time()
        with clock("record"):
            after(Iteration(metrics, groups, advantages, spans, answer.warnings))
        if should_stop():
            return iteration + 1
    return config.iterations


def prepare(config: RunConfig, fleet: Fleet, space: RewardSpace) -> dict[str, float]:
    """Before the first iteration: from images of the base policy, the start of the moments'
    history and the entropy that controllers are anchored to.

    Where the history starts from a file (`seed_from`), the images of one iteration are enough.
    """
    conditions, term = config.conditions.conditions(), config.rewards.loo_fid
    start: Moments | None = None
    groups = -(-term.seed_images // config.rollouts_per_group)
    if term.seed_from:
        dim, fingerprint = fleet.feature_dim("rewards"), fleet.fingerprint("rewards")
        start = fleet.serve_while(lambda: seed_moments(config, dim, fingerprint))
        groups = min(groups, config.groups_per_iteration)
    asked = requests_for(config, spread(conditions, groups), "moments", 0)
    scores, entropies = list[GroupScores](), list[np.ndarray]()
    for group in fleet.stream(asked):  # of ten thousand images, no more is kept than this
        scores.append(group.scores)
        entropies.append(group.rollouts.entropies.mean())
    check_failures(scores, config.max_failed_share)
    features, valid, _ = _features(asked, scores, space)
    entropy = float(np.mean(entropies))
    fleet.learner.start(entropy)
    fid = fleet.moments.seed(features[valid] if start is None else start)
    fleet.refresh_moments()
    return {"fid": fid, "entropy": entropy, "images": start.weight if start else valid.sum()}


def spread(conditions: Sequence[Condition], count: int) -> list[Condition]:
    """So many conditions: one after the other, again and again; or, if there are more conditions
    than that, evenly from the first to the last."""
    step = max(len(conditions) / count, 1.0)
    return [conditions[int(index * step) % len(conditions)] for index in range(count)]


def check_history(answer: DistributionReward, iteration: int, max_staleness: int) -> None:
    """Bound the age of the moments that judged, like that of the policy that drew.

    Raises:
        FleetError: the history lacks too many of the iterations before.
    """
    staleness = iteration - answer.version
    if not 0 <= staleness <= max_staleness:
        raise FleetError(
            f"iteration {iteration + 1} was judged with moments of {answer.version} iterations: "
            f"staleness {staleness} is outside 0 to max_staleness {max_staleness}; was the moments "
            "server restored from another checkpoint than the learner?"
        )


def check_failures(scores: Iterable[GroupScores], allowed: float) -> None:
    """Stop when too many images could not be scored: that is no accident any more.

    Raises:
        DataError: with the first error.
    """
    failed, images = failures(scores)
    if len(failed) > allowed * images:
        raise DataError(
            f"{len(failed)} of {images} images could not be scored, more than the share "
            f"{allowed:g} (max_failed_share) allows; the first error: {failed[0]}"
        )


def failures(scores: Iterable[GroupScores]) -> tuple[list[str], int]:
    """Why images were not scored, each that was not; and how many images there are."""
    errors = [error for group in scores for error in group.errors]
    return [error for error in errors if error], len(errors)


def _features(
    requests: Sequence[SampleRequest], scores: Sequence[GroupScores], space: RewardSpace
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features (N, D) in the reward's space, validity (N,) and classes (N,; -1 of captions) of a
    batch, in the order of its groups."""
    features = concatenate_features([group.features[MAIN_SPACE] for group in scores])
    valid = np.concatenate([group.valid for group in scores])
    asked = [request.condition.class_index for request in requests]
    each = [-1 if index is None else index for index in asked]
    classes = np.repeat(each, [request.num_rollouts for request in requests])
    return space(features, classes), valid, classes


def concatenate_features(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Features (K, D) of groups -> (N, D). A group of which no image could be scored has (K, 0),
    and becomes NaN."""
    dim = max(part.shape[1] for part in parts)
    whole = [p if p.shape[1] == dim else np.full((len(p), dim), np.nan, p.dtype) for p in parts]
    return np.concatenate(whole)
