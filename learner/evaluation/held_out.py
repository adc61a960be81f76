"""Evaluation of a policy: its images against held-out ones, by networks that no reward uses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from cluster.errors import DataError
from cluster.fleet import Fleet
from cluster.messages import GroupScores, SampleRequest, SamplingSpec
from learner.config import RunConfig
from learner.evaluation.real_images import real_images
from learner.loop import failures, spread
from learner.runs.records import TUNED
from rewards.metrics.evaluation import MetricSettings, evaluate
from rewards.metrics.samples import RealImages, Samples

__all__ = ["TableRow", "base_rows", "evaluate_policy", "real_images", "tuned_row"]
GROUP = 50  # images of one request
PANEL = "judge"
SPLITS = 10
"""Of the Inception Score; fewer than twice as many images are one split."""
OF_MINIATURE = ("convnet", "pixels")
"""Networks whose features FID tools do not know: a run's table divides their covariances by N, as
the miniature's rewards do."""


@dataclass(frozen=True)
class TableRow:
    """A policy under a sampling spec."""

    name: str
    spec: SamplingSpec


def base_rows(config: RunConfig) -> list[TableRow]:
    """The base policy, without guidance and with each configured scale."""
    spec = config.sampling
    rows = [TableRow("base", spec)]
    if spec.guidance == "none":
        rows += [
            TableRow(f"base, CFG {scale:g}", replace(spec, cfg_scale=scale, guidance="guided"))
            for scale in config.evaluation.cfg_scales
        ]
    return rows


def tuned_row(config: RunConfig) -> TableRow:
    """The tuned policy, under the spec it was trained with."""
    return TableRow(TUNED, config.sampling.learned())


def evaluate_policy(
    config: RunConfig, fleet: Fleet, spec: SamplingSpec, real: RealImages
) -> dict[str, float]:
    """Sample the current policy, and evaluate its images.

    Returns:
        The figures of `rewards.metrics.evaluation`, without intervals.

    Raises:
        DataError: an image could not be scored.
    """
    samples = fleet_samples(config, fleet, spec)
    splits = SPLITS if len(samples) >= 2 * SPLITS else 1
    settings = MetricSettings(
        neighbours=config.evaluation.neighbours,
        bootstrap=0,
        splits=splits,
        ddof=0 if config.judge.features.network in OF_MINIATURE else 1,
    )
    found = fleet.serve_while(lambda: evaluate(samples, real, settings))
    return {name: figure.value for name, figure in found.items()}


def fleet_samples(config: RunConfig, fleet: Fleet, spec: SamplingSpec) -> Samples:
    """Features and scores of the current policy's images, sampled now.

    Raises:
        DataError: an image could not be scored.
    """
    scored, entropies = list[GroupScores](), list[np.ndarray]()
    for group in fleet.stream(requests_of(config, spec)):  # images are not kept
        scored.append(group.scores)
        entropies.append(group.rollouts.entropies.mean(1, dtype=np.float64))
    failed, images = failures(scored)
    if failed:
        raise DataError(
            f"the judge failed on {len(failed)} of {images} images; the first: {failed[0]}"
        )
    return Samples(
        features={
            space: np.concatenate([group.features[space] for group in scored])
            for space in scored[0].features
        },
        scores={
            name: np.concatenate([group.scores[name] for group in scored])
            for name in scored[0].scores
        },
        entropies=np.concatenate(entropies),
    )


def requests_of(config: RunConfig, spec: SamplingSpec) -> Iterator[SampleRequest]:
    """Requests with the same random numbers for every policy and spec."""
    conditions, images = config.conditions.conditions(), config.evaluation.num_images
    if config.conditions.captions:  # of which there may be more than images
        conditions = spread(conditions, min(images, len(conditions)))
    each = -(-images // len(conditions))
    group = 0
    for condition, times in Counter(conditions).items():  # captions may be repeated
        for at in range(0, each * times, GROUP):
            yield SampleRequest(
                stream="evaluate",
                iteration=0,
                group=group,
                condition=condition,
                num_rollouts=min(GROUP, each * times - at),
                seed=config.seed,
                spec=spec,
                panel=PANEL,
                image_size=config.evaluation.image_size,
            )
            group += 1
