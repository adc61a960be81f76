"""Resizing as other programs do it, so that their features can be had again, on any device.

Shapes: N images, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def to_device(images: np.ndarray, device: str) -> Tensor:
    """(N, H, W, 3) uint8 -> (N, 3, H, W) uint8 on a device."""
    return torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2)


def resize_tensorflow(images: Tensor, size: int) -> Tensor:
    """Bilinear, as TensorFlow 1.x resizes, without half-pixel centres and without antialias.

    Output pixel i is read at i * H / size, so the image moves by up to half a pixel, and when it
    shrinks most of it is never read. FID's Inception was always fed this way, and its numbers
    depend on it. Source: `tf.image.resize_bilinear(align_corners=False)`.

    Args:
        images: (N, 3, H, W) uint8.

    Returns:
        (N, 3, size, size) fp32, in 0..255, not rounded.
    """
    above, below, down = _taps(images.shape[-2], size, images.device)
    left, right, across = _taps(images.shape[-1], size, images.device)

    def rows(chosen: Tensor) -> Tensor:
        part = images[:, :, chosen]
        first = part[..., left].float()
        return first + (part[..., right].float() - first) * across

    top = rows(above)
    return top + (rows(below) - top) * down[:, None]


def _taps(length: int, size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Neighbours (size,) int64 of every output pixel, and how far it is past the first, fp32."""
    scale = torch.tensor(length / size, dtype=torch.float32, device=device)
    places = torch.arange(size, dtype=torch.float32, device=device) * scale
    first = places.long()
    return first, (first + 1).clamp_max(length - 1), places - first


def resize_antialiased(images: Tensor, size: Sequence[int], mode: str) -> Tensor:
    """As PIL resizes 8-bit images: columns, then rows, each rounded to whole levels.

    Args:
        images: (N, 3, H, W) uint8.
        size: height and width.
        mode: "bicubic" or "bilinear".

    Returns:
        (N, 3, *size) fp32, whole numbers in 0..255; PIL's own, but for some single levels where
        its fixed-point weights round the other way.
    """
    pixels = images.float()
    for shape in ((images.shape[-2], size[1]), (size[0], size[1])):
        if tuple(pixels.shape[-2:]) != shape:
            pixels = F.interpolate(
                pixels, size=shape, mode=mode, align_corners=False, antialias=True
            )
            pixels = (pixels + 0.5).floor().clamp(0, 255)
    return pixels


def shortest_side(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width when the shorter side becomes `size`, as torchvision rounds them."""
    long = int(size * max(height, width) / min(height, width))
    return (size, long) if height <= width else (long, size)


def centre_crop(pixels: Tensor, size: int) -> Tensor:
    """The middle (N, 3, size, size) of images at least that large, as torchvision cuts it."""
    top = round((pixels.shape[-2] - size) / 2)
    left = round((pixels.shape[-1] - size) / 2)
    return pixels[..., top : top + size, left : left + size]


def normalise(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(N, 3, H, W) in [0, 1] -> the same less the channels' mean, over their deviation."""
    means = torch.tensor(mean, device=pixels.device).view(3, 1, 1)
    return (pixels - means) / torch.tensor(std, device=pixels.device).view(3, 1, 1)
