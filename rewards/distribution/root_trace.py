"""How much the trace of a matrix square root trace_drops when images are taken out: quadratures.

A (R, R) is a positive semidefinite sum of outer products to which N images contribute the rows
sqrt(share) z_i; W = 1 + share is the weight of the mixture that A belongs to. Taking image i out of
the mixture takes share W z_i z_i' off A (rewards/DESIGN.md has the algebra).

Shapes: N images, R rank, Q quadrature nodes. All tensors are float64, on one device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rewards.distribution.quadrature import half_line_nodes

TOLERANCE = 1e-12  # relative, of the quadratures
SPANS_ALONE = 1e-3  # 1 - h below this: nearly a direction of the image's own
BISECTIONS = 60
TINY = 1e-300
SMALL_ORDERS = 1e-10  # of the fall: what orders above the second may be wrong by


@dataclass(frozen=True, slots=True)
class Mixture:
    """A in its eigenbasis, A = diag(values), and what the batch's images contribute to it."""

    values: Tensor
    """(R,) > 0, ascending."""
    scores: Tensor
    """(N, R): w_i = sqrt(share) z_i / sqrt(values), the images' rows of an orthonormal basis."""
    rest: Tensor
    """(N,) in [0, 1]: 1 - W |w_i|^2, zero where taking image i out lowers the rank of A."""
    share: float
    """The weight of each image."""

    @property
    def total(self) -> float:
        """W, the weight of the mixture."""
        return 1 + self.share


def trace_drops(mixture: Mixture) -> Tensor:
    """(N,) >= 0: tr sqrt(A) - tr sqrt(A - share W z_i z_i'), for each image.

    As an integral,

        -(1/pi) int_0^inf log(1 - g_i(t)) dt,   g_i(t) = W sum_k w_ik^2 l_k / (l_k + t^2).

    All terms of g are positive, so nothing cancels however small the fall is; where g nears 1, so
    are those of 1 - g = rest_i + W sum_k w_ik^2 t^2 / (l_k + t^2). Where an image all but spans a
    direction of its own, the smallest eigenvalue m of what is left nears zero and the integrand
    turns singular; the factor (m + t^2) / (l_1 + t^2) is then integrated in closed form, to
    sqrt l_1 - sqrt m.
    """
    values, rest = mixture.values, mixture.rest
    if not len(values):
        return torch.zeros_like(rest)
    squares = mixture.total * mixture.scores**2  # (N, R)
    alone = rest < SPANS_ALONE
    # m >= l_1 rest, as W sum_k w_k^2 m / (l_k - m) = rest and the weights sum to 1 - rest.
    lowest = rest[~alone].min().item() if (~alone).any() else 1.0
    nodes, weights = _nodes(values, float(values[0]) * lowest, TOLERANCE)
    inverse = 1 / (values[:, None] + nodes**2)  # (R, Q)
    small = squares @ (values[:, None] * inverse)
    complement = rest[:, None] + squares @ (nodes**2 * inverse)
    logs = torch.where(small < 0.5, torch.log1p(-small.clamp(max=0.5)), complement.log())
    closed = torch.zeros_like(rest)
    if alone.any():
        smallest = _smallest_root(squares[alone], rest[alone], values)
        factor = (smallest[:, None] - values[0]) / (values[0] + nodes**2)
        logs[alone] -= torch.log1p(factor)
        closed[alone] = values[0].sqrt() - smallest.sqrt()
    return closed - logs @ weights / math.pi


def reweighting_drop(mixture: Mixture) -> Tensor:
    """() >= 0: tr sqrt(A) - tr sqrt(A_all), A_all of the mixture in which all images weigh less.

    There each of the N images has the weight share (N - 1) / N, as when none is missing; the
    mixture then weighs 1. A_all = A - share (S + W v v'), with the batch's covariance S and the
    deviation v of its mean from the mixture's: a change of rank N, of order 1/N beside A. As an
    integral,

        (1/pi) int_0^inf -log det(I - G(t)) dt = (1/pi) int_0^inf tr G + tr G^2 / 2 + ... dt,

    where G is the change relative to A + t^2. Its first two orders are integrated in closed form;
    the rest is small, so needs few digits and few nodes.
    """
    values, scores = mixture.values, mixture.scores
    if not len(values):
        return scores.new_zeros(())
    rows = reweighting_rows(scores, mixture.total)
    roots = values.sqrt()
    first = (rows**2).sum(0) @ roots / 2
    squares = (rows.T @ rows).square_().div_(roots[:, None] + roots)
    second = roots @ squares @ roots / 4
    sizes = torch.linalg.eigvalsh(rows @ rows.T).clamp(min=0)  # of G(0), the largest G
    left = max(1 - sizes[-1].item(), SPANS_ALONE)
    bound = (sizes**3).sum().item() / left / max(3 * sizes.sum().item(), TINY)
    if bound <= SMALL_ORDERS:
        return first + second
    nodes, weights = _nodes(values, float(values[0]) * left, min(SMALL_ORDERS / bound, 0.5))
    higher = torch.zeros_like(first)
    for node, weight in zip(nodes, weights):
        scaled = rows * (values / (values + node**2)).sqrt()
        part = scaled @ scaled.T
        rest = log_det(torch.eye(len(part), out=torch.empty_like(part)) - part)
        higher -= weight * (rest + part.trace() + (part**2).sum() / 2)
    return first + second + higher / math.pi


def reweighting_rows(scores: Tensor, total: float) -> Tensor:
    """Rows (N, R) whose outer products sum to the change in `reweighting_drop`, relative to A."""
    return (scores + (math.sqrt(total) - 1) * scores.mean(0)) / math.sqrt(len(scores))


def log_det(matrix: Tensor) -> Tensor:
    """() of a positive definite matrix."""
    return 2 * torch.linalg.cholesky(matrix).diagonal().log().sum()


def _nodes(values: Tensor, smallest: float, tolerance: float) -> tuple[Tensor, Tensor]:
    nodes, weights = half_line_nodes(smallest, float(values[-1]), tolerance)
    return torch.from_numpy(nodes).to(values), torch.from_numpy(weights).to(values)


def _smallest_root(squares: Tensor, rest: Tensor, values: Tensor) -> Tensor:
    """(N,) smallest eigenvalue m of A - share W z_i z_i', in [0, l_1].

    The root of sum_k squares_k m / (l_k - m) = rest, a sum of positive terms that rises with m:
    bisection cannot fail, and on sqrt(m) it gives what the caller needs to full accuracy.
    """
    low, high = torch.zeros_like(rest), values[0].sqrt().expand_as(rest)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        m = (middle**2)[:, None]
        above = (squares * (m / (values - m).clamp(min=1e-300))).sum(1) >= rest
        high, low = torch.where(above, middle, high), torch.where(above, low, middle)
    return low**2
