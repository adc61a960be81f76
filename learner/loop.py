"""The main loop, the same on `InlineFleet` and `RayFleet`. One iteration:

1. `Pipeline` requests groups ahead: P conditions, K rollouts each (`ConditionStream`).
2. Samplers draw them, with the weights of `max_staleness` iterations ago at most.
3. Reward servers score the images. The loop waits for the iteration's groups (`pipeline.take`).
4. The moments server commits their features once and answers with the leave-one-out rewards.
5. Rewards become advantages, the learner steps, and the samplers get the new weights, which frees
   the pipeline's slots for another iteration (`pipeline.release`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.clock import epoch
from cluster.errors import DataError, FleetError, StopRequestedError
from cluster.fleet import Fleet
from cluster.messages import MAIN_SPACE, Condition, GroupScores, SampleRequest, ScoredGroup
from cluster.spans import PUBLISHING, Span, Stopwatch
from learner.config import RunConfig
from learner.grpo.advantage import Advantages, group_advantages
from learner.monitoring.metrics import iteration_metrics, worker_spans
from learner.rollouts.feature_space import RewardSpace, seed_moments
from learner.rollouts.prefetch import Pipeline, requests_for
from learner.training.batch import make_batch
from rewards.combine import Combiner
from rewards.config import LOO_FID
from rewards.distribution.distribution_reward import DistributionReward
from rewards.distribution.moments import Moments


@dataclass(frozen=True)
class Iteration:
    """Result of one iteration, for the records."""

    metrics: dict[str, Any]
    """One line of metrics.jsonl."""
    groups: Sequence[ScoredGroup]
    advantages: Advantages
    spans: tuple[Span, ...]
    warnings: tuple[str, ...] = ()
    """Warnings about settings of the distribution reward that do not suit the data, each once a
    run."""


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
    """Run iterations from `first` to the end or a stop request; returns how many are done.

    Args:
        space: of the distribution reward, as `set_reference` returned it.
        after: called with every finished iteration.
        run: name of the run; (run, iteration) is the key of a commit of moments.
        combiner, pipeline: restored ones of a resumed run; None makes new ones.
    """
    combiner = combiner or Combiner(config.rewards.terms())
    pipeline, clock, previous_end = pipeline or Pipeline(config, fleet), Stopwatch(), epoch()
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
        check_moments_staleness(answer, iteration, config.max_staleness)
        fleet.refresh_moments()
        loo_fid = answer.rewards.reshape(len(groups), -1)
        advantages = group_advantages(groups, {LOO_FID: loo_fid}, combiner)
        with clock("wait_learner"):
            report = fleet.learner.step(make_batch(iteration, groups, advantages))
        with clock(PUBLISHING):
            fleet.broadcast(iteration + 1)
            pipeline.release(iteration)
        spans, now = (*worker_spans(groups, answer, report), *clock.take()), epoch()
        metrics = iteration_metrics(
            iteration,
            groups,
            answer,
            advantages,
            report,
            max_staleness=config.max_staleness,
            restarts=fleet.restarts,
            spans=spans,
            seconds=now - previous_end,
        )
        previous_end = now
        with clock("record"):
            after(Iteration(metrics, groups, advantages, spans, answer.warnings))
        if should_stop():
            return iteration + 1
    return config.iterations


def prepare(config: RunConfig, fleet: Fleet, space: RewardSpace) -> dict[str, float]:
    """Measure the base policy before the first iteration: the moments that the history starts from,
    and the entropy that entropy controllers refer to. Returns fid, entropy and number of images.

    With `seed_from` the moments come from a file, and one iteration's images are enough.
    """
    conditions, term = config.conditions.conditions(), config.rewards.loo_fid
    start: Moments | None = None
    groups = -(-term.seed_images // config.rollouts_per_group)
    if term.seed_from:
        dim, fingerprint = fleet.feature_dim("rewards"), fleet.fingerprint("rewards")
        start = fleet.serve_while(lambda: seed_moments(config, dim, fingerprint))
        groups = min(groups, config.groups_per_iteration)
    requests = requests_for(config, spread(conditions, groups), "moments", 0)
    scores, entropies = list[GroupScores](), list[np.ndarray]()
    for group in fleet.stream(requests):  # only this is kept of maybe ten thousand images
        scores.append(group.scores)
        entropies.append(group.rollouts.entropies.mean())
    check_failures(scores, config.max_failed_share)
    features, valid, _ = _features(requests, scores, space)
    entropy = float(np.mean(entropies))
    fleet.learner.start(entropy)
    fid = fleet.moments.seed(features[valid] if start is None else start)
    fleet.refresh_moments()
    return {"fid": fid, "entropy": entropy, "images": start.weight if start else valid.sum()}


def spread(conditions: Sequence[Condition], count: int) -> list[Condition]:
    """`count` conditions: repeated in order, or, if there are more, evenly spaced ones."""
    step = max(len(conditions) / count, 1.0)
    return [conditions[int(index * step) % len(conditions)] for index in range(count)]


def check_moments_staleness(answer: DistributionReward, iteration: int, max_staleness: int) -> None:
    """Bound the age of the moments behind a reward, as that of the policy is bounded.

    Raises:
        FleetError: the history lacks more than `max_staleness` iterations.
    """
    staleness = iteration - answer.version
    if not 0 <= staleness <= max_staleness:
        raise FleetError(
            f"iteration {iteration + 1} was scored with moments of {answer.version} iterations: "
            f"staleness {staleness} is outside 0 to max_staleness {max_staleness}; was the moments "
            "server restored from another checkpoint than the learner?"
        )


def check_failures(scores: Iterable[GroupScores], allowed: float) -> None:
    """Stop when too many images could not be scored.

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
    """The error of every image that was not scored, and the number of all images."""
    errors = [error for group in scores for error in group.errors]
    return [error for error in errors if error], len(errors)


def _features(
    requests: Sequence[SampleRequest], scores: Sequence[GroupScores], space: RewardSpace
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features (N, D) in the reward's space, validity (N,) and classes (N,; -1 for captions) of a
    batch, group by group."""
    features = concatenate_features([group.features[MAIN_SPACE] for group in scores])
    valid = np.concatenate([group.valid for group in scores])
    conditions = [each.condition for each in requests for _ in range(each.num_rollouts)]
    indices = [condition.class_index for condition in conditions]
    classes = np.array([-1 if index is None else index for index in indices])
    return space(features, conditions), valid, classes


def concatenate_features(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Features (K, D) of groups -> (N, D). Groups without a scored image have (K, 0), and become
    NaN."""
    dim = max(part.shape[1] for part in parts)
    full = [p if p.shape[1] == dim else np.full((len(p), dim), np.nan, p.dtype) for p in parts]
    return np.concatenate(full)
