"""LlamaGen's tokenizer against outputs of the official code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from actors.models.vq import VQConfig, VQDecoder, VQTokenizer
from cluster.model_files.tensors import load_strict
from tests.parity.compare import check_close, check_codes, check_images, check_levels
from tests.parity.reference import Reference

FAMILY = "llamagen-vq"


def tolerance(reference: Reference) -> float:
    return 5e-5 if len(reference.model["decoder_ch_mult"]) <= 2 else 2e-4


def config(reference: Reference) -> VQConfig:
    model = reference.model
    assert model["encoder_ch_mult"] == model["decoder_ch_mult"]
    return VQConfig(
        multipliers=tuple(model["decoder_ch_mult"]),
        z_channels=model["z_channels"],
        codebook_size=model["codebook_size"],
        codebook_dim=model["codebook_embed_dim"],
    )


@pytest.fixture(scope="module")
def tokenizer(reference: Reference) -> VQTokenizer:
    tokenizer = VQTokenizer(config(reference))
    load_strict(tokenizer, reference.state(), reference.path.name, ignore=VQTokenizer.UNUSED)
    return tokenizer.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def images(tokenizer: VQTokenizer, reference: Reference) -> Tensor:
    return tokenizer(reference.tensor("decode/codes"))


def test_decoding(images: Tensor, reference: Reference) -> None:
    check_images(reference, images, tolerance(reference))


def test_levels(
    tokenizer: VQTokenizer,
    images: Tensor,
    reference: Reference,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tokenizer, "forward", lambda _: images)
    check_levels(reference, tokenizer.pixels(reference.tensor("decode/codes")))


def test_latents(tokenizer: VQTokenizer, reference: Reference) -> None:
    latents, expected = (
        tokenizer.encode_latents(given(reference)),
        reference.tensor("encode/latent"),
    )
    check_close(latents, expected, tolerance(reference), "latent")


def test_codes(tokenizer: VQTokenizer, reference: Reference) -> None:
    codes = tokenizer.encode(given(reference))
    check_codes(reference, codes, "encode/codes", "encode/margin")


def given(reference: Reference) -> Tensor:
    return reference.tensor("encode/image_uint8").permute(0, 3, 1, 2) / 127.5 - 1


def test_the_decoding_half_is_the_same(tokenizer: VQTokenizer, reference: Reference) -> None:
    decoder = VQDecoder(config(reference))
    load_strict(decoder, reference.state(), reference.path.name, ignore=VQDecoder.UNUSED)
    codes = reference.tensor("decode/codes")[:, :8, :8]
    assert torch.equal(decoder.eval()(codes), tokenizer(codes))


def official_levels(samples: Tensor, image_size_eval: int) -> np.ndarray:
    """What LlamaGen's sample_c2i_ddp.py writes for decoded samples (B, 3, H, W), --image-size-eval
    being given: resized as they come from the decoder, then clamped and cut to whole levels."""
    if image_size_eval != samples.shape[-1]:
        samples = F.interpolate(samples, size=(image_size_eval, image_size_eval), mode="bicubic")
    levels = torch.clamp(127.5 * samples + 128.0, 0, 255).permute(0, 2, 3, 1)
    return levels.to("cpu", dtype=torch.uint8).numpy()


@torch.inference_mode()
def test_resizing_before_rounding(
    tokenizer: VQTokenizer, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--size of actors.sample and evaluation.image_size: 384 to 256 is 2/3; and other sizes."""
    codes = reference.tensor("decode/codes")[:2, :8, :8]
    samples = tokenizer(codes) * 1.5  # beyond [-1, 1]: to be clamped after resizing alone
    monkeypatch.setattr(tokenizer, "forward", lambda _: samples)
    side, differ = samples.shape[-1], 0
    for size in (side * 2 // 3, side // 2, side - 1, side, side + 5):
        expected = official_levels(samples, size)
        np.testing.assert_array_equal(tokenizer.pixels(codes, size).numpy(), expected)
        levels = torch.from_numpy(official_levels(samples, side)).permute(0, 3, 1, 2).float()
        late = F.interpolate(levels, size=(size, size), mode="bicubic").clamp(0, 255)
        differ += int((late.to(torch.uint8).permute(0, 2, 3, 1).numpy() != expected).sum())
    assert differ  # to round first gives other images
