"""What decoding and learning need of any policy, and the batches they exchange with it.

Shapes: B batch, T tokens, V vocabulary, C condition tokens, L layers, H heads, E head dimension,
S = slots of the KV cache, one a position.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from actors.kernels import plain
from actors.kernels.interface import Kernels, Window
from actors.models.vq import VQConfig
from cluster.errors import DataError
from cluster.messages import Condition

Conditioning = Literal["class", "caption", "none"]

Readout = Callable[[Tensor, Callable[[Tensor], Tensor]], Any]
"""(hidden states (B, T, dim) of the last block, function from hidden states (..., dim) to logits
(..., V) fp32) -> result of the pass."""


@dataclass(frozen=True)
class Conditions:
    """A batch of conditions as the policy reads them; made by `Policy.encode`.

    A group shares one long caption: `values` holds each of U captions once, `index` maps the batch
    to them.
    """

    values: Tensor
    """(B,) int64 class indices, (B, C) int64 condition tokens, or (U, C, D) caption features."""
    mask: Tensor | None = None
    """(U, C) bool: False is padding."""
    index: Tensor | None = None
    """(B,) int64 indices into `values`; None is one to one."""

    def __len__(self) -> int:
        return len(self.values if self.index is None else self.index)

    def __getitem__(self, rows: slice | Tensor) -> Conditions:
        if self.index is None:
            mask = None if self.mask is None else self.mask[rows]
            return Conditions(self.values[rows], mask)
        used, index = self.index[rows].unique(return_inverse=True)
        return Conditions(self.values[used], None if self.mask is None else self.mask[used], index)

    def concat(self, other: Conditions) -> Conditions:
        """This batch followed by another of the same kind."""
        values = torch.cat([self.values, other.values])
        if self.mask is None or other.mask is None:
            return Conditions(values)
        index = torch.cat([self.value_index(), other.value_index() + len(self.values)])
        return Conditions(values, torch.cat([self.mask, other.mask]), index)

    def value_index(self) -> Tensor:
        """(B,) int64 indices into `values`."""
        if self.index is not None:
            return self.index
        return torch.arange(len(self.values), device=self.values.device)


@dataclass
class DecodeState:
    """Static KV cache of a batch, and how far it is filled."""

    cache: Tensor
    """(L, 2, B, H, S, E)"""
    position: int = 0
    """Slots filled."""
    bias: Tensor | None = None
    """(B, 1, 1, S): score added to each slot (captions); None is zero."""
    kernels: Kernels = plain
    """What `Policy.decode_step` computes with."""

    def next_window(self) -> Window:
        """The next slot to write, and all filled slots to read."""
        size = self.position + 1
        bias = None if self.bias is None else self.bias[..., :size]
        return Window(self.position, size, bias)


@dataclass(frozen=True, kw_only=True)
class PolicyArchitecture:
    """What every policy's architecture has; each family extends it."""

    family: ClassVar[str]

    dim: int
    num_layers: int
    num_heads: int
    grid: int
    """Side of the token grid: T = grid * grid."""
    vocab_size: int
    num_classes: int = 0
    """Classes of a class-conditional policy."""

    @property
    def conditioning(self) -> Conditioning:
        raise NotImplementedError

    @property
    def caption_dim(self) -> int:
        """Width of caption features; 0 unless conditional on captions."""
        return 0

    @property
    def caption_tokens(self) -> int:
        """Most tokens of a caption."""
        return 0

    @property
    def guidable(self) -> bool:
        """Whether it was trained with a null condition, which classifier-free guidance needs."""
        return True

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def num_tokens(self) -> int:
        return self.grid * self.grid

    def to_dict(self) -> dict[str, Any]:
        """The fields, and `family`: the header of our files."""
        return {"family": self.family, **dataclasses.asdict(self)}


Architecture = PolicyArchitecture | VQConfig


class Policy(Protocol):
    """An autoregressive policy over image tokens; also a `torch.nn.Module`."""

    @property
    def config(self) -> PolicyArchitecture: ...

    @property
    def num_tokens(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    def encode(self, conditions: Sequence[Condition]) -> Conditions:
        """Conditions as this policy reads them, on its device.

        Raises:
            DataError: one lacks what this policy needs (class index, caption features).
        """
        ...

    def null_conditions(self, conditions: Conditions) -> Conditions:
        """Conditions of the unconditional branch, one for each row.

        Raises:
            ConfigError: this policy was trained without one, so that guidance is not defined.
        """
        ...

    def allocate(self, rows: int, dtype: torch.dtype | None = None) -> DecodeState:
        """An empty KV cache for a batch of `rows`, reusable by successive decodings."""
        ...

    def prefill(self, state: DecodeState, conditions: Conditions) -> Tensor:
        """Start decoding: logits (B, V) fp32 of the first token. Overwrites the state."""
        ...

    def decode_step(
        self, state: DecodeState, tokens: Tensor, window: Window | None = None
    ) -> Tensor:
        """Append tokens (B,) to the state; logits (B, V) fp32 of the next ones.

        Without a window, the step writes the state's next slot and reads the filled ones.
        """
        ...

    def codes(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T) in the policy's order -> codes (B, h, w) of the tokenizer's grid."""
        ...

    def __call__(
        self, tokens: Tensor, conditions: Conditions, readout: Readout | None = None
    ) -> Any:
        """Teacher-forced logits (B, T, V) fp32; row t predicts tokens[:, t].

        Args:
            readout: computes the result instead, from hidden states, so that logits need not all
                exist at once. It runs within this call: a sharded policy has its weights only here.
        """
        ...

    def state_dict(self) -> Mapping[str, Tensor]: ...


if TYPE_CHECKING:

    class PolicyModule(nn.Module, Policy):
        """A policy as the `torch.nn.Module` that it is."""

        checkpointing: bool
        """Recompute activations in the backward pass."""

else:
    PolicyModule = nn.Module


def class_of(condition: Condition, num_classes: int) -> int:
    """The class index of a condition.

    Raises:
        DataError: it has none, or one that is out of range.
    """
    index = condition.class_index
    if index is None:
        raise DataError(
            f"this policy is class-conditional, but the condition {condition.text!r} has no "
            "class_index"
        )
    if not 0 <= index < num_classes:
        raise DataError(
            f"condition {condition.text!r} has class_index {index}, but this policy has "
            f"{num_classes} classes (0 to {num_classes - 1})"
        )
    return index
