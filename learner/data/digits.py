"""scikit-learn's handwritten digits: 1,797 real 8x8 images of 10 classes, in a fixed split."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from learner.data.splits import Split, stratified_part

CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATE = "a photo of the digit {}"
IMAGE_SIZE = 8
NUM_TRAIN = 1000


def digits(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 8, 8, 3) uint8 and labels (N,) int64 of the "train" (1,000) or "held-out" (797)
    part. The split is stratified, and does not depend on a run's seed."""
    data = load_digits()
    gray = np.round(data.images * (255 / 16)).astype(np.uint8)
    return stratified_part(gray, data.target, split, NUM_TRAIN)


def captions() -> list[str]:
    """The text of each class."""
    return [TEMPLATE.format(name) for name in CLASS_NAMES]


def to_pixels(images: np.ndarray) -> Tensor:
    """(N, H, W, 3) uint8 -> (N, 3, H, W) fp32 in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Mild random affine maps: to 4 degrees, 4 %, a quarter of a pixel; outside is black (-1).

    Cubic interpolation: strokes are a pixel wide, and linear interpolation blurs them. By the
    judge, images so augmented have FID 1 from held-out ones; with linear interpolation and twice
    these ranges they have 16, and networks learn the blur.
    """
    count = len(pixels)

    def uniform(limit: float) -> Tensor:
        return (torch.rand(count, generator=generator) * 2 - 1) * limit

    quarter = 0.5 / pixels.shape[-1]  # of a pixel; coordinates reach from -1 to 1
    angle, scale = uniform(4 * torch.pi / 180), 1 + uniform(0.04)
    shift = torch.stack([uniform(quarter), uniform(quarter)], -1)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    linear = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], 1)
    theta = torch.cat([linear, shift.unsqueeze(-1)], -1)
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    moved = F.grid_sample(pixels + 1, grid, mode="bicubic", align_corners=False) - 1
    return moved.clamp(-1, 1)
