"""Checks of weights: finite, and no overflow or underflow in another dtype.

A NaN would otherwise fail much later, while sampling. Each check is one pass without a copy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.errors import CheckpointError

_PIECE = 1 << 22  # numbers per pass


def check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Refuse weights with NaN or infinities.

    Args:
        source: the file's name, for the error.

    Raises:
        CheckpointError: names the file and the tensor.
    """
    for name, tensor in tensors.items():
        if not math.isfinite(largest(tensor)):
            raise CheckpointError(not_finite(source, name, tensor))


def largest(tensor: Tensor) -> float:
    """The largest magnitude of a floating-point tensor; NaN if one is NaN; 0 for other dtypes."""
    if not tensor.is_floating_point() or tensor.is_meta or not tensor.numel():
        return 0.0
    for dimension, step in enumerate(tensor.stride()):
        if step == 0:  # repeated numbers
            tensor = tensor.narrow(dimension, 0, 1)
    if tensor.dtype.itemsize == 1:  # 8-bit types have no comparisons
        return max((_bound(piece.float()) for piece in _pieces(tensor)), key=_nan_first)
    return _bound(tensor)


def not_finite(source: str, name: str, tensor: Tensor) -> str:
    """Message for a tensor that is not finite."""
    count = sum(int((~piece.float().isfinite()).sum()) for piece in _pieces(tensor))
    return (
        f"{source}: tensor {name!r} is not finite: {count} of its {tensor.numel()} numbers are NaN "
        "or infinite. The file is damaged or its training diverged: fetch it again, or use an "
        "earlier checkpoint"
    )


@dataclass(frozen=True)
class Losses:
    """Losses of a dtype conversion: tensor name -> count."""

    overflowed: Mapping[str, int]
    """Finite numbers that become infinite."""
    vanished: Mapping[str, int]
    """Numbers other than 0 that become 0."""

    def refuse_overflow(self, source: str, dtype: torch.dtype) -> None:
        """
        Raises:
            CheckpointError: there is one; names the file and the first tensor.
        """
        if self.overflowed:
            name, count = next(iter(self.overflowed.items()))
            raise CheckpointError(
                f"{source}: {count} numbers of tensor {name!r} are beyond {_short(dtype)}, whose "
                f"largest is {torch.finfo(dtype).max:.5g}, and would become infinite "
                f"({len(self.overflowed)} tensors in all): choose bfloat16 or float32"
            )

    def warning(self, dtype: torch.dtype) -> str:
        """Warning about numbers that become 0; empty if there are none."""
        if not self.vanished:
            return ""
        name = next(iter(self.vanished))
        return (
            f"{sum(self.vanished.values())} numbers of {len(self.vanished)} tensors are too small "
            f"for {_short(dtype)} and become 0, the first in {name!r}"
        )


def losses(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Losses:
    """Count overflows and underflows of finite tensors in another dtype."""
    overflowed: dict[str, int] = {}
    vanished: dict[str, int] = {}
    for name, tensor in tensors.items():
        if not narrower(tensor.dtype, dtype):
            continue
        for piece in _pieces(tensor):
            cast = piece.to(dtype)
            _count(overflowed, name, cast.isinf() & piece.isfinite())
            _count(vanished, name, (cast == 0) & (piece != 0))
    return Losses(overflowed, vanished)


def narrower(of: torch.dtype, than: torch.dtype) -> bool:
    """Whether a conversion between floating-point dtypes may lose numbers."""
    if not of.is_floating_point or not than.is_floating_point:
        return False
    mine, other = torch.finfo(of), torch.finfo(than)
    return (
        mine.max > other.max
        or mine.smallest_normal < other.smallest_normal
        or (mine.smallest_normal * mine.eps < other.smallest_normal * other.eps)
    )


def _count(counts: dict[str, int], name: str, found: Tensor) -> None:
    if number := int(found.sum()):
        counts[name] = counts.get(name, 0) + number


def _bound(tensor: Tensor) -> float:
    low, high = (float(value) for value in torch.aminmax(tensor))
    return max(-low, high)  # NaN, if there is one, in both


def _nan_first(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _pieces(tensor: Tensor) -> Iterable[Tensor]:
    """All numbers, in pieces."""
    return tensor.detach().reshape(-1).split(_PIECE)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
