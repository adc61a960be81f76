"""Leave-one-out FID by its definition, one missing image at a time, and scenes to test it on.

Everything starts from the rows of data, and traces of square roots are sums of singular values of
a product of square root factors: no covariance is formed, so nothing small is squared away. `sqrtm`
of a product of covariances keeps half of the digits, and fewer on singular ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rewards.distribution.moments import Moments
from rewards.distribution.reference import Reference


@dataclass(frozen=True)
class Scene:
    """Features (N, D), a history of images, and real ones."""

    x: np.ndarray
    past: np.ndarray
    real: np.ndarray

    @property
    def moments(self) -> Moments:
        return Moments.from_features(self.past)

    @property
    def reference(self) -> Reference:
        return Reference.from_features(self.real)


def scene(
    dim: int,
    count: int,
    history: int,
    real: int | None = None,
    condition: float = 1e2,
    seed: int = 0,
    alike: bool = True,
) -> Scene:
    """Gaussians of a given condition number; `alike`: with the same axes."""
    generator = np.random.default_rng(seed)
    scale = np.logspace(0, -0.5 * np.log10(condition), dim)
    turn = np.linalg.qr(generator.normal(size=(dim, dim)))[0]
    other = turn if alike else np.linalg.qr(generator.normal(size=(dim, dim)))[0]

    def draw(n: int, stretch: float, shift: float, axes: np.ndarray) -> np.ndarray:
        return (generator.normal(size=(n, dim)) * scale * stretch + shift * scale) @ axes

    return Scene(
        draw(count, 0.9, -0.1, other),
        draw(history, 1.1, 0.1, other),
        draw(real or 6 * dim, 1.0, 0.0, turn),
    )


class Oracle:
    """The definition on a scene: mixture decay * past + (1 - decay) * features."""

    def __init__(self, s: Scene, decay: float) -> None:
        self.x, self.past, self.decay = s.x, s.past, decay
        self.mu = s.real.mean(0)
        self.real = _triangle((s.real - self.mu) / np.sqrt(len(s.real)))
        self.old = _triangle((s.past - s.past.mean(0)) / np.sqrt(len(s.past)))

    def fid(self, x: np.ndarray) -> float:
        b = self.decay
        old_mean = self.past.mean(0)
        mean = b * old_mean + (1 - b) * x.mean(0)
        rows = [np.sqrt((1 - b) / len(x)) * (x - mean)]
        spread = (1 - b) * ((x - self.mu) ** 2).sum(1).mean()
        if b:
            rows += [np.sqrt(b) * self.old, np.sqrt(b) * (old_mean - mean)[None]]
            spread += b * ((self.past - self.mu) ** 2).sum(1).mean()
        product = _triangle(np.concatenate(rows)) @ self.real.T
        root_trace = torch.linalg.svdvals(torch.from_numpy(product)).sum().item()
        return spread + (self.real**2).sum() - 2 * root_trace

    def rewards(self, images: Sequence[int] | None = None) -> np.ndarray:
        """Of all images, or of those named."""
        whole = self.fid(self.x)
        images = range(len(self.x)) if images is None else images
        return np.array([self.fid(np.delete(self.x, i, 0)) for i in images]) - whole


def _triangle(rows: np.ndarray) -> np.ndarray:
    """Fewer rows with the same products of columns, without forming those."""
    return np.linalg.qr(rows, mode="r") if len(rows) > rows.shape[1] else rows
