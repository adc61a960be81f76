"""Roles and rewards for tests: they take no time or a known time, or report where they run.
Imports no torch, since each worker process imports this module."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

import numpy as np

from cluster.messages import Condition, RolloutGroup, SampleRequest
from cluster.spans import Span


def drawn(request: SampleRequest, version: int = 0) -> RolloutGroup:
    """A group of one rollout with one token, the group's number."""
    zero = np.zeros((1, 1), np.float32)
    tokens = np.full((1, 1), request.group, np.int32)
    return RolloutGroup(
        request=request, version=version, tokens=tokens, logprobs=zero, entropies=zero
    )


def instant_images(count: int) -> np.ndarray:
    """(count, 32, 32, 3) uint8: what `InstantSampler` answers with."""
    return np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), np.uint8)


class InstantSampler:
    """Answers every request with the same images."""

    def __init__(self, config: object, name: str) -> None:
        self._images = np.zeros((0,))

    def load_weights(self, snapshot: object) -> int:
        return 0

    def sample(self, requests: list[SampleRequest]) -> list[RolloutGroup]:
        (request,) = requests
        empty = np.zeros((request.num_rollouts, 1), np.float32)
        tokens = empty.astype(np.int32)
        return [
            RolloutGroup(request=request, version=0, tokens=tokens, logprobs=empty, entropies=empty)
        ]

    def images(self, group: RolloutGroup) -> tuple[np.ndarray, Span]:
        if len(self._images) != len(group.tokens):
            self._images = instant_images(len(group.tokens))
        return self._images, Span("sampler", "decode", 0.0, 0.0)


class Idle:
    """A role that is never called."""

    def __init__(self, config: object, name: str) -> None:
        pass


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


class HeldBrightness(Brightness):
    """Waits while the file `hold` is there."""

    def __init__(self, device: str, hold: str) -> None:
        super().__init__(device)
        self._hold = hold

    def __call__(self, images: np.ndarray, conditions: Sequence[Condition]) -> np.ndarray:
        while os.path.exists(self._hold):
            time.sleep(0.02)
        return super().__call__(images, conditions)


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
