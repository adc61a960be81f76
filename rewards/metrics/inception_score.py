"""The Inception Score (Salimans et al. 2016, 1606.03498), by torch-fidelity.

The mean over splits of exp(mean_i KL(p_i | mean_j p_j)), p the softmax of an image's logits. Splits
are taken in the images' order, as the ADM evaluator does (its 5,000 images a split are 10 splits of
50,000 images); torch-fidelity's own command shuffles first.

Shapes: N images, C classes, n images of a split.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch

from cluster.errors import DataError
from cluster.model_files.torchvision_ops import ensure_torchvision
from rewards.metrics.intervals import Estimate

BLOCK = 4096  # images at a time


def inception_score(logits: np.ndarray, splits: int) -> Estimate:
    """Inception Score of (N, C) logits.

    Raises:
        DataError: fewer than two images a split.
    """
    if len(logits) < 2 * splits:
        raise DataError(
            f"an Inception Score with splits = {splits} needs at least {2 * splits} images, found "
            f"{len(logits)}: sample more, or set fewer splits"
        )
    bounds = [at * len(logits) // splits for at in range(splits + 1)]
    parts = [logits[start:end] for start, end in pairwise(bounds)]
    value = float(np.mean([_score(part) for part in parts]))
    weights = [len(logits) / (splits * len(part)) for part in parts]
    influences = [weight * _influences(part) for weight, part in zip(weights, parts)]
    return Estimate(value, "images", np.concatenate(influences))


def _score(logits: np.ndarray) -> float:
    """Of one split."""
    ensure_torchvision()  # torch-fidelity imports it
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

    found = isc_features_to_metric(torch.from_numpy(logits), splits=1, shuffle=False)
    return float(found[KEY_METRIC_ISC_MEAN])


def _influences(logits: np.ndarray) -> np.ndarray:
    """(n,) jackknife pseudo-values of one split's score, centred."""
    count = len(logits)
    chances = np.exp(logits - logits.max(1, keepdims=True), dtype=np.float64)
    chances /= chances.sum(1, keepdims=True)
    total, inside = chances.sum(0), -_entropy(chances)
    outside = np.concatenate(
        [
            _entropy((total - chances[at : at + BLOCK]) / (count - 1))
            for at in range(0, count, BLOCK)
        ]
    )
    without = np.exp((inside.sum() - inside) / (count - 1) + outside)
    return (count - 1) * (without.mean() - without)


def _entropy(chances: np.ndarray) -> np.ndarray:
    """Of each row, nats."""
    return -(chances * np.log(np.maximum(chances, 1e-300))).sum(1)
