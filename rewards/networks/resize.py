"""TensorFlow 1.x's resize, which the FID literature's images went through.

Shapes: N images, H W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
