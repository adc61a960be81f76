"""Check 9: images of the VQ decoder in TF32 and bf16 against exact fp32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from actors.models.vq import VQDecoder
from cluster.program.precision import fp32_flags
from tests.bench.gpu.decoding import vq_config
from tests.bench.gpu.scene import Scene
from tests.bench.measuring import fastest

CONTRAST = 0.5  # deviation of pixels in [-1, 1]


@torch.inference_mode()
def images(scene: Scene) -> None:
    """144 images of VQ-16: seconds, and how many of 256 levels apart."""
    config = vq_config(scene)
    torch.manual_seed(0)
    decoder = VQDecoder(config).to(scene.device).eval().requires_grad_(False)
    shape = scene.size(144, 2), scene.grid, scene.grid
    codes = torch.randint(config.codebook_size, shape, device=scene.device)
    last = decoder.decoder.conv_out  # random weights give grey images
    last.weight *= CONTRAST / decoder(codes[:2]).float().std()

    exact = decoder.pixels(codes)
    scene.figure("images_fp32_s", fastest([lambda: decoder.pixels(codes)], scene.device, 2)[0])
    with tf32():
        mean, largest = levels(decoder.pixels(codes), exact)
        scene.figure("images_tf32_s", fastest([lambda: decoder.pixels(codes)], scene.device, 2)[0])
    scene.figure("images_tf32_levels", largest)
    half = bf16(decoder)
    mean, largest = levels(half.pixels(codes), exact)
    scene.figure("images_bf16_s", fastest([lambda: half.pixels(codes)], scene.device, 2)[0])
    scene.figure("images_bf16_mean_levels", mean)
    scene.figure("images_bf16_levels", largest)


def levels(found: Tensor, exact: Tensor) -> tuple[float, float]:
    """Mean and largest difference of uint8 images."""
    apart = (found.int() - exact.int()).abs()
    return apart.double().mean().item(), float(apart.max())


def bf16(decoder: VQDecoder) -> VQDecoder:
    return decoder.to(torch.bfloat16)


@contextmanager
def tf32() -> Iterator[None]:
    """TF32 in convolutions and products."""
    places = fp32_flags().values()
    before = [place.fp32_precision for place in places]
    for place in places:
        place.fp32_precision = "tf32"
    try:
        yield
    finally:
        for place, value in zip(places, before):
            place.fp32_precision = value
