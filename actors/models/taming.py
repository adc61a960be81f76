"""The taming policy: a GPT over image tokens in any order (Esser, Rombach, Ommer 2020, 2012.09841).

Parameter names are those of the `transformer.` part of the official checkpoints. A condition is
ordinary tokens ahead of the image's, embedded by the same table: a class is one token, an
unconditional policy begins with a fixed one, and a policy trained on crops gets the coordinates of
the crop's cells. Positions are learned and count the condition.

As in `LlamaGen`, `forward` is always the teacher-forced pass, `prefill`/`decode_step` always the
cached one, and neither depends on `self.training`. There is no dropout and no null class.

Shapes: B batch, T tokens, V vocabulary, C condition tokens, H heads, S sequence, E head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actors.kernels.attention import full_attention
from actors.kernels.plain import write_cache
from actors.models.base import (
    Conditioning,
    Conditions,
    DecodeState,
    PolicyArchitecture,
    Readout,
    Window,
    class_of,
)
from actors.models.layers import Head, Linear, allocate_cache, run_block
from actors.models.permuters import inverse, permutation
from cluster.errors import ConfigError
from cluster.messages import Condition

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries, keys and values (B, H, S, E) -> mixed values (B, H, S, E)."""

CONDITIONS = ("class", "none", "coordinates")
MLP_RATIO = 4


