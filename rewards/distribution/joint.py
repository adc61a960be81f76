"""Features joined with embeddings of their conditions, for the conditional Fréchet distance.

The Fréchet distance of [phi(x), w e(c)] also compares the covariance of features and conditions
(DeVries et al. 2019, Fréchet Joint Distance, 1907.08175). Moments, distance and leave-one-out
rewards use the same functions on longer vectors.

The covariance block of e(c) alone depends only on the drawn conditions. It gives no signal: all
images of a group share c, so it adds a constant to their rewards, which centring removes. Draw
conditions with the reference's frequencies, else it adds a constant to the distance, too.

A class's embedding is a row of `class_table`, a caption's the mean of its text features over its
tokens (`pooled`), centred, on the principal directions of the reference's captions
(`CaptionProjection`).

Shapes: N images, D feature dimensions, E embedding dimensions, C classes, n tokens of a caption,
W width of the text encoder.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy.linalg

from cluster.errors import DataError

KEPT_VARIANCE = 0.99  # of the captions' features, by the automatic number of directions
MOST_DIRECTIONS = 64  # of the automatic number
RANK = 1e-7  # of the largest variance: directions below it are rounding


def joint_features(features_ND: np.ndarray, embeddings_NE: np.ndarray, weight: float) -> np.ndarray:
    """[features, weight * embeddings]: (N, D + E) float64.

    Args:
        features_ND: of the images.
        embeddings_NE: of their conditions, in the same order.
        weight: > 0; see `equal_trace_weight`.

    Raises:
        DataError: not two arrays of the same number of rows.
        ValueError: an impossible weight.
    """
    if not 0 < weight < math.inf:
        raise ValueError(f"the weight of the embeddings must be above 0, found {weight}")
    shapes = np.shape(features_ND), np.shape(embeddings_NE)
    if len(shapes[0]) != 2 or len(shapes[1]) != 2 or shapes[0][0] != shapes[1][0]:
        raise DataError(
            "joint features need features (N, D) and embeddings (N, E) of the same images, found "
            f"shapes {shapes[0]} and {shapes[1]}"
        )
    return np.concatenate([features_ND, weight * np.asarray(embeddings_NE, np.float64)], axis=1)


def class_table(num_classes: int, dim: int = 0, seed: int = 0) -> np.ndarray:
    """Embedding of every class, (C, E) float64, with mean 0 and total variance (C - 1) / C over
    the classes.

    Args:
        num_classes: C >= 2.
        dim: 0 takes centred one-hot vectors, e(c) = onehot(c) - 1/C, so E = C (rank C - 1); for
            many classes, 1 <= dim < C: a fixed random projection onto dim orthonormal directions,
            scaled to the same total variance, which is isotropic.
        seed: of the projection.

    Raises:
        ValueError: an impossible number of classes or dimensions.
    """
    if num_classes < 2:
        raise ValueError(f"an embedding of classes needs at least 2, found {num_classes}")
    if not 0 <= dim < num_classes:
        raise ValueError(
            f"{num_classes} classes embed into 1 to {num_classes - 1} dimensions (or 0: one-hot), "
            f"found {dim}"
        )
    if dim == 0:
        return np.eye(num_classes) - 1 / num_classes
    generator = np.random.Generator(np.random.Philox(key=[seed, num_classes]))
    drawn = generator.normal(size=(num_classes, dim))
    directions, upper = np.linalg.qr(drawn - drawn.mean(0))
    directions *= np.sign(np.diag(upper))  # signs differ between LAPACKs
    return directions * math.sqrt((num_classes - 1) / dim)


def pooled(features_nW: np.ndarray) -> np.ndarray:
    """Mean (W,) float64 of a caption's text features over its tokens, the end token included: what
    Sentence-T5 (Ni et al. 2021, 2108.08877) found best of an encoder alone."""
    return np.asarray(features_nW, np.float64).mean(0)


@dataclass(frozen=True)
class CaptionProjection:
    """Embedding of captions: pooled text features, centred, on principal directions."""

    mean: np.ndarray
    """(W,) of the reference's captions."""
    directions: np.ndarray
    """(W, E) orthonormal."""
    encoder: str = ""
    """Fingerprint of the text encoder; empty if not known."""

    def __post_init__(self) -> None:
        width = len(self.mean)
        if self.mean.shape != (width,) or self.directions.shape[:1] != (width,):
            raise DataError(
                f"an embedding of captions needs a mean (W,) and directions (W, E), found "
                f"{self.mean.shape} and {self.directions.shape}"
            )

    @property
    def dim(self) -> int:
        """E"""
        return self.directions.shape[1]

    def __call__(self, pooled_NW: np.ndarray) -> np.ndarray:
        """Pooled features (N, W) -> embeddings (N, E) float64.

        Raises:
            DataError: features of another width.
        """
        if pooled_NW.ndim != 2 or pooled_NW.shape[1] != len(self.mean):
            raise DataError(
                f"the joint reference embeds caption features of width {len(self.mean)}, found "
                f"shape {pooled_NW.shape}: encode the captions with the reference's text encoder"
            )
        return (pooled_NW - self.mean) @ self.directions

    @classmethod
    def of(
        cls, mean: np.ndarray, cov: np.ndarray, dim: int = 0, encoder: str = ""
    ) -> CaptionProjection:
        """Principal directions of pooled features, the largest variance first.

        Args:
            mean: (W,); cov: (W, W), of the reference's captions.
            dim: number of directions; 0: as many as hold .99 of the variance, at most 64.

        Raises:
            DataError: the features do not vary, or not in so many directions.
        """
        variances, vectors = scipy.linalg.eigh(cov)
        variances, vectors = variances[::-1], vectors[:, ::-1]
        rank = int((variances > RANK * variances[0]).sum()) if variances[0] > 0 else 0
        if rank < max(dim, 1):
            raise DataError(
                f"the reference's captions vary in {rank} directions of their text features, which "
                f"embed into at most as many dimensions, found joint_dim {dim}"
            )
        if not dim:
            share = np.cumsum(variances[:rank]) / variances[:rank].sum()
            dim = min(int(np.searchsorted(share, KEPT_VARIANCE)) + 1, MOST_DIRECTIONS, rank)
        kept = vectors[:, :dim]
        largest = np.take_along_axis(kept, np.abs(kept).argmax(0)[None], axis=0)
        return cls(mean, kept * np.sign(largest), encoder)  # signs differ between LAPACKs


def equal_trace_weight(features_cov: np.ndarray, embeddings_cov: np.ndarray) -> float:
    """Weight w that gives embeddings the features' total variance: w^2 tr S_e = tr S_phi.

    Args:
        features_cov: (D, D); embeddings_cov: (E, E).

    Raises:
        DataError: one of the two does not vary.
    """
    features, embeddings = float(np.trace(features_cov)), float(np.trace(embeddings_cov))
    if not (0 < features < math.inf and 0 < embeddings < math.inf):
        raise DataError(
            "features and embeddings must both vary for weights of equal trace, found traces "
            f"{features:g} and {embeddings:g}"
        )
    return math.sqrt(features / embeddings)
