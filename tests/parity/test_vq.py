"""LlamaGen's tokenizer against outputs of the official code."""

from __future__ import annotations

import pytest
import torch

from actors.models.vq import VQConfig, VQDecoder, VQTokenizer
from cluster.tensors import load_strict
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


def test_decoding(tokenizer: VQTokenizer, reference: Reference) -> None:
    codes = reference.tensor("decode/codes")
    check_images(reference, tokenizer(codes), tolerance(reference))
    check_levels(reference, tokenizer.pixels(codes))


def test_encoding(tokenizer: VQTokenizer, reference: Reference) -> None:
    images = reference.tensor("encode/image_uint8").permute(0, 3, 1, 2) / 127.5 - 1
    expected = reference.tensor("encode/latent")
    check_close(tokenizer.encode_latents(images), expected, tolerance(reference), "latent")
    check_codes(reference, tokenizer.encode(images), "encode/codes", "encode/margin")


def test_the_decoding_half_is_the_same(tokenizer: VQTokenizer, reference: Reference) -> None:
    decoder = VQDecoder(config(reference))
    load_strict(decoder, reference.state(), reference.path.name, ignore=VQDecoder.UNUSED)
    codes = reference.tensor("decode/codes")[:, :8, :8]
    assert torch.equal(decoder.eval()(codes), tokenizer(codes))
