"""Transformer blocks of open_clip with oneDNN's packed weights: several times faster on a CPU.

On some processors torch's default library for fp32 products reaches a third of oneDNN's speed, and
converts the weight's layout in every product. Here the packed weights replace the plain ones, so
memory stays the same.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MIN_WEIGHTS = 1 << 16  # of a layer; smaller ones are not faster


class PackedLinear(nn.Module):
    """`nn.Linear` for inference with the weight in oneDNN's blocked layout."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
        self.bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class PackedAttention(nn.Module):
    """Self-attention of an `nn.MultiheadAttention` with (N, L, D) inputs, for inference."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads = attention.num_heads
        self.project_in = PackedLinear(attention.in_proj_weight, attention.in_proj_bias)
        self.project_out = PackedLinear(attention.out_proj.weight, attention.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """(N, L, D) three times the same tensor -> (N, L, D), and no attention weights."""
        assert query is key is value
        assert not need_weights
        rows, length, width = query.shape
        split = self.project_in(query).view(rows, length, 3, self.heads, width // self.heads)
        q, k, v = split.permute(2, 0, 3, 1, 4)
        mixed = _attend(q, k, v, attn_mask)
        return self.project_out(mixed.transpose(1, 2).reshape(rows, length, width)), None


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """(N, H, L, E) three times -> (N, H, L, E)."""
    if query.dtype == torch.float32:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    # In bf16 oneDNN's products take half the time of torch's fused CPU kernel.
    logits = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    return (logits if mask is None else logits + mask).softmax(-1) @ value


def pack_blocks(model: nn.Module, block_type: type[nn.Module]) -> int:
    """Replace the attention and the linear layers of self-attention blocks, in place.

    Args:
        model: in eval mode, on the CPU; afterwards it runs under `torch.inference_mode` only, and
            cannot be saved or moved.
        block_type: open_clip's `ResidualAttentionBlock`.

    Returns:
        Number of packed blocks; small ones stay, and all if this machine's oneDNN does not support
        the model's dtype.
    """
    blocks: list[Any] = [
        block for block in model.modules() if type(block) is block_type and _plain(block)
    ]
    if not torch.backends.mkldnn.is_available():
        return 0
    half = any(block.mlp.c_fc.weight.dtype == torch.bfloat16 for block in blocks)
    if half and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return 0
    for block in blocks:
        block.attn = PackedAttention(block.attn)
        for name in ("c_fc", "c_proj"):
            layer = getattr(block.mlp, name)
            setattr(block.mlp, name, PackedLinear(layer.weight, layer.bias))
    return len(blocks)


def _plain(block: Any) -> bool:
    attention = block.attn
    return (
        type(attention) is nn.MultiheadAttention
        and attention.batch_first
        and attention.in_proj_weight is not None
        and attention.bias_k is None
        and not attention.add_zero_attn
        and not hasattr(block, "ln_1_kv")
        and block.mlp.c_fc.weight.numel() >= MIN_WEIGHTS
    )
