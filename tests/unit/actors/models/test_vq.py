"""Images decoded in bf16: near those in fp32, by the same rules."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from actors.checkpoints.loading import PolicyConfig, TokenizerConfig, load_decoder, load_policy
from actors.decoding.decode import decode_tokens
from actors.models.vq import VQConfig, VQDecoder, VQTokenizer
from cluster.errors import ConfigError
from cluster.messages import Condition, SamplingSpec
from cluster.model_files.architectures import from_fields

VQ_16 = VQConfig(channels=32, z_channels=32, codebook_size=64)
"""VQ-16 with a quarter of its channels."""


@pytest.fixture
def codes() -> Tensor:
    """Of digits that the shipped policy draws."""
    policy = load_policy(PolicyConfig())
    conditions = [Condition(text="", class_index=row % 10) for row in range(20)]
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(20, policy.num_tokens, dtype=torch.float64, generator=generator)
    return policy.codes(
        decode_tokens(policy, policy.encode(conditions), draws, SamplingSpec()).tokens
    )


@torch.inference_mode()
def test_digits_move_by_a_level_at_most(codes: Tensor) -> None:
    exact = load_decoder(TokenizerConfig())
    half = load_decoder(TokenizerConfig(), dtype=torch.bfloat16)
    assert half(codes).dtype == torch.float32
    moved = (half.pixels(codes).int() - exact.pixels(codes).int()).abs()
    assert moved.max() == 1
    assert (moved == 0).float().mean() > 0.8


@torch.inference_mode()
def test_the_whole_architecture_runs_in_bf16() -> None:
    """With random weights, errors of 4 % of the pixels' spread."""
    torch.manual_seed(0)
    exact = VQDecoder(VQ_16).eval()
    half = copy.deepcopy(exact)
    half.decode_in(torch.bfloat16)
    kinds = {name: tensor.dtype for name, tensor in half.state_dict().items()}
    assert {name for name, kind in kinds.items() if kind == torch.float32} == {
        "quantize.embedding.weight",
        *(
            f"decoder.{layer}.{part}"
            for layer in ("norm_out", "conv_out")
            for part in ("weight", "bias")
        ),
    }
    weight = half.decoder.get_parameter("conv_blocks.0.res.0.conv1.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last)
    codes = torch.randint(0, 64, (2, 4, 4))
    expected, found = exact(codes), half(codes)
    assert found.shape == expected.shape == (2, 3, 64, 64)
    error = (found - expected).abs().mean() / expected.std()
    assert 0 < error < 0.06


@torch.inference_mode()
def test_a_tokenizer_without_blocks_of_its_own_steps() -> None:
    """Of one width only; the file's checks allow it, too."""
    config = VQConfig(
        channels=32, multipliers=(1, 1, 1), num_res_blocks=0, z_channels=32, codebook_size=16
    )
    fields = {name: value for name, value in config.to_dict().items() if name != "family"}
    assert from_fields(VQConfig, fields, "a file") == config
    tokenizer = VQTokenizer(config).eval()
    codes = tokenizer.encode(torch.zeros(2, 3, 28, 28))
    assert codes.shape == (2, 7, 7)
    assert tokenizer(codes).shape == (2, 3, 28, 28)
    with pytest.raises(ConfigError, match=r"multipliers of 1, found \(1, 2\)"):
        VQConfig(channels=32, multipliers=(1, 2), num_res_blocks=0)
