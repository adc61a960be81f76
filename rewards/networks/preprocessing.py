"""Image preprocessing of models on the device, in batches, bit for bit as on the host.

open_clip's evaluation transform resizes 8-bit images with Pillow on the host. These functions give
the same pixels. Pillow resamples in two passes, one a side: sums of pixels times coefficients of 22
fractional bits, rounded and clamped to 8 bits. Such sums are exact in float64, so they equal a
product with the matrix of coefficients. The side that comes first affects the rounding; it depends
on the sizes and Pillow's version, and is found by trying Pillow once for each pair of sizes. Rows
and columns outside the crop are not computed: a 2 x 5000 image is cheap.

Shapes: N images, H W their pixels, h w the model's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cluster.errors import CheckpointError

ResizeMode = Literal["shortest", "longest", "squash"]
BITS = 22  # fractional bits of Pillow's coefficients for 8-bit images
Filter = Literal["bicubic", "bilinear"]
SUPPORT: dict[Filter, float] = {
    "bicubic": 2.0,
    "bilinear": 1.0,
}  # of the filters, in source pixels when enlarging
CUBIC = -0.5  # the parameter of Pillow's bicubic filter
PROBES = 16
_KNOWN = {"size", "mode", "mean", "std", "interpolation", "resize_mode", "fill_color"}


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """The evaluation transform of an open_clip model, or of one of timm's."""

    size: tuple[int, int]
    """Height and width of the model's input, pixels."""
    mean: tuple[float, ...]
    """Of each channel, for pixels in [0, 1]."""
    std: tuple[float, ...]
    resize_mode: ResizeMode = "shortest"
    """shortest: the shorter side to the model's, then a centre crop. longest: the longer side, then
    padding. squash: both sides."""
    interpolation: Filter = "bicubic"
    fill: int = 0
    """Value of padded pixels before normalisation, 0 to 255."""
    scale: int = 0
    """Side of the resized square, which is cropped to `size`; 0 is `size`."""

    @property
    def fingerprint(self) -> str:
        """Identifies everything that affects the pixels."""
        numbers = ",".join(f"{value:g}" for value in (*self.mean, *self.std))
        sides = "x".join(str(side) for side in self.size)
        padding = f"-fill{self.fill}" if self.resize_mode == "longest" else ""
        way = f"{self.interpolation}-{self.resize_mode}{self.scale or ''}{padding}"
        return f"{way}-{sides}-{numbers}"

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Preprocess:
        """From open_clip's `visual.preprocess_cfg`.

        Raises:
            CheckpointError: a transform that is not reproduced here.
        """
        unknown = sorted(set(config) - _KNOWN)
        mode, filtering = config["resize_mode"], config["interpolation"]
        if filtering == "random":  # in training; bicubic in evaluation
            filtering = "bicubic"
        if (
            unknown
            or config.get("mode", "RGB") != "RGB"
            or mode not in ("shortest", "longest", "squash")
            or filtering not in SUPPORT
        ):
            raise CheckpointError(
                f"the model's preprocess_cfg {dict(config)} asks for a transform that is not "
                "reproduced here (expected mode RGB, resize_mode shortest, longest or squash, "
                f"interpolation {', '.join(SUPPORT)} or random, and no keys but {sorted(_KNOWN)}): "
                "set preprocessing to 'host' for open_clip's own transform"
            )
        size = config["size"]
        height, width = (size, size) if isinstance(size, int) else size
        return cls(
            size=(height, width),
            mean=_channels(config["mean"]),
            std=_channels(config["std"]),
            resize_mode=mode,
            # open_clip passes no filter on where the model's image is not square
            interpolation="bicubic" if mode == "shortest" and height != width else filtering,
            fill=config.get("fill_color", 0),
        )


def preprocess(images: Tensor, config: Preprocess) -> Tensor:
    """(N, H, W, 3) uint8 -> (N, 3, h, w) fp32, normalised: open_clip's transform of each image.

    Raises:
        ValueError: a side would shrink to nothing (see `fault`).
    """
    pixels = fit(images.permute(0, 3, 1, 2), config)
    return normalise(in_unit_range(pixels), config.mean, config.std)


def to_device(images: np.ndarray, device: str | torch.device) -> Tensor:
    """(n, H, W, 3) uint8 on a device; copied, because the array may be read-only shared memory."""
    return torch.tensor(images, device=device)


