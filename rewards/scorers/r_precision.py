"""R-precision of captions: whether a CLIP ranks an image's own text first among all the run's.

The measure of the text-to-image literature since AttnGAN (Xu et al. 2018, 1711.10485), there among
100 texts and by a network trained for it. It needs no table of classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from cluster.messages import Condition
from rewards.base import Images
from rewards.scorers.text_image import TextImageScorer

MOST_TEXTS = 1000
"""Texts an image's own is compared with, evenly spaced ones of the run's."""


def distinct_texts(conditions: Sequence[Condition]) -> tuple[Condition, ...]:
    """At most `MOST_TEXTS` conditions of distinct texts, without their features."""
    found: dict[str, Condition] = {}
    for each in conditions:
        found.setdefault(each.text, Condition(text=each.text, class_index=each.class_index))
    every = list(found.values())
    step = max(len(every) / MOST_TEXTS, 1.0)
    return tuple(every[int(at * step)] for at in range(min(len(every), MOST_TEXTS)))


class RPrecision:
    """1 where no other text is as near to the image as its own, else 0.

    Args:
        scorer: its towers, prompts and preprocessing.
        texts: those that an image's own competes with.
    """

    def __init__(self, scorer: TextImageScorer, texts: Sequence[Condition]) -> None:
        self._scorer, self._texts = scorer, texts

    def __call__(self, images: Images, conditions: Sequence[Condition]) -> np.ndarray:
        """N uint8 images and N conditions -> (N,) float32.

        Raises:
            ImageErrors: as the scorer.
        """
        own = self._scorer(images, conditions)
        other = self._scorer.cosines(images, self._texts)
        same = [[text.text == each.text for text in self._texts] for each in conditions]
        best = other.masked_fill(torch.tensor(same, device=other.device), -torch.inf).amax(1)
        return (own > best.cpu().numpy()).astype(np.float32)
