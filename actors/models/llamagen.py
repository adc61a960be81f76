"""The LlamaGen policy: a Llama-style transformer over image tokens (Sun et al. 2024, 2406.06525).

Parameter names are those of the official checkpoints, so that loading is strict and exporting is a
copy. Unlike the official module, layout, dropout, mode and cache are separate: `forward` is always
the teacher-forced pass, `prefill`/`decode_step` always the cached one, and neither depends on
`self.training`. Condition dropout is the caller's: pass `num_classes` as the class (the null row).

Shapes: B batch, T tokens, V vocabulary, C condition tokens, H heads, E head dimension, L layers.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluster.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LlamaGenConfig:
    """Architecture of a class-conditional LlamaGen."""

    dim: int
    num_layers: int
    num_heads: int
    grid: int
    """Side of the token grid: T = grid * grid."""
    vocab_size: int = 16384
    num_classes: int = 1000
    norm_eps: float = 1e-5
    rope_base: float = 10000.0

    def __post_init__(self) -> None:
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 4:
            raise ConfigError(
                f"dim {self.dim} over {self.num_heads} heads gives a head dimension that is not a "
                "multiple of 4, which two-dimensional RoPE over pairs needs"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def num_tokens(self) -> int:
        return self.grid * self.grid

    @property
    def hidden_dim(self) -> int:
        """SwiGLU width: 8/3 of the width, rounded up to a multiple of 256."""
        return -(-int(8 * self.dim / 3) // 256) * 256

    def to_dict(self) -> dict:
        return {"family": "llamagen", **dataclasses.asdict(self)}


class RMSNorm(nn.Module):
    """Statistics in fp32, cast back, then times the weight (the order matters in bf16)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).type_as(x) * self.weight


class Attention(nn.Module):
    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.wqkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], cache: Tensor | None, start: int
    ) -> Tensor:
        """x (B, S, dim); rope two (S, E) tables; cache (2, B, H, C+T, E) or None."""
        batch, steps, dim = x.shape
        qkv = self.wqkv(x).view(batch, steps, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        query, key = _rotate(qkv[:2], rope).unbind()
        value = qkv[2]
        if cache is not None:
            cache[0, :, :, start : start + steps] = key
            cache[1, :, :, start : start + steps] = value
            key, value = cache[0, :, :, : start + steps], cache[1, :, :, : start + steps]
        if steps == 1:  # one query sees every key: no mask, and plain products beat SDPA on a CPU
            weights = (query @ key.transpose(-1, -2) * key.shape[-1] ** -0.5).softmax(-1)
            mixed = weights @ value
        else:
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.wo(mixed.transpose(1, 2).reshape(batch, steps, dim))


class FeedForward(nn.Module):
    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.w2 = nn.Linear(config.hidden_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], cache: Tensor | None, start: int
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope, cache, start)
        return x + self.feed_forward(self.ffn_norm(x))


class ClassEmbedding(nn.Module):
    """Class table; its last row is the null class that guidance and dropout use."""

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(config.num_classes + 1, config.dim)

    def forward(self, classes: Tensor) -> Tensor:
        return self.embedding_table(classes).unsqueeze(1)


@dataclass
class DecodeState:
    """KV cache of a batch and how far it is filled."""

    cache: Tensor
    """(L, 2, B, H, C+T, E)"""
    position: int


class LlamaGen(nn.Module):
    """Class-conditional LlamaGen. Satisfies `actors.decode.Policy`."""

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.config = config
        self.cls_embedding = ClassEmbedding(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
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

    def null_conditions(self, conditions: Tensor) -> Tensor:
        """Conditions of the unconditional branch, one for each of `conditions` (B,)."""
        return torch.full_like(conditions, self.config.num_classes)

    def forward(self, tokens: Tensor, conditions: Tensor) -> Tensor:
        """Teacher-forced logits.

        Args:
            tokens: (B, T) integers.
            conditions: (B,) class indices; `num_classes` is the null class.

        Returns:
            (B, T, V) fp32; row t predicts tokens[:, t] from the condition and tokens before t.
        """
        prefix = self.cls_embedding(conditions)
        x = torch.cat([prefix, self.tok_embeddings(tokens[:, :-1])], dim=1)
        return self._logits(self._run(x, None, 0)[:, prefix.shape[1] - 1 :])

    def prefill(self, conditions: Tensor) -> tuple[DecodeState, Tensor]:
        """Start decoding: logits (B, V) of the first token, and the state to go on from."""
        config, prefix = self.config, self.cls_embedding(conditions)
        batch, length = prefix.shape[0], prefix.shape[1] + config.num_tokens - 1
        shape = (config.num_layers, 2, batch, config.num_heads, length, config.head_dim)
        state = DecodeState(torch.empty(shape, dtype=prefix.dtype, device=prefix.device), 0)
        return state, self._advance(state, prefix)

    def decode_step(self, state: DecodeState, tokens: Tensor) -> Tensor:
        """Append tokens (B,) to the state; logits (B, V) of the next ones."""
        return self._advance(state, self.tok_embeddings(tokens).unsqueeze(1))

    def _advance(self, state: DecodeState, x: Tensor) -> Tensor:
        logits = self._logits(self._run(x, state.cache, state.position)[:, -1])
        state.position += x.shape[1]
        return logits

    def _run(self, x: Tensor, cache: Tensor | None, start: int) -> Tensor:
        stop = start + x.shape[1]
        rope = self.rope_cos[start:stop], self.rope_sin[start:stop]
        for index, layer in enumerate(self.layers):
            x = layer(x, rope, None if cache is None else cache[index], start)
        return x

    def _logits(self, x: Tensor) -> Tensor:
        return self.output(self.norm(x)).float()


def rope_tables(config: LlamaGenConfig, prefix: int = 1) -> tuple[Tensor, Tensor]:
    """Cosine and signed sine of two-dimensional RoPE, (C+T, E) fp32 each.

    Over interleaved pairs, the first half of the pairs turns with the row and the second with the
    column, raster order. Rows of the `prefix` condition tokens are zero in both tables: there
    q = k = 0, so the attention score is exactly 0 (not "no rotation"), as in the official code.
    """
    half = config.head_dim // 2
    frequencies = config.rope_base ** (-torch.arange(0, half, 2, dtype=torch.float32) / half)
    turns = torch.outer(torch.arange(config.grid, dtype=torch.float32), frequencies)
    rows = turns[:, None].expand(-1, config.grid, -1)
    columns = turns[None].expand(config.grid, -1, -1)
    angles = torch.cat([rows, columns], dim=-1).flatten(0, 1)  # (T, E/2)
    cos = torch.cat([torch.zeros(prefix, half), angles.cos()])
    sin = torch.cat([torch.zeros(prefix, half), angles.sin()])
    return cos.repeat_interleave(2, -1), torch.stack([-sin, sin], -1).flatten(-2)


def _rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate pairs (x0, x1) -> (x0 cos - x1 sin, x1 cos + x0 sin), in fp32; x (..., S, E)."""
    cos, sin = rope
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(x.float() * cos, swapped.float(), sin).type_as(x)
