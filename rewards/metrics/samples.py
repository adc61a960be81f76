"""What evaluations compare: images as features and scores, in a fixed order.

Spaces: `cluster.messages.MAIN_SPACE` is the judge's main feature space,
`rewards.metrics.figures.SECOND_SPACE` its second; further ones have the names of `judge.further`.
A judge with the FID literature's Inception also has `SPATIAL`, for sFID, and `LOGITS`, for the
Inception Score.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cluster.errors import DataError
from rewards.distribution.reference import Reference
from rewards.metrics.frechet import moments_of
from rewards.metrics.neighbours import kth_distances

SPATIAL = "spatial"
"""Features (N, 2023): the first 7 channels of Inception's mixed_6/conv, 17 x 17 x 7, channels last,
as the ADM evaluator takes them."""
LOGITS = "logits"
"""(N, 1008) logits of the FID literature's Inception, without biases."""


@dataclass(frozen=True)
class Samples:
    """N evaluated images. Image i has the same condition and the same random numbers in every set
    that was sampled with the same settings, so two sets can be compared image by image."""

    features: Mapping[str, np.ndarray]
    """Space -> (N, D) float32."""
    scores: Mapping[str, np.ndarray]
    """Scorer -> (N,) float32."""
    entropies: np.ndarray | None = None
    """(N,) float64 mean token entropy in nats; None for images of unknown origin."""
    classes: np.ndarray | None = None
    """(N,) int64; None: captions, or unknown."""
    conditions: np.ndarray | None = None
    """(N,) integers, equal for images of one condition: of captions, their place in the list; None:
    the classes, or unknown."""

    def __len__(self) -> int:
        sets = (*self.features.values(), *self.scores.values())
        return len(sets[0]) if sets else 0

    @property
    def groups(self) -> np.ndarray | None:
        """(N,) integers, equal for images of one condition; None: unknown."""
        return self.classes if self.conditions is None else self.conditions


@dataclass(frozen=True)
class RealImages:
    """The real images that samples are compared with."""

    features: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Space -> (M, D) float32, for nearest neighbours."""
    moments: Mapping[str, Reference] = field(default_factory=dict)
    """Space -> moments of a larger set than the features, as ADM's files hold; where a space has
    none, the moments are those of the features. Sigma is divided by N - 1, as FID tools do."""
    _kept: dict[tuple[str, int], Any] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def reference(self, space: str, ddof: int) -> Reference | None:
        """Moments of a space, given or of the features; None where it has neither.

        Computed once: many sets are compared with the same images.

        Args:
            ddof: the covariance of N features is divided by N - ddof.

        Raises:
            DataError: no more than ddof features.
        """
        if space in self.moments or space not in self.features:
            return self.moments.get(space)
        key = (f"{space} moments", ddof)
        if key not in self._kept:
            count = len(self.features[space])
            if count <= ddof:
                raise DataError(f"a Fréchet distance needs at least 2 real images, found {count}")
            moments = moments_of(self.features[space])
            cov = moments.cov * (count / (count - ddof)) if ddof else moments.cov
            self._kept[key] = Reference(moments.mean, cov)
        found: Reference = self._kept[key]
        return found

    def radii(self, space: str, neighbours: int) -> np.ndarray:
        """(M,) distances of the features to the `neighbours`-th nearest other; computed once."""
        if (space, neighbours) not in self._kept:
            self._kept[space, neighbours] = kth_distances(self.features[space], neighbours)
        found: np.ndarray = self._kept[space, neighbours]
        return found
