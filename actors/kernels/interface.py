"""What a set of kernels computes; `plain` and `fused` each are one.

Shapes: B batch (under guidance, rows of both branches), H heads, E head dimension, D width,
S slots of the cache, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from cluster.messages import SamplingSpec

Rope = tuple[Tensor, Tensor]
"""Cosines and signed sines of a position, (1, E) fp32 each."""


@dataclass(frozen=True)
class Window:
    """Where a decoding step writes its keys and values, and which slots it reads."""

    slot: int | Tensor
    """First slot written. A tensor (1,) int64 in a CUDA graph, which is replayed with other
    contents."""
    size: int
    """Slots read, from slot 0. Kernels with `live_slots` read slots 0 to `slot` in any case."""
    bias: Tensor | None = None
    """(B or 1, 1, 1, size), added to the attention scores; None is zero."""


class Kernels(Protocol):
    """The parts of a decoding step that are more than a matrix product."""

    live_slots: bool
    """Whether `attention` reads the filled slots alone, wherever the slot is a tensor. If not, a
    step with a fixed window needs a bias of -inf on the empty ones."""

    def attention(
        self,
        qkv: Tensor | Sequence[Tensor],
        cache: Tensor,
        window: Window,
        rope: Rope | None = None,
    ) -> Tensor:
        """Rotate queries and keys, write keys and values into the cache, attend to the window.

        Args:
            qkv: queries, keys and values (B, H, 1, E); with `rope`, one tensor (3, B, H, 1, E).
            cache: (2, B, H, S, W) of this layer, W >= E: on an accelerator heads are padded with
                zeros, so that rows fill 16 bytes. Attention reads what was written, in its dtype.
            rope: of this position; None rotates nothing.

        Returns:
            (B, H, 1, E) in the query's dtype.
        """
        ...

    def add_rms_norm(
        self, x: Tensor, change: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """The residual stream x + change (..., D), and its RMSNorm: statistics in fp32, cast back,
        then times the weight (the order matters in bf16). Without a change, x itself."""
        ...

    def gated_silu(self, x: Tensor, w1: nn.Module, w3: nn.Module) -> Tensor:
        """silu(w1(x)) * w3(x)"""
        ...

    def draw(
        self, logits: Tensor, uniforms: Tensor, spec: SamplingSpec
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Guidance, temperature, filters and one draw a row by inverse CDF.

        Args:
            logits: (B, V) fp32; under guidance (2B, V), the unconditional branch last.
            uniforms: (B,) float64 in [0, 1).

        Returns:
            Tokens (B,) int64, their logprobs (B,) fp32 and entropies (B,) fp32, nats.
        """
        ...
