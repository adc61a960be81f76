"""Figures of a set of images, and differences of two sets, from features and scores.

    fid                    in the judge's main feature space; `SPACE/fid` in its others
    sfid                   the same distance of spatial features, as the ADM evaluator computes it
    inception_score        from logits
    precision, recall, density, coverage; SPACE/...    nearest neighbours
    vendi                  in-class diversity in the main space
    clip, hps, ...         means of scores
    entropy, images        mean token entropy in nats; how many images

A figure is there where its inputs are. What its interval means: `intervals.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from cluster.errors import DataError
from cluster.messages import MAIN_SPACE
from rewards.metrics.figures import prefix_of
from rewards.metrics.frechet import frechet_estimate
from rewards.metrics.inception_score import inception_score
from rewards.metrics.intervals import (
    Difference,
    Estimate,
    Figure,
    Units,
    differences,
    intervals,
    mean_estimate,
)
from rewards.metrics.neighbours import neighbourhoods
from rewards.metrics.samples import LOGITS, SPATIAL, RealImages, Samples
from rewards.metrics.vendi import vendi_estimate

__all__ = ["Difference", "Figure", "MetricSettings", "compare", "evaluate"]


@dataclass(frozen=True, kw_only=True)
class MetricSettings:
    """How figures are computed."""

    neighbours: Annotated[int, Field(ge=1)] = 5
    """Number of neighbours (k) of precision, recall, density and coverage; the ADM evaluator's is
    3."""
    splits: Annotated[int, Field(ge=1)] = 10
    """Parts of the shuffled images whose Inception Scores are averaged; 10 of 50,000 images are as
    large as the ADM evaluator's."""
    ddof: Literal[0, 1] = 1
    """FID, sFID: covariances of N features are divided by N - ddof; 1: as FID tools do. Against
    moments of a file it is always 1."""
    bootstrap: Annotated[int, Field(ge=0, le=1_000_000)] = 5000
    """Resamples behind the 95 % intervals; 0: no intervals."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the resamples."""


def evaluate(samples: Samples, real: RealImages, settings: MetricSettings) -> dict[str, Figure]:
    """Figures of a set of images, with 95 % intervals.

    Raises:
        DataError: too few images, values that are not finite, or dimensions that differ.
    """
    found = estimates(samples, real, settings)
    return intervals(found, settings.bootstrap, settings.seed)


def compare(
    first: Samples, second: Samples, real: RealImages, settings: MetricSettings
) -> dict[str, Difference]:
    """Differences of the figures that both sets have: the second's minus the first's.

    Images are paired where both sets have the same conditions in the same order, and conditions
    where both have the same; the real images of recall and coverage are always paired.

    Raises:
        DataError: as `evaluate`.
    """
    found = [estimates(samples, real, settings) for samples in (first, second)]
    return differences(
        found[0], found[1], pairing(first, second), settings.bootstrap, settings.seed
    )


def pairing(first: Samples, second: Samples) -> dict[Units, bool]:
    """Units -> whether they are the same ones in both sets."""
    ours, theirs = first.groups, second.groups
    if ours is None or theirs is None:
        return {"real": True}
    return {
        "images": np.array_equal(ours, theirs),
        "conditions": np.array_equal(_several(ours), _several(theirs)),
        "real": True,
    }


def estimates(samples: Samples, real: RealImages, settings: MetricSettings) -> dict[str, Estimate]:
    """Figures with what intervals are made of."""
    check(samples, real)
    found: dict[str, Estimate] = {}
    for space, features in samples.features.items():
        if space == LOGITS:
            found["inception_score"] = inception_score(features, settings.splits)
        elif space == SPATIAL:
            found |= _of_moments("sfid", space, features, real, settings)
        else:
            prefix = prefix_of(space)
            found |= _of_moments(f"{prefix}fid", space, features, real, settings)
            found |= _of_neighbours(prefix, space, features, real, settings)
    if MAIN_SPACE in samples.features and samples.groups is not None:
        diversity = vendi_estimate(samples.features[MAIN_SPACE], samples.groups)
        found |= {} if diversity is None else {"vendi": diversity}
    for name, scores in samples.scores.items():
        found[name] = mean_estimate(scores, "images", float(scores.mean()))
    if samples.entropies is not None:
        found["entropy"] = mean_estimate(samples.entropies, "images")
    return found | {"images": Estimate(float(len(samples)))}


