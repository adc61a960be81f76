"""The LlamaGen policy: a Llama-style transformer over image tokens (Sun et al. 2024, 2406.06525).

Parameter names are those of the official checkpoints, so that loading is strict and exporting is a
copy. Unlike in the official module, `forward` is always the teacher-forced pass,
`prefill`/`decode_step` always the cached one, and neither depends on `self.training`. For condition
dropout, pass `null_conditions`.

Condition tokens have zero rows in RoPE's cosine *and* sine, so that their q = k = 0: every query
scores them exactly 0 and uses their values unchanged. The n tokens of a caption are therefore one
virtual key with score log n and the mean of their values, and attention inside a caption is a
causal mean. So the cache has one slot for any condition, slot 0, and the passes here run over
[last condition token, image tokens]; a caption's earlier tokens run beside them (`CaptionRows`).

Shapes: B batch, T tokens, V vocabulary, C condition tokens, U distinct captions, H heads,
E head dimension, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actors.kernels import plain
from actors.kernels.attention import full_attention
from actors.kernels.interface import Kernels, Rope
from actors.kernels.plain import cached_attention, rotate
from actors.models.base import (
    Conditioning,
    Conditions,
    DecodeState,
    PolicyArchitecture,
    Readout,
    Window,
    class_of,
)
from actors.models.layers import Head, Linear, RMSNorm, allocate_cache, run_block
from actors.running_sums import cumulative_rows
from actors.text.features import features_of
from cluster.errors import ConfigError, DataError
from cluster.messages import Condition

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries, keys and values (B, H, S, E) -> mixed values (B, H, S, E)."""


