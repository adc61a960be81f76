"""Rewards that are made for tests: they cost a known time, or say where they run."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

import numpy as np

from cluster.messages import Condition, RolloutGroup, SampleRequest


def drawn(request: SampleRequest, version: int = 0) -> RolloutGroup:
    """A group of one rollout with one token, the group's number."""
    zero = np.zeros((1, 1), np.float32)
    tokens = np.full((1, 1), request.group, np.int32)
    return RolloutGroup(
        request=request, version=version, tokens=tokens, logprobs=zero, entropies=zero
    )


class Brightness:
    """Mean of the pixels, in [0, 1]; every batch takes `seconds`."""

    def __init__(self, device: str, seconds: float = 0.0, warm_seconds: float = 0.0) -> None:
        self.device, self._seconds, self._warm_seconds = device, seconds, warm_seconds
        self.warmed = False

    def warm(self) -> None:
        time.sleep(self._warm_seconds)
        self.warmed = True

    def __call__(self, images: np.ndarray, conditions: Sequence[Condition]) -> np.ndarray:
        if not self.warmed:
            raise RuntimeError("asked before it was warm")
        time.sleep(self._seconds)
        return np.array([image.mean() / 255 for image in images], np.float32)


class SlowPerImage:
    """A scorer of fixed cost: `seconds` for every image, whatever the batch."""

    def __init__(self, device: str, seconds: float = 0.01) -> None:
        self._seconds = seconds

    def __call__(self, images: np.ndarray, conditions: Sequence[Condition]) -> np.ndarray:
        time.sleep(self._seconds * len(images))
        return np.array([float(image[0, 0, 0]) for image in images], np.float32)


class Environment:
    """An environment variable as a number: tells which environment a server has."""

    def __init__(self, device: str, variable: str) -> None:
        self._variable = variable

    def __call__(self, images: np.ndarray, conditions: Sequence[Condition]) -> np.ndarray:
        return np.full(len(images), float(os.environ.get(self._variable, "nan")), np.float32)
