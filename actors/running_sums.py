"""Cumulative sums with one result in every run.

On a GPU the order of additions in `torch.cumsum` of floats is not fixed, and torch refuses it under
deterministic algorithms (`cluster.program.precision`). There, these functions compute it otherwise;
elsewhere they are `cumsum`.
"""

from __future__ import annotations

import torch
from torch import Tensor

FIXED_POINT = 2.0**52
"""Units in 1. Sums up to 2 are exact in int64 and in float64."""


def cumulative_probabilities(probabilities: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums over the last dimension of probabilities, whose total is about 1; without gradients."""
    if _refused(probabilities):
        return fixed_point_sums(probabilities).to(dtype)
    return probabilities.cumsum(-1, dtype=dtype)


def fixed_point_sums(probabilities: Tensor) -> Tensor:
    """Sums over the last dimension, float64, of multiples of 2^-52: exact, so that their order does
    not matter."""
    units = probabilities.double().mul_(FIXED_POINT).round_().long()
    return units.cumsum(-1).double().div_(FIXED_POINT)


def cumulative_rows(rows: Tensor) -> Tensor:
    """Sums over dimension 1 of (U, C, dim) fp32, with gradients."""
    return triangular_sums(rows) if _refused(rows) else rows.cumsum(1)


def triangular_sums(rows: Tensor) -> Tensor:
    """Sums over dimension 1 of (U, C, dim), as a product with a triangle of ones."""
    with torch.autocast(rows.device.type, enabled=False):
        steps = rows.shape[1]
        triangle = torch.ones(steps, steps, dtype=rows.dtype, device=rows.device).tril()
        return triangle @ rows


def inverse_order(values: Tensor, order: Tensor) -> Tensor:
    """Values (..., V) in the order `order` of a sort, back in the order before it."""
    if _refused(values):
        return values.gather(-1, order.argsort(-1))
    return torch.empty_like(values).scatter_(-1, order, values)


def _refused(x: Tensor) -> bool:
    return x.is_cuda and torch.are_deterministic_algorithms_enabled()
