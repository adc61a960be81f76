"""Attention over whole sequences by torch's fused kernels, and the head dimensions they take.

torch chooses a backend for each call. Its choice is narrowed once for the whole process: cuDNN's is
off (`cluster.program.precision.start_computing` says why), since torch's switches belong to the
process, and toggling them around calls would race with other threads. Flash attention then takes
calls without a mask, the memory-efficient one those with a mask. Both need head dimensions that
fill rows of 16 bytes; others are padded here, or torch would fall back to plain products, which
write all scores.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

HEAD_STEP = 8
"""Head dimensions are multiples of this on accelerators: 16 bytes of bf16."""


def padded_head_dim(head_dim: int, device_type: str) -> int:
    """The head dimension, with zeros behind, that fused kernels take; a CPU takes any."""
    return head_dim if device_type == "cpu" else -(-head_dim // HEAD_STEP) * HEAD_STEP


def full_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    head_dim: int | None = None,
) -> Tensor:
    """softmax(query key^T / sqrt(E) + mask) value.

    Args:
        query: (B, H, T, E).
        key, value: (B, H, S, E), or already padded with zeros to `head_dim`.
        mask: broadcasts to (B, H, T, S); bool (True takes part) or added, in the query's dtype.
        causal: query t sees keys 0 to t; not with a mask.
        head_dim: compute with heads of this dimension; None is `padded_head_dim`.

    Returns:
        (B, H, T, E).
    """
    own = query.shape[-1]
    width = head_dim or padded_head_dim(own, query.device.type)
    if width == own:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
    query, key, value = (_padded(each, width) for each in (query, key, value))
    mixed = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=own**-0.5
    )
    return mixed[..., :own]


def _padded(heads: Tensor, width: int) -> Tensor:
    missing = width - heads.shape[-1]
    return F.pad(heads, (0, missing)) if missing else heads
