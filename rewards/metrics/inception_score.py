"""The Inception Score (Salimans et al. 2016, 1606.03498), by torch-fidelity.

The mean over splits of exp(mean_i KL(p_i | mean_j p_j)), p the softmax of an image's logits. Images
are shuffled before they are split, with torch-fidelity's seed, so the figure is that of its own
command. The ADM evaluator takes ranges of 5,000 images in their order instead, as many as 10 splits
of 50,000 images have: the same up to chance where the order is random. Not where it is not: for
1,000 classes and a score of 370, images in the order of their classes score 66, and images that
alternate between them 400.

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
SHUFFLE_SEED = 2020  # the default of torch-fidelity's rng_seed


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
    order = np.random.RandomState(SHUFFLE_SEED).permutation(len(logits))
    scores, influences = list[float](), np.empty(len(logits))
    for start, end in pairwise(bounds):  # one at a time: torch-fidelity copies them in float64
        part = order[start:end]
        scores.append(_score(logits[part]))
        influences[part] = len(logits) / (splits * len(part)) * _influences(logits[part])
    return Estimate(float(np.mean(scores)), "images", influences)


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