def _of_moments(
    name: str, space: str, features: np.ndarray, real: RealImages, settings: MetricSettings
) -> dict[str, Estimate]:
    ddof = 1 if space in real.moments else settings.ddof
    reference = real.reference(space, ddof)
    if reference is None:
        return {}
    influences = settings.bootstrap > 0
    return {name: frechet_estimate(features, reference, ddof=ddof, influences=influences)}


def _of_neighbours(
    prefix: str, space: str, features: np.ndarray, real: RealImages, settings: MetricSettings
) -> dict[str, Estimate]:
    if space not in real.features:
        return {}
    k = settings.neighbours
    found = neighbourhoods(real.features[space], features, k, real.radii(space, k))
    inside, around = found.around > 0, found.around / k
    return {
        f"{prefix}precision": mean_estimate(inside, "images", found.precision),
        f"{prefix}recall": _share(found.near, found.recall, found.near_alone),
        f"{prefix}density": mean_estimate(around, "images", found.density),
        f"{prefix}coverage": _share(found.covered, found.coverage, found.covered_alone),
    }


def _share(hit: np.ndarray, value: float, alone: np.ndarray) -> Estimate:
    """A share of (M,) real images, which varies with the (N,) generated ones, too: the jackknife,
    without image j, loses the real images that it alone reaches, the others' balls as they are."""
    losses = alone / len(hit)
    influences = (len(alone) - 1) * (losses - losses.mean())
    return replace(mean_estimate(hit, "real", value), of_images=influences)


def _several(groups: np.ndarray) -> np.ndarray:
    """Conditions of several images, ascending."""
    values, counts = np.unique(groups, return_counts=True)
    return values[counts > 1]


def check(samples: Samples, real: RealImages) -> None:
    """
    Raises:
        DataError: no images, values that are not finite, or counts or dimensions that differ.
    """
    count = len(samples)
    if not count:
        raise DataError("an evaluation needs images: expected features or scores, found none")
    for what, array, dims in _arrays(samples):
        if array.ndim != dims or len(array) != count:
            raise DataError(
                f"{what}: expected {dims}-dimensional values of {count} images, found shape "
                f"{array.shape}"
            )
        _check_finite(what, array)
    for space, features in samples.features.items():
        if space in real.features:
            _check_finite(f"real images' features {space!r}", real.features[space])
        for theirs, source in (
            (real.features[space].shape[1] if space in real.features else None, "real images"),
            (real.moments[space].dim if space in real.moments else None, "reference moments"),
        ):
            if theirs not in (None, features.shape[1]):
                raise DataError(
                    f"features {space!r}: those of the {source} have {theirs} dimensions, those of "
                    f"the evaluated images {features.shape[1]}: both must come from one network "
                    "(and pixels from images of one size)"
                )


def _arrays(samples: Samples) -> list[tuple[str, np.ndarray, int]]:
    found = [(f"features {name!r}", array, 2) for name, array in samples.features.items()]
    found += [(f"scores {name!r}", array, 1) for name, array in samples.scores.items()]
    others: Mapping[str, np.ndarray | None] = {
        "entropies": samples.entropies,
        "classes": samples.classes,
        "conditions": samples.conditions,
    }
    return found + [(name, array, 1) for name, array in others.items() if array is not None]


def _check_finite(what: str, array: np.ndarray) -> None:
    bad = np.flatnonzero(~np.isfinite(array.sum(axis=tuple(range(1, array.ndim)))))
    if len(bad):
        raise DataError(
            f"{what}: values of {len(bad)} of {len(array)} images are not finite: the first are "
            f"images {', '.join(map(str, bad[:5]))}"
        )
