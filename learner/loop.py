"""The main loop, the same on `InlineFleet` and `RayFleet`. One iteration:

1. `Pipeline` requests groups ahead: P conditions, K rollouts each (`ConditionStream`).
2. Samplers draw them, with the weights of `max_staleness` iterations ago at most.
3. Reward servers score the images. The loop waits for the iteration's groups (`pipeline.take`).
4. The moments server commits their features once and answers with the leave-one-out rewards.
5. Rewards become advantages, the learner steps, and the samplers get the new weights, which frees
   the pipeline's slots for another iteration (`pipeline.release`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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
from learner.rollouts.feature_space import Spaces, seed_moments
from learner.rollouts.prefetch import Pipeline, requests_for
from learner.training.batch import make_batch
from rewards.combine import Combiner
from rewards.config import Distribution
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
    spaces: Spaces,
    first: int,
    after: Callable[[Iteration], None],
    should_stop: Callable[[], bool],
    run: str = "",
    combiner: Combiner | None = None,
    pipeline: Pipeline | None = None,
) -> int:
    """Run iterations from `first` to the end or a stop request; returns how many are done.

    Args:
        spaces: of the distribution rewards, as `set_reference` returned them.
        after: called with every finished iteration.
        run: name of the run; (run, iteration) is the key of a commit of moments.
        combiner, pipeline: restored ones of a resumed run; None makes new ones.
    """
    combiner, rewarded = combiner or Combiner(config.rewards.terms()), config.rewards.spaces()
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
        features, valid, classes = _features([g.rollouts.request for g in groups], scores, spaces)
        with clock("wait_moments"):
            answers = fleet.moments.commit(iteration, features, valid, run=run, classes=classes)
        check_moments_staleness(answers[MAIN_SPACE], iteration, config.max_staleness)
        fleet.refresh_moments()
        by_reward = {rewarded[space].reward: answer for space, answer in answers.items()}
        advantages = group_advantages(groups, _by_group(by_reward, len(groups)), combiner)
        with clock("wait_learner"):
            report = fleet.learner.step(make_batch(iteration, groups, advantages))
        with clock(PUBLISHING):
            fleet.broadcast(iteration + 1)
            pipeline.release(iteration)
        spans, now = (*worker_spans(groups, answers, report), *clock.take()), epoch()
        metrics = iteration_metrics(
            iteration,
            groups,
            {rewarded[space].fid: answer for space, answer in answers.items()},
            advantages,
            report,
            max_staleness=config.max_staleness,
            restarts=fleet.restarts,
            spans=spans,
            seconds=now - previous_end,
        )
        previous_end = now
        with clock("record"):
            after(Iteration(metrics, groups, advantages, spans, _warnings(answers, rewarded)))
        if should_stop():
            return iteration + 1
    return config.iterations


@dataclass(frozen=True)
class BasePolicy:
    """Figures of the base policy, before the first iteration."""

    entropy: float
    """Mean of its tokens, nats."""
    fids: Mapping[str, float]
    """Feature space -> FID of the images that its history starts from."""
    images: Mapping[str, float]
    """Feature space -> number of these."""


def prepare(config: RunConfig, fleet: Fleet, spaces: Spaces) -> BasePolicy:
    """Measure the base policy before the first iteration: the moments that the histories start
    from, and the entropy that entropy controllers refer to.

    With `seed_from` the moments come from a file; one iteration's images are enough if all do.
    """
    conditions, size = config.conditions.conditions(), config.rollouts_per_group
    starts = dict[str, np.ndarray | Moments]()
    for space, each in config.rewards.spaces().items():
        if each.term.seed_from:
            dim, made_by = fleet.feature_dim("rewards", space), fleet.fingerprint("rewards", space)
            starts[space] = fleet.serve_while(partial(seed_moments, each, dim, made_by))
    images = config.rewards.sampled_for_seed or min(
        config.rewards.loo_fid.seed_images, config.groups_per_iteration * size
    )
    groups = -(-images // size)
    requests = requests_for(config, spread(conditions, groups), "moments", 0)
    scores, entropies = list[GroupScores](), list[np.ndarray]()
    for group in fleet.stream(requests):  # only this is kept of maybe ten thousand images
        scores.append(group.scores)
        entropies.append(group.rollouts.entropies.mean())
    check_failures(scores, config.max_failed_share)
    features, valid, _ = _features(requests, scores, spaces)
    entropy = float(np.mean(entropies))
    fleet.learner.start(entropy)
    for space, each in config.rewards.spaces().items():
        if not each.term.seed_from:
            own = -(-each.term.seed_images // size) * size
            starts[space] = features[space][:own][valid[:own]]
    fids = fleet.moments.seed(starts)
    fleet.refresh_moments()
    counts = {
        space: start.weight if isinstance(start, Moments) else len(start)
        for space, start in starts.items()
    }
    return BasePolicy(entropy, fids, counts)


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


def _by_group(answers: Mapping[str, DistributionReward], groups: int) -> dict[str, np.ndarray]:
    """Distribution rewards (P, K) of P groups."""
    return {name: answer.rewards.reshape(groups, -1) for name, answer in answers.items()}


def _warnings(
    answers: Mapping[str, DistributionReward], rewarded: Mapping[str, Distribution]
) -> tuple[str, ...]:
    """Warnings of all spaces; those of further ones with the name of the option."""
    return tuple(
        text if space == MAIN_SPACE else f"{rewarded[space].option}: {text}"
        for space, answer in answers.items()
        for text in answer.warnings
    )


def _features(
    requests: Sequence[SampleRequest], scores: Sequence[GroupScores], spaces: Spaces
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Features (N, D) in the rewards' spaces, validity (N,) and classes (N,; -1 for captions) of a
    batch, group by group."""
    valid = np.concatenate([group.valid for group in scores])
    conditions = [each.condition for each in requests for _ in range(each.num_rollouts)]
    indices = [condition.class_index for condition in conditions]
    classes = np.array([-1 if index is None else index for index in indices])
    features = {
        space: joined(concatenate_features([group.features[space] for group in scores]), conditions)
        for space, joined in spaces.items()
    }
    return features, valid, classes


def concatenate_features(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Features (K, D) of groups -> (N, D). Groups without a scored image have (K, 0), and become
    NaN."""
    dim = max(part.shape[1] for part in parts)
    full = [p if p.shape[1] == dim else np.full((len(p), dim), np.nan, p.dtype) for p in parts]
    return np.concatenate(full)
