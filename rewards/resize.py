"""Resizing as other programs do it, so that their features can be had again, on any device.

Shapes: N images, H W pixels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor

ONE = 2.0**22  # PIL's fixed point for 8-bit images
PILLOW = int(PIL.__version__.partition(".")[0])


def to_device(images: np.ndarray, device: str) -> Tensor:
    """(N, H, W, 3) uint8 -> (N, 3, H, W) uint8 on a device."""
    whole = np.require(images, requirements=["C", "W"])  # what a process was sent is read-only
    return torch.from_numpy(whole).to(device).permute(0, 3, 1, 2)


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


def resize_pil(images: Tensor, size: Sequence[int], mode: str) -> Tensor:
    """As the installed Pillow resizes 8-bit images: by itself on a CPU, where it is the fastest,
    and by `resize_fixed_point`, which gives the same to the bit, elsewhere.

    Args:
        images: (N, 3, H, W) uint8.
        size: height and width.
        mode: "bicubic" or "bilinear".

    Returns:
        (N, 3, *size) fp32, whole numbers in 0..255.
    """
    if images.device.type != "cpu":
        return resize_fixed_point(images, size, mode)
    height, width = size
    resized = [
        np.asarray(Image.fromarray(image).resize((width, height), KERNELS[mode].filter))
        for image in images.permute(0, 2, 3, 1).numpy()
    ]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float()


def resize_fixed_point(images: Tensor, size: Sequence[int], mode: str) -> Tensor:
    """`resize_pil` with tensors: one axis after the other, each rounded to whole levels.

    The weights are PIL's, in fixed point. Their products with pixels and the sums of these are
    integers below 2^53, so fp64 holds them exactly, in any order of summation.
    """
    pixels, before = images, images.shape[-2:]
    axes = (-2, -1) if _rows_first(before, size) else (-1, -2)
    for axis in axes:
        if before[axis] != size[axis]:
            weights = _pil_weights(before[axis], size[axis], mode).to(pixels.device)
            exact = pixels.double()
            pixels = _whole(weights @ exact if axis == -2 else exact @ weights.T)
    return pixels.float()


def _rows_first(before: Sequence[int], size: Sequence[int]) -> bool:
    """Pillow 13 began to resize rows first where the height shrinks by more than twice what the
    width does; which comes first moves some pixels by some levels."""
    shrinks = before[0] > size[0] and before[0] - size[0] > 2 * (before[1] - size[1])
    return shrinks and PILLOW >= 13


def _whole(sums: Tensor) -> Tensor:
    """Fixed point to the nearest level, (…) fp64; halves go up."""
    return (sums / ONE + 0.5).floor().clamp(0, 255)


@functools.lru_cache(maxsize=64)
def _pil_weights(length: int, size: int, mode: str) -> Tensor:
    """Weight of every input pixel in every output pixel, (size, length) fp64 of whole numbers.

    The kernel stretches where the image shrinks, is cut off at the borders, and is normalised.
    """
    stretch = max(length / size, 1.0)
    reach = KERNELS[mode].reach * stretch
    centres = (np.arange(size) + 0.5) * (length / size)
    first = np.maximum((centres - reach + 0.5).astype(int), 0)[:, None]
    last = np.minimum((centres + reach + 0.5).astype(int), length)[:, None]
    places = np.arange(length)
    weights = KERNELS[mode].weight((places - centres[:, None] + 0.5) * (1.0 / stretch))
    weights[(places < first) | (places >= last)] = 0
    weights *= 1.0 / weights.sum(1, keepdims=True)
    return torch.from_numpy(np.trunc(weights * ONE + np.copysign(0.5, weights)))


def _triangle(x: np.ndarray) -> np.ndarray:
    return np.maximum(1 - np.abs(x), 0)


def _cubic(x: np.ndarray) -> np.ndarray:
    """Keys's kernel with a = -1/2."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


class Kernel(NamedTuple):
    weight: Callable[[np.ndarray], np.ndarray]
    reach: float
    """pixels to either side"""
    filter: Image.Resampling


KERNELS = {
    "bilinear": Kernel(_triangle, 1.0, Image.Resampling.BILINEAR),
    "bicubic": Kernel(_cubic, 2.0, Image.Resampling.BICUBIC),
}


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
