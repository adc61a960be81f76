"""Blocks over packed weights compute what open_clip's do."""

from __future__ import annotations

import pytest
import torch

from cluster.model_files.torchvision_ops import ensure_torchvision
from rewards.networks.packed import PackedAttention, PackedLinear, pack_blocks

WIDTH = 128


def blocks() -> tuple[type[torch.nn.Module], torch.nn.Module]:
    """open_clip's block type, and two blocks of it with uneven attention."""
    ensure_torchvision()
    from open_clip.transformer import ResidualAttentionBlock, Transformer

    torch.manual_seed(0)
    model = Transformer(WIDTH, layers=2, heads=4).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.3)
    return ResidualAttentionBlock, model


@pytest.mark.parametrize("masked", [True, False])
def test_packed_blocks_equal_plain_ones(masked: bool) -> None:
    block_type, model = blocks()
    x = torch.randn(3, 7, WIDTH)
    mask = torch.full((7, 7), -torch.inf).triu(1) if masked else None
    with torch.inference_mode():
        expected = model(x, attn_mask=mask)
        assert pack_blocks(model, block_type) == 2
        found = model(x, attn_mask=mask)
    assert isinstance(model.resblocks[1].attn, PackedAttention)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_packed_blocks_hold_no_second_copy_of_the_weights() -> None:
    block_type, model = blocks()
    pack_blocks(model, block_type)
    kept = {name for name, _ in model.named_parameters()}
    assert all("ln_" in name for name in kept)
    assert sum(isinstance(module, PackedLinear) for module in model.modules()) == 8
    assert model.get_cast_dtype() == torch.float32  # open_clip asks a block for it


def test_blocks_of_another_kind_or_small_stay_as_they_are() -> None:
    ensure_torchvision()
    from open_clip.transformer import ResidualAttentionBlock

    cross = ResidualAttentionBlock(WIDTH, 4, is_cross_attention=True)
    sequence_first = ResidualAttentionBlock(WIDTH, 4, batch_first=False)
    small = ResidualAttentionBlock(64, 4)
    model = torch.nn.Sequential(cross, sequence_first, small)
    assert pack_blocks(model, ResidualAttentionBlock) == 0
    assert type(cross.attn) is torch.nn.MultiheadAttention


def test_layers_with_one_row_and_with_many() -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(48, WIDTH), torch.randn(48)
    for rows in ((1,), (300,), (2, 5)):
        x = torch.randn(*rows, WIDTH)
        with torch.inference_mode():
            found = PackedLinear(weight, bias)(x)
            bare = PackedLinear(weight, None)(x)
        torch.testing.assert_close(found, torch.nn.functional.linear(x, weight, bias))
        torch.testing.assert_close(bare, torch.nn.functional.linear(x, weight))