@dataclass(frozen=True, kw_only=True)
class TamingConfig(PolicyArchitecture):
    """Architecture of a taming policy. The number of heads cannot be derived from the tensors."""

    family: ClassVar[str] = "taming-gpt"

    block_size: int
    """Rows of the position table."""
    condition: Literal["class", "none", "coordinates"] = "class"
    sos_token: int = 0
    """What an unconditional policy begins with."""
    image_size: int = 0
    """Coordinates: side of the image, in pixels."""
    coordinate_levels: int = 0
    """Coordinates: tokens that the range [0, 1] is divided into."""
    coordinate_stride: int = 0
    """Coordinates: side of the cell of pixels that a token stands for."""
    n_unmasked: int = 0
    """Condition tokens, from the first, that all see each other."""
    permuter: str = "Identity"
    """Order of the tokens, see `permuters`."""

    def __post_init__(self) -> None:
        if self.condition not in CONDITIONS:
            raise ConfigError(
                f"condition {self.condition!r} is unknown: choose one of {', '.join(CONDITIONS)}"
            )
        if self.dim % self.num_heads:
            raise ConfigError(f"dim {self.dim} is not a multiple of num_heads {self.num_heads}")
        self._check_condition()
        if self.num_slots > self.block_size:
            raise ConfigError(
                f"{self.num_conditions} condition tokens and a {self.grid}x{self.grid} grid take "
                f"{self.num_slots} positions, but block_size is {self.block_size}"
            )
        if self.n_unmasked > self.num_conditions:
            raise ConfigError(
                f"n_unmasked {self.n_unmasked} reaches past the {self.num_conditions} condition "
                "tokens: image tokens would see later ones, so they have no log-probability"
            )

    def _check_condition(self) -> None:
        if self.condition == "class" and not 0 < self.num_classes <= self.vocab_size:
            raise ConfigError(
                f"num_classes must be in [1, vocab_size], found {self.num_classes}: a class is a "
                f"row of the token table, which has {self.vocab_size}"
            )
        if self.condition == "none" and not 0 <= self.sos_token < self.vocab_size:
            raise ConfigError(f"sos_token must be in [0, vocab_size), found {self.sos_token}")
        if self.condition == "coordinates":
            size, stride = self.image_size, self.coordinate_stride
            if min(size, stride, self.coordinate_levels) < 1 or size % stride:
                raise ConfigError(
                    "coordinates need coordinate_levels >= 1 and an image_size that is a multiple "
                    f"of coordinate_stride, found {self.coordinate_levels}, {size} and {stride}"
                )

    @property
    def conditioning(self) -> Conditioning:
        return "class" if self.condition == "class" else "none"

    @property
    def guidable(self) -> bool:
        return False

    @property
    def num_conditions(self) -> int:
        """Condition tokens, C."""
        if self.condition != "coordinates":
            return 1
        return (self.image_size // self.coordinate_stride) ** 2

    @property
    def num_slots(self) -> int:
        """Positions of a whole sequence; nothing follows the last token, so it takes none."""
        return self.num_conditions + self.num_tokens - 1


class Attention(nn.Module):
    def __init__(self, config: TamingConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.key = Linear(config.dim, config.dim)
        self.query = Linear(config.dim, config.dim)
        self.value = Linear(config.dim, config.dim)
        self.proj = Linear(config.dim, config.dim)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """(B, S, dim) -> (B, S, dim)"""
        query, key, value = (
            layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        return self.proj(attend(query, key, value).transpose(1, 2).flatten(2))


class LayerNorm(nn.LayerNorm):
    """Gains may have another dtype than the input (bf16 gathered from shards, fp32 activations)."""

    def forward(self, x: Tensor) -> Tensor:
        gains = self.weight.type_as(x), self.bias.type_as(x)
        return F.layer_norm(x, self.normalized_shape, *gains, self.eps)


class Block(nn.Module):
    def __init__(self, config: TamingConfig) -> None:
        super().__init__()
        self.ln1 = LayerNorm(config.dim)
        self.ln2 = LayerNorm(config.dim)
        self.attn = Attention(config)
        hidden = MLP_RATIO * config.dim
        self.mlp = nn.Sequential(Linear(config.dim, hidden), nn.GELU(), Linear(hidden, config.dim))

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        x = x + self.attn(self.ln1(x), attend)
        return x + self.mlp(self.ln2(x))


class TamingGPT(nn.Module):
    """Conditional on classes, on coordinates, or on nothing. Satisfies
    `actors.models.base.Policy`."""

    def __init__(self, config: TamingConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False  # of `forward`, see `run_block`
        self.tok_emb = nn.Embedding(config.vocab_size, config.dim)
        self.pos_emb = nn.Parameter(torch.zeros(1, config.block_size, config.dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.ln_f = LayerNorm(config.dim)
        self.head = Head(config.dim, config.vocab_size)
        forward = permutation(config.permuter, config.grid)
        self.register_buffer("sequence_order", forward, persistent=False)
        self.register_buffer("raster_order", inverse(forward), persistent=False)
        self.register_buffer("constant", constant_condition(config), persistent=False)
        self.sequence_order: Tensor
        self.raster_order: Tensor
        self.constant: Tensor | None

    @property
    def num_tokens(self) -> int:
        return self.config.num_tokens

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    def encode(self, conditions: Sequence[Condition]) -> Conditions:
        """Condition tokens (B, C): the class, or what every image begins with.

        Raises:
            DataError: a class index is missing or out of range.
        """
        if self.constant is not None:
            return Conditions(self.constant.repeat(len(conditions), 1))
        classes = [class_of(condition, self.config.num_classes) for condition in conditions]
        return Conditions(torch.tensor(classes, device=self.tok_emb.weight.device).view(-1, 1))

    def null_conditions(self, conditions: Conditions) -> Conditions:
        """Refused: these policies were trained without a null class."""
        raise ConfigError(
            "classifier-free guidance is not defined for a taming policy, which was trained "
            "without a null class: set guidance to 'none' and leave cfg_scale at 1 (a lower "
            "temperature, top_k or top_p sharpen it instead)"
        )

    def codes(self, tokens: Tensor) -> Tensor:
        """(B, T) in the policy's order -> (B, grid, grid)."""
        return tokens[:, self.raster_order].unflatten(1, (self.config.grid, self.config.grid))

    def tokens_of(self, codes: Tensor) -> Tensor:
        """(B, grid, grid) -> (B, T) in the policy's order; undoes `codes`."""
        return codes.flatten(1)[:, self.sequence_order]

    def forward(
        self, tokens: Tensor, conditions: Conditions, readout: Readout | None = None
    ) -> Any:
        """Teacher-forced logits (B, T, V) fp32; row t predicts tokens[:, t] from the condition and
        the tokens (B, T) before t. With a readout, its result."""
        sequence = torch.cat([conditions.values, tokens[:, :-1]], dim=1)
        attend = self._attend_within(sequence.shape[1])
        x = self._embed(sequence, 0)
        for block in self.blocks:
            x = run_block(block, self.checkpointing, x, attend)
        x = x[:, conditions.values.shape[1] - 1 :]
        return readout(x, self._logits) if readout else self._logits(x)

    def allocate(self, rows: int, dtype: torch.dtype | None = None) -> DecodeState:
        """An empty KV cache: a slot for each condition token, and each token but the last."""
        config = self.config
        shape = (config.num_layers, rows, config.num_heads, config.num_slots, config.head_dim)
        return allocate_cache(shape, self.tok_emb.weight, dtype)

    def prefill(self, state: DecodeState, conditions: Conditions) -> Tensor:
        """Start decoding: logits (B, V) fp32 of the first token, from all C condition tokens."""
        x = self._embed(conditions.values, 0)
        within = self._attend_within(x.shape[1])
        for cache, block in zip(state.cache, self.blocks):

            def attend(query: Tensor, key: Tensor, value: Tensor, cache: Tensor = cache) -> Tensor:
                write_cache(cache, key, value, 0)
                return within(query, key, value)

            x = block(x, attend)
        state.position, state.bias = x.shape[1], None
        return self._logits(x[:, -1])

    def decode_step(
        self, state: DecodeState, tokens: Tensor, window: Window | None = None
    ) -> Tensor:
        """Append tokens (B,) to the state; logits (B, V) fp32 of the next ones."""
        window = window or state.next_window()
        x = self._embed(tokens.unsqueeze(1), window.slot)
        for cache, block in zip(state.cache, self.blocks):

            def attend(query: Tensor, key: Tensor, value: Tensor, cache: Tensor = cache) -> Tensor:
                return state.kernels.attention((query, key, value), cache, window)

            x = block(x, attend)
        state.position += 1
        return self._logits(x[:, -1])

    def _embed(self, tokens: Tensor, place: int | Tensor) -> Tensor:
        """Tokens (B, n) from position `place` on -> (B, n, dim). A tensor `place` (1,) is for n = 1
        and keeps the position out of Python, so that a CUDA graph can replay it."""
        if isinstance(place, int):
            positions = self.pos_emb[:, place : place + tokens.shape[1]]
        else:
            positions = self.pos_emb.index_select(1, place)
        return self.tok_emb(tokens) + positions

    def _attend_within(self, steps: int) -> Attend:
        """Attention of the first `steps` positions to each other: causal, but for the open block
        of the first `n_unmasked`."""
        opened = min(self.config.n_unmasked, steps)
        mask = None
        if opened > 1:
            mask = torch.ones(steps, steps, dtype=torch.bool, device=self.pos_emb.device).tril()
            mask[:opened, :opened] = True

        return partial(full_attention, mask=mask, causal=mask is None)

    def _logits(self, x: Tensor) -> Tensor:
        """Hidden states (..., dim) of the last block -> logits (..., V) fp32."""
        return self.head(self.ln_f(x))


def constant_condition(config: TamingConfig) -> Tensor | None:
    """Condition tokens (C,) that are the same for every image; None of a class policy."""
    if config.condition == "class":
        return None
    if config.condition == "none":
        return torch.tensor([config.sos_token])
    tokens = coordinate_tokens(
        whole_image(config.image_size), config.coordinate_levels, config.coordinate_stride
    )[0]
    if int(tokens.max()) >= config.vocab_size:
        raise ConfigError(
            f"coordinate_levels {config.coordinate_levels} lead to token {int(tokens.max())}, but "
            f"vocab_size is {config.vocab_size}"
        )
    return tokens


def whole_image(size: int) -> Tensor:
    """(1, 1, size, size) fp32: raster index of each pixel over their number, so in [0, 1)."""
    pixels = size * size
    return (torch.arange(pixels, dtype=torch.float64) / pixels).float().view(1, 1, size, size)


def coordinate_tokens(coordinates: Tensor, levels: int, stride: int) -> Tensor:
    """Coordinates (B, 1, H, W) in [0, 1] -> condition tokens (B, C) int64.

    The mean of each cell of stride x stride pixels, times the levels, rounded (halves to even), as
    taming's CoordStage: tokens in [0, levels], both included.
    """
    cells = (coordinates.shape[2] // stride, coordinates.shape[3] // stride)
    means = F.adaptive_avg_pool2d(coordinates, cells).clamp(0, 1)
    return (levels * means).round().long().flatten(1)