@dataclass(frozen=True, kw_only=True)
class LlamaGenConfig(PolicyArchitecture):
    """Architecture of a LlamaGen policy, conditional on classes or on captions."""

    family: ClassVar[str] = "llamagen"
    vocab_size: int = 16384
    num_classes: int = 1000
    """Classes of a class-conditional policy; without meaning for captions."""
    caption_dim: int = 0
    """Width of the text encoder's features (flan-t5-xl: 2048); 0 is a class-conditional policy."""
    caption_tokens: int = 120
    """Longest caption, in tokens of the text encoder."""
    norm_eps: float = 1e-5
    rope_base: float = 10000.0

    def __post_init__(self) -> None:
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 4:
            raise ConfigError(
                f"dim {self.dim} over {self.num_heads} heads gives a head dimension that is not a "
                "multiple of 4, which two-dimensional RoPE over pairs needs"
            )

    @property
    def conditioning(self) -> Conditioning:
        return "caption" if self.caption_dim else "class"

    @property
    def hidden_dim(self) -> int:
        """SwiGLU width: 8/3 of the width, rounded up to a multiple of 256."""
        return -(-int(8 * self.dim / 3) // 256) * 256


class Attention(nn.Module):
    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.wqkv = Linear(config.dim, 3 * config.dim, bias=False)
        self.wo = Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, rope: Rope, attend: Attend, caption: Tensor | None) -> Tensor:
        """x (B, S, dim); rope two (S, E) tables; caption (B, dim): value of slot 0 instead of x's
        own."""
        batch, steps, dim = x.shape
        qkv = self._split(x)
        query, key = rotate(qkv[:2], rope).unbind()
        value = qkv[2]
        if caption is not None:
            first = caption.view(batch, 1, self.num_heads, -1).transpose(1, 2)
            value = torch.cat([first, value[:, :, 1:]], dim=2)
        mixed = attend(query, key, value)
        return self.wo(mixed.transpose(1, 2).reshape(batch, steps, dim))

    def decode(self, x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        """One position: x (B, 1, dim); attend takes what `Kernels.attention` does first."""
        return self.wo(attend(self._split(x)).transpose(1, 2).reshape(x.shape))

    def _split(self, x: Tensor) -> Tensor:
        """Queries, keys and values (3, B, H, S, E), not yet rotated."""
        qkv = self.wqkv(x).view(*x.shape[:2], 3, self.num_heads, -1)
        return qkv.permute(2, 0, 3, 1, 4)

    def values(self, x: Tensor) -> Tensor:
        """Values (..., dim): the only contribution of a condition token."""
        if isinstance(self.wqkv, Linear):
            return F.linear(x, self.wqkv.weight[-x.shape[-1] :])
        return self.wqkv(x)[..., -x.shape[-1] :]  # wrapped by an adapter


class FeedForward(nn.Module):
    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.w1 = Linear(config.dim, config.hidden_dim, bias=False)
        self.w3 = Linear(config.dim, config.hidden_dim, bias=False)
        self.w2 = Linear(config.hidden_dim, config.dim, bias=False)

    def forward(self, x: Tensor, kernels: Kernels = plain) -> Tensor:
        return self.w2(kernels.gated_silu(x, self.w1, self.w3))


class Block(nn.Module):
    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(
        self,
        x: Tensor,
        rope: Rope,
        attend: Attend,
        caption: Tensor | None,
    ) -> Tensor:
        """caption: of this layer, from `CaptionRows.advance`."""
        x = x + self.attention(self.attention_norm(x), rope, attend, caption)
        return x + self.feed_forward(self.ffn_norm(x))

    def decode(
        self, x: Tensor, change: Tensor | None, attend: Callable[[Tensor], Tensor], kernels: Kernels
    ) -> tuple[Tensor, Tensor]:
        """One position. The hidden states are the sum of the first two arguments (B, 1, dim), and
        of both results: the next norm takes the addition with it."""
        x, normed = self.attention_norm.after(x, change, kernels)
        x, normed = self.ffn_norm.after(x, self.attention.decode(normed, attend), kernels)
        return x, self.feed_forward(normed, kernels)

    def captions(self, rows: Tensor, mask: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Captions' rows (U, C, dim) after this layer, and running means (U, C, dim) of their
        values in it; mask and counts of tokens so far (U, C, 1)."""
        values = self.attention.values(self.attention_norm(rows))
        means = (cumulative_rows(values.float() * mask) / counts).type_as(values)
        rows = rows + self.attention.wo(means)
        return rows + self.feed_forward(self.ffn_norm(rows)), means


class ClassEmbedding(nn.Module):
    """Class table; its last row is the null class that guidance and dropout use."""

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(config.num_classes + 1, config.dim)

    def forward(self, classes: Tensor) -> Tensor:
        """(B,) -> (B, 1, dim)"""
        return self.embedding_table(classes).unsqueeze(1)


class CaptionProjection(nn.Module):
    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.caption_dim, config.dim, bias=False)
        self.fc2 = Linear(config.dim, config.dim, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(features), approximate="tanh"))


class CaptionEmbedding(nn.Module):
    """Text features into the policy's width. The empty caption is a buffer, as in the official
    code: it was never trained."""

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.cap_proj = CaptionProjection(config)
        empty = torch.randn(config.caption_tokens, config.caption_dim) / config.caption_dim**0.5
        self.register_buffer("uncond_embedding", empty)
        self.uncond_embedding: Tensor

    def forward(self, features: Tensor) -> Tensor:
        """(U, C, caption_dim) -> (U, C, dim)"""
        return self.cap_proj(features.to(self.uncond_embedding.dtype))


class CaptionRows:
    """Hidden states of U captions, advanced layer by layer beside the image tokens."""

    def __init__(self, rows: Tensor, mask: Tensor, index: Tensor) -> None:
        """rows (U, C, dim); mask (U, C), padded on the left; index (B,) into the captions."""
        self._rows, self._index = rows, index
        self._mask = mask.unsqueeze(-1).float()
        self._counts = mask.unsqueeze(-1).cumsum(1).clamp(min=1).float()

    def advance(self, block: Any) -> Tensor:
        """Apply a `Block` to the captions; returns the mean of their values in it, (B, dim)."""
        self._rows, means = block.captions(self._rows, self._mask, self._counts)
        return means[:, -1][self._index]


class LlamaGen(nn.Module):
    """LlamaGen, class- or caption-conditional. Satisfies `actors.models.base.Policy`."""

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False  # of `forward`, see `run_block`
        embedding = CaptionEmbedding if config.caption_dim else ClassEmbedding
        self.cls_embedding: ClassEmbedding | CaptionEmbedding = embedding(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = Head(config.dim, config.vocab_size)
        cos, sin = rope_tables(config)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)
        self.rope_cos: Tensor
        self.rope_sin: Tensor

    @property
    def num_tokens(self) -> int:
        return self.config.num_tokens

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    def encode(self, conditions: Sequence[Condition]) -> Conditions:
        """Class indices (B,), or captions padded on the left to (U, C, D).

        Raises:
            DataError: a class index or caption features are missing or do not fit.
        """
        device = self.tok_embeddings.weight.device
        if not self.config.caption_dim:
            classes = [class_of(condition, self.config.num_classes) for condition in conditions]
            return Conditions(torch.tensor(classes, device=device))
        distinct = {id(condition.features): condition for condition in conditions}
        captions = [_pad_left(condition, self.config) for condition in distinct.values()]
        places = {key: place for place, key in enumerate(distinct)}
        index = [places[id(condition.features)] for condition in conditions]
        return Conditions(
            torch.stack([features for features, _ in captions]).to(device),
            torch.stack([mask for _, mask in captions]).to(device),
            torch.tensor(index, device=device),
        )

    def null_conditions(self, conditions: Conditions) -> Conditions:
        """The null class; or the empty caption under the prompt's mask, as in the official code:
        unconditional logits depend on the caption's length."""
        if isinstance(self.cls_embedding, CaptionEmbedding):
            empty = self.cls_embedding.uncond_embedding.expand_as(conditions.values)
            return Conditions(empty.to(conditions.values.dtype), conditions.mask, conditions.index)
        return Conditions(torch.full_like(conditions.values, self.config.num_classes))

    def codes(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, grid, grid): raster order."""
        return tokens.view(-1, self.config.grid, self.config.grid)

    def forward(
        self, tokens: Tensor, conditions: Conditions, readout: Readout | None = None
    ) -> Any:
        """Teacher-forced logits (B, T, V) fp32; row t predicts tokens[:, t] from the condition and
        the tokens (B, T) before t. With a readout, its result."""
        first, caption = self._begin(conditions)
        x = torch.cat([first, self.tok_embeddings(tokens[:, :-1])], dim=1)
        bias = _key_bias(conditions, x.shape[1])
        if bias is not None:
            ones = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device)
            bias = bias.masked_fill(~ones.tril(), -torch.inf).to(x.dtype)

        attend = partial(full_attention, mask=bias, causal=bias is None)
        rope = self.rope_cos[: x.shape[1]], self.rope_sin[: x.shape[1]]
        for layer in self.layers:
            shared = caption.advance(layer) if caption else None
            x = run_block(layer, self.checkpointing, x, rope, attend, shared)
        return readout(x, self._logits) if readout else self._logits(x)

    def allocate(self, rows: int, dtype: torch.dtype | None = None) -> DecodeState:
        """An empty KV cache: one slot for the condition, one for each token but the last."""
        config = self.config
        shape = (config.num_layers, rows, config.num_heads, config.num_tokens, config.head_dim)
        return allocate_cache(shape, self.tok_embeddings.weight, dtype)

    def prefill(self, state: DecodeState, conditions: Conditions) -> Tensor:
        """Start decoding: logits (B, V) fp32 of the first token."""
        first, caption = self._begin(conditions)
        state.position, state.bias = 0, _key_bias(conditions, state.cache.shape[4])
        if state.bias is not None:  # rounded as in `forward`, whose mask has the queries' dtype
            state.bias = state.bias.to(first.dtype).float()
        window, x = state.next_window(), first
        rope = self.rope_cos[:1], self.rope_sin[:1]
        for cache, layer in zip(state.cache, self.layers):

            def attend(query: Tensor, key: Tensor, value: Tensor, cache: Tensor = cache) -> Tensor:
                return cached_attention(query, key, value, cache, window)

            x = layer(x, rope, attend, caption.advance(layer) if caption else None)
        state.position = 1
        return self._logits(x[:, -1])

    def decode_step(
        self, state: DecodeState, tokens: Tensor, window: Window | None = None
    ) -> Tensor:
        """Append tokens (B,) to the state; logits (B, V) fp32 of the next ones."""
        window, kernels = window or state.next_window(), state.kernels
        rope = _rows(self.rope_cos, window.slot), _rows(self.rope_sin, window.slot)
        x, change = self.tok_embeddings(tokens).unsqueeze(1), None
        layer: Any
        for cache, layer in zip(state.cache, self.layers):
            attend = partial(kernels.attention, cache=cache, window=window, rope=rope)
            x, change = layer.decode(x, change, attend, kernels)
        state.position += 1
        return self.output(self.norm.after(x, change, kernels)[1][:, -1])

    def _begin(self, conditions: Conditions) -> tuple[Tensor, CaptionRows | None]:
        """The last condition token of each row (B, 1, dim), and the captions."""
        embedded = self.cls_embedding(conditions.values)
        if conditions.mask is None:
            return embedded, None
        index = conditions.value_index()
        return embedded[:, -1:][index], CaptionRows(embedded, conditions.mask, index)

    def _logits(self, x: Tensor) -> Tensor:
        """Hidden states (..., dim) of the last block -> logits (..., V) fp32."""
        return self.output(self.norm(x))


def rope_tables(config: LlamaGenConfig) -> tuple[Tensor, Tensor]:
    """Cosine and signed sine of two-dimensional RoPE, (1+T, E) fp32 each.

    Over interleaved pairs, the first half of the pairs turns with the row and the second with the
    column, raster order. Row 0, the condition's, is zero in both tables: there q = k = 0, so the
    attention score is exactly 0 (not "no rotation"), as in the official code.
    """
    half = config.head_dim // 2
    frequencies = config.rope_base ** (-torch.arange(0, half, 2, dtype=torch.float32) / half)
    turns = torch.outer(torch.arange(config.grid, dtype=torch.float32), frequencies)
    rows = turns[:, None].expand(-1, config.grid, -1)
    columns = turns[None].expand(config.grid, -1, -1)
    angles = torch.cat([rows, columns], dim=-1).flatten(0, 1)  # (T, E/2)
    cos = torch.cat([torch.zeros(1, half), angles.cos()])
    sin = torch.cat([torch.zeros(1, half), angles.sin()])
    return cos.repeat_interleave(2, -1), torch.stack([-sin, sin], -1).flatten(-2)


def _rows(table: Tensor, place: int | Tensor) -> Tensor:
    """One row of a table, (1, E)."""
    return table[place : place + 1] if isinstance(place, int) else table.index_select(0, place)


def _key_bias(conditions: Conditions, slots: int) -> Tensor | None:
    """(B, 1, 1, slots) fp32: log n at slot 0, which stands for the n tokens of a caption."""
    if conditions.mask is None:
        return None
    counts = conditions.mask.sum(-1)[conditions.value_index()]
    return F.pad(counts.log().view(-1, 1, 1, 1), (0, slots - 1))


def _pad_left(condition: Condition, config: LlamaGenConfig) -> tuple[Tensor, Tensor]:
    """Features (C, D), zeros first, and mask (C,)."""
    found = features_of(condition)
    if found is None:
        raise DataError(
            f"this policy is caption-conditional, but the condition {condition.text!r} carries no "
            "features: encode captions with actors.captions first"
        )
    length, width = config.caption_tokens, config.caption_dim
    if found.ndim != 2 or not 1 <= len(found) <= length or found.shape[1] != width:
        raise DataError(
            f"features of the caption {condition.text!r} have shape {found.shape}, expected "
            f"1 to {length} tokens of width {width}"
        )
    features = torch.zeros(length, width)
    features[length - len(found) :] = torch.tensor(found, dtype=torch.float32)
    return features, torch.arange(length) >= length - len(found)
