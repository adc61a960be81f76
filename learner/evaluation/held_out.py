"""Evaluation of a policy: its images against held-out ones, by networks that no reward uses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from cluster.errors import DataError
from cluster.fleet import Fleet
from cluster.messages import MAIN_SPACE, GroupScores, SampleRequest, SamplingSpec
from learner.config import RunConfig
from learner.evaluation.real_images import real_images
from learner.loop import failures
from learner.runs.records import TUNED
from rewards.distribution.fid import frechet_distance
from rewards.distribution.moments import Moments
from rewards.metrics.neighbours import fidelity
from rewards.metrics.samples import RealImages

__all__ = ["TableRow", "base_rows", "evaluate_policy", "real_images", "tuned_row"]
GROUP = 50  # images of one request
PANEL = "judge"


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
        fid, density, coverage, precision and recall against `real` (in the judge's second space
        "second/fid" and so on), the mean of each scorer of the judge, mean token entropy in nats,
        number of images.

    Raises:
        DataError: an image could not be scored.
    """
    requests, scored = list(requests_of(config, spec)), list[GroupScores]()
    entropies = list[np.ndarray]()
    for group in fleet.stream(requests):  # images are not kept
        scored.append(group.scores)
        entropies.append(group.rollouts.entropies.mean(1, dtype=np.float64))
    failed, images = failures(scored)
    if failed:
        raise DataError(f"the judge failed on {len(failed)} images; the first: {failed[0]}")

    def compare_all() -> dict[str, float]:
        metrics: dict[str, float] = {}
        for space, theirs in real.features.items():
            prefix = "" if space == MAIN_SPACE else f"{space}/"
            ours = np.concatenate([scores.features[space] for scores in scored])
            found = compare(ours, theirs, config.evaluation.neighbours)
            metrics |= {prefix + name: value for name, value in found.items()}
        return metrics

    metrics = fleet.serve_while(compare_all)
    for name in scored[0].scores:
        metrics[name] = float(np.concatenate([scores.scores[name] for scores in scored]).mean())
    entropy = float(np.concatenate(entropies).mean())
    return metrics | {"entropy": entropy, "images": float(images)}


def compare(generated: np.ndarray, real: np.ndarray, neighbours: int) -> dict[str, float]:
    """Metrics of generated features (M, D) against real ones (N, D)."""
    if generated.shape[1] != real.shape[1]:
        raise DataError(
            f"evaluation.images: its features have {real.shape[1]} dimensions, those of the "
            f"policy's images {generated.shape[1]}: pixels are compared between images of one size"
        )
    ours, theirs = Moments.from_features(generated), Moments.from_features(real)
    near = fidelity(real, generated, neighbours)
    fid = frechet_distance(ours.mean, ours.cov, theirs.mean, theirs.cov)
    return {"fid": fid, **near}


def requests_of(config: RunConfig, spec: SamplingSpec) -> Iterator[SampleRequest]:
    """Requests with the same random numbers for every policy and spec."""
    conditions = config.conditions.conditions()
    per_class = -(-config.evaluation.num_images // len(conditions))
    group = 0
    for condition in conditions:
        for at in range(0, per_class, GROUP):
            yield SampleRequest(
                stream="evaluate",
                iteration=0,
                group=group,
                condition=condition,
                num_rollouts=min(GROUP, per_class - at),
                seed=config.seed,
                spec=spec,
                panel=PANEL,
                image_size=config.evaluation.image_size,
            )
            group += 1
