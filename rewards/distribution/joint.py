"""Features joined with embeddings of their conditions, for the conditional Fréchet distance.

The Fréchet distance of [phi(x), w e(c)] also compares the covariance of features and conditions
(DeVries et al. 2019, Fréchet Joint Distance, 1907.08175). Moments, distance and leave-one-out
rewards use the same functions on longer vectors.

The covariance block of e(c) alone depends only on the drawn conditions. It gives no signal: all
images of a group share c, so it adds a constant to their rewards, which centring removes. Draw
conditions with the reference's frequencies, else it adds a constant to the distance, too.

Shapes: N images, D feature dimensions, E embedding dimensions, C classes.
"""

from __future__ import annotations

import math

import numpy as np

from cluster.errors import DataError


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