def fault(height: int, width: int, config: Preprocess) -> str | None:
    """Why an image of that size cannot be preprocessed, or None."""
    if min(scaled_size(height, width, config)) > 0:
        return None
    return too_narrow(height, width, max(config.size))


def too_narrow(height: int, width: int, size: int) -> str:
    """Message for an image whose shorter side rounds to 0."""
    return (
        f"an image of {height} x {width} pixels is too narrow: with its longer side scaled to "
        f"{size}, the shorter one rounds to 0 pixels"
    )


def normalise(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(N, 3, h, w) in [0, 1] -> (pixels - mean) / std."""
    mean_C11, std_C11 = (
        _constants(values, pixels.dtype, pixels.device).view(-1, 1, 1) for values in (mean, std)
    )
    return (pixels - mean_C11) / std_C11


def in_unit_range(pixels: Tensor) -> Tensor:
    """uint8 -> fp32 in [0, 1]. Divides by a tensor: by a number, torch multiplies with the rounded
    reciprocal on a GPU, whose last bit differs from the host's."""
    return pixels.float() / _constants((255.0,), torch.float32, pixels.device)


@functools.lru_cache(maxsize=128)
def _constants(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """(n,) on the device; kept, since each upload waits for all work before it."""
    return torch.tensor(values, dtype=dtype, device=device)


def fit(images: Tensor, config: Preprocess) -> Tensor:
    """Resize, then crop or pad about the centre: (N, 3, H, W) uint8 -> (N, 3, h, w) uint8."""
    height, width = images.shape[-2:]
    sizes = scaled_size(height, width, config)
    if min(sizes) < 1:
        raise ValueError(too_narrow(height, width, max(config.size)))
    windows = [_window(full, target) for full, target in zip(sizes, config.size)]
    first = first_axis(height, width, *sizes, config.interpolation)
    for axis in (first, 1 - first):
        start, stop, *_ = windows[axis]
        images = _resample(images, axis - 2, sizes[axis], start, stop, config.interpolation)
    (_, _, top, bottom), (_, _, left, right) = windows
    if not (top or bottom or left or right):
        return images
    return F.pad(images, (left, right, top, bottom), value=config.fill)


def scaled_size(height: int, width: int, config: Preprocess) -> tuple[int, int]:
    """Height and width after resizing, before the crop or the padding.

    As torchvision's `Resize` computes it for square models (the longer side is cut down to an
    integer), and as open_clip's `ResizeKeepRatio` for others (both sides are rounded).
    """
    if config.resize_mode == "squash":
        return (config.scale, config.scale) if config.scale else config.size
    if config.resize_mode == "shortest" and config.size[0] == config.size[1]:
        size = config.scale or config.size[0]
        longer = int(size * max(height, width) / min(height, width))
        return (longer, size) if width <= height else (size, longer)
    ratios = height / config.size[0], width / config.size[1]
    ratio = max(ratios) if config.resize_mode == "longest" else min(ratios)
    return round(height / ratio), round(width / ratio)


def _window(full: int, target: int) -> tuple[int, int, int, int]:
    """First and last (exclusive) pixel kept of a side, and the padding before and after it."""
    if full >= target:
        start = round((full - target) / 2.0)
        return start, start + target, 0, 0
    return 0, full, (target - full) // 2, (target - full + 1) // 2


@functools.lru_cache(maxsize=4096)
def first_axis(height: int, width: int, new_height: int, new_width: int, filtering: Filter) -> int:
    """The side that the installed Pillow resizes first: 0 the height, 1 the width.

    Older versions start with the width; newer ones (13) with the height if that shrinks much more.

    Raises:
        CheckpointError: neither order gives Pillow's pixels.
    """
    if new_height >= height or new_width == width:
        return 1
    generator = np.random.default_rng(0)
    resample = Image.Resampling.BICUBIC if filtering == "bicubic" else Image.Resampling.BILINEAR
    sizes, candidates = (new_height, new_width), {1, 0}
    for _ in range(PROBES):  # one suffices, except for images of a few pixels
        probe = generator.integers(0, 256, (height, width, 3), np.uint8)
        resized = Image.fromarray(probe).resize((new_width, new_height), resample)
        theirs = torch.from_numpy(np.array(resized)).permute(2, 0, 1)
        for first in tuple(candidates):
            ours = torch.from_numpy(probe).permute(2, 0, 1)
            for axis in (first, 1 - first):
                ours = _resample(ours, axis - 2, sizes[axis], 0, sizes[axis], filtering)
            if not torch.equal(ours, theirs):
                candidates.discard(first)
        if len(candidates) == 1:
            return candidates.pop()
        if not candidates:
            raise CheckpointError(
                f"Pillow {PIL.__version__} resizes {height} x {width} to {new_height} x "
                f"{new_width} pixels in a way that is not reproduced here: set preprocessing to "
                "'host', which leaves it to Pillow"
            )
    return 1


def _resample(
    images: Tensor, axis: int, full: int, start: int, stop: int, filtering: Filter
) -> Tensor:
    """One pass of Pillow's resize: pixels start..stop of an axis (-1 or -2) resized to `full`."""
    source = images.shape[axis]
    if source == full:
        return images.narrow(axis, start, stop - start)
    weights = _weights(source, full, start, stop, filtering, images.device)
    wide = images.double()
    sums = wide @ weights.T if axis == -1 else weights @ wide
    return sums.add_(1 << (BITS - 1)).mul_(2.0**-BITS).floor_().clamp_(0, 255).to(torch.uint8)


@functools.lru_cache(maxsize=128)
def _weights(
    source: int, full: int, start: int, stop: int, filtering: Filter, device: torch.device
) -> Tensor:
    """Pillow's coefficients of output pixels start..stop, (stop - start, source) float64.

    Integers, 2^22 times the filter's weights, rounded half away from zero (Pillow's Resample.c).
    """
    scale = source / full
    stretch = max(scale, 1.0)  # antialiasing: shrinking widens the filter
    support = SUPPORT[filtering] * stretch
    kernel = _cubic if filtering == "bicubic" else _triangle
    rows = torch.zeros(stop - start, source, dtype=torch.float64)
    for row, place in enumerate(range(start, stop)):
        centre = (place + 0.5) * scale
        low = max(int(centre - support + 0.5), 0)
        high = min(int(centre + support + 0.5), source)
        taps = [kernel((x - centre + 0.5) * (1.0 / stretch)) for x in range(low, high)]
        total = sum(taps)
        # Pillow does not normalise taps that sum to zero.
        taps = [tap / total if total else tap for tap in taps]
        fixed = [math.trunc(tap * (1 << BITS) + math.copysign(0.5, tap)) for tap in taps]
        rows[row, low:high] = torch.tensor(fixed, dtype=torch.float64)
    return rows.to(device)


def _cubic(x: float) -> float:
    x = abs(x)
    if x < 1:
        return ((CUBIC + 2) * x - (CUBIC + 3)) * x * x + 1
    if x < 2:
        return (((x - 5) * x + 8) * x - 4) * CUBIC
    return 0.0


def _triangle(x: float) -> float:
    return max(1.0 - abs(x), 0.0)


def _channels(values: Any) -> tuple[float, ...]:
    return tuple(values) if isinstance(values, (list, tuple)) else (values,) * 3


def fit_floats(images: Tensor, size: int) -> Tensor:
    """HPSv2's resize: to float, the longer side to `size`, zero padding about the centre.

    Bicubic with antialiasing on floats (torchvision's `resize` of a tensor), without rounding.
    Images whose longer side is `size` are padded, too; the hpsv2 package does not, and its model
    then fails unless they are square.

    Args:
        images: (N, H, W, 3) uint8.

    Returns:
        (N, 3, size, size) fp32, about [0, 1].
    """
    pixels = in_unit_range(images.permute(0, 3, 1, 2).contiguous())
    height, width = pixels.shape[-2:]
    new = longest_size(height, width, size)
    if min(new) < 1:
        raise ValueError(too_narrow(height, width, size))
    if new != (height, width):
        pixels = F.interpolate(
            pixels, size=new, mode="bicubic", align_corners=False, antialias=True
        )
    rows, columns = size - new[0], size - new[1]
    top, left = rows // 2, columns // 2
    return F.pad(pixels, (left, columns - left, top, rows - top))


def longest_size(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width with the longer side `size`, rounded as hpsv2's `ResizeMaxSize`."""
    scale = size / float(max(height, width))
    if scale == 1.0:
        return height, width
    return round(height * scale), round(width * scale)
