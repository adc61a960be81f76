"""LlamaGen's tokenizer against outputs of the official code."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from actors.models.vq import VQConfig, VQDecoder, VQTokenizer, to_uint8
from cluster.tensors import load_strict
from tests.parity.reference import Reference

FAMILY = "llamagen-vq"
SURE = 1e-3  # margin above which a code is beyond rounding


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


def test_decoding(tokenizer: VQTokenizer, reference: Reference) -> None:
    images = tokenizer(reference.tensor("decode/codes"))
    size, bound = images.shape[-1], tolerance(reference)
    if "decode/image" in reference.arrays:
        views = {"decode/image": images}
    else:
        middle = slice(size // 2 - 16, size // 2 + 16)
        views = {
            "decode/image_grid": images[..., ::8, ::8],
            "decode/image_crop": images[..., middle, middle],
        }
    for name, view in views.items():
        assert (view - reference.tensor(name)).abs().max() <= bound, name
    for name, found in (
        ("mean", images.double().mean((2, 3))),
        ("std", images.double().std((2, 3), correction=0)),
    ):
        expected = reference.tensor(f"decode/image_{name}")
        assert (found - expected).abs().max() <= (1e-5 if bound == 5e-5 else 5e-5), name
    levels = to_uint8(images).numpy().astype(int)
    apart = np.abs(levels - reference.arrays["decode/image_uint8"])
    assert apart.max() <= 1
    assert (apart == 0).mean() >= 0.999


def test_encoding(tokenizer: VQTokenizer, reference: Reference) -> None:
    images = reference.tensor("encode/image_uint8").permute(0, 3, 1, 2) / 127.5 - 1
    latents = tokenizer.encode_latents(images)
    assert (latents - reference.tensor("encode/latent")).abs().max() <= tolerance(reference)
    sure = reference.tensor("encode/margin") > SURE
    codes = tokenizer.encode(images)
    assert torch.equal(codes[sure], reference.tensor("encode/codes")[sure])


def test_the_decoding_half_is_the_same(tokenizer: VQTokenizer, reference: Reference) -> None:
    decoder = VQDecoder(config(reference))
    load_strict(decoder, reference.state(), reference.path.name, ignore=VQDecoder.UNUSED)
    codes = reference.tensor("decode/codes")[:, :8, :8]
    assert torch.equal(decoder.eval()(codes), tokenizer(codes))
