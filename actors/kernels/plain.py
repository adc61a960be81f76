"""The kernels in plain PyTorch: what CPUs run, and the reference of the fused ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actors.distribution import log_distribution, mixed_logits, sample_tokens
from actors.kernels.attention import full_attention
from actors.kernels.interface import Rope, Window
from cluster.messages import SamplingSpec

live_slots = False


def attention(
    qkv: Tensor | Sequence[Tensor], cache: Tensor, window: Window, rope: Rope | None = None
) -> Tensor:
    query, key, value = qkv
    if rope is not None:
        assert isinstance(qkv, Tensor)
        query, key = rotate(qkv[:2], rope).unbind()
    return cached_attention(query, key, value, cache, window)


def cached_attention(
    query: Tensor, key: Tensor, value: Tensor, cache: Tensor, window: Window
) -> Tensor:
    """Write keys and values into the cache and attend to the window; one query a row.

    Args:
        query, key, value: (B, H, 1, E).
        cache: (2, B, H, S, W) of this layer; W >= E, see `padded_head_dim`.

    Returns:
        (B, H, 1, E) in the query's dtype.
    """
    write_cache(cache, key, value, window.slot)
    keys, values = cache[:, :, :, : window.size].unbind()
    wide = query.to(cache.dtype)
    bias = None if window.bias is None else window.bias.to(cache.dtype)
    if query.device.type != "cpu" or cache.shape[-1] != query.shape[-1]:
        return full_attention(wide, keys, values, mask=bias, head_dim=cache.shape[-1]).type_as(
            query
        )
    scores = wide @ keys.transpose(-1, -2) * query.shape[-1] ** -0.5  # plain products beat SDPA
    if bias is not None:
        scores = scores + bias
    return (scores.softmax(-1) @ values).type_as(query)


def write_cache(cache: Tensor, key: Tensor, value: Tensor, place: int | Tensor) -> None:
    """Copy keys and values (B, H, n, E) to slots `place`, place + 1, ... of (2, B, H, S, W)."""
    for half, new in zip(cache.unbind(), (key, value)):
        if isinstance(place, int):
            half[:, :, place : place + new.shape[2], : new.shape[3]] = new
        else:
            half[..., : new.shape[3]].index_copy_(2, place, new.to(half.dtype))


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotate pairs (x0, x1) -> (x0 cos - x1 sin, x1 cos + x0 sin), in fp32; x (..., S, E), tables
    (S, E)."""
    cos, sin = rope
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(x.float() * cos, swapped.float(), sin).type_as(x)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Statistics in fp32, cast back, then times the weight."""
    return F.rms_norm(x.float(), x.shape[-1:], eps=eps).type_as(x) * weight


def add_rms_norm(
    x: Tensor, change: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    x = x if change is None else x + change
    return x, rms_norm(x, weight, eps)


def gated_silu(x: Tensor, w1: nn.Module, w3: nn.Module) -> Tensor:
    return F.silu(w1(x)) * w3(x)


def draw(logits: Tensor, uniforms: Tensor, spec: SamplingSpec) -> tuple[Tensor, Tensor, Tensor]:
    logp, entropies = log_distribution(mixed_logits(logits, spec), spec)
    tokens = sample_tokens(logp, uniforms)
    return tokens, logp.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), entropies
