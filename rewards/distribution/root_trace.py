"""The drop of the trace of a matrix square root when an image is removed, by quadratures.

A (R, R) is a positive semidefinite sum of outer products; N images contribute the rows
sqrt(share) z_i. W = 1 + share is the weight of A's mixture. Removing image i subtracts
share W z_i z_i' from A (derivation: rewards/DESIGN.md).

Shapes: N images, R rank, Q quadrature nodes. All tensors are float64, on one device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rewards.distribution.quadrature import half_line_nodes

TOLERANCE = 1e-12  # relative, of the quadratures
SPANS_ALONE = 1e-3  # `rest` below this: the image nearly spans a direction alone
BISECTIONS = 60
TINY = 1e-300
IN_CACHE = 128  # rows of an (R, R) matrix at a time
SMALL_ORDERS = 1e-10  # error allowed to orders above the second, relative to the drop


@dataclass(frozen=True, slots=True)
class Mixture:
    """A in its eigenbasis, A = diag(values), and the contributions of the batch's images."""

    values: Tensor
    """(R,) > 0, ascending."""
    scores: Tensor
    """(N, R): w_i = sqrt(share) z_i / sqrt(values), the images' rows of an orthonormal basis."""
    rest: Tensor
    """(N,) in [0, 1]: 1 - W |w_i|^2, zero where removing image i lowers the rank of A."""
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

    All terms of g are positive: no cancellation for small drops. For g near 1, the terms of
    1 - g = rest_i + W sum_k w_ik^2 t^2 / (l_k + t^2) are positive, too. If an image nearly spans a
    direction alone, the smallest eigenvalue m without it nears zero and the integrand becomes
    singular; its factor (m + t^2) / (l_1 + t^2) is integrated in closed form, sqrt l_1 - sqrt m.
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
    """() >= 0: tr sqrt(A) - tr sqrt(A_all), A_all of the mixture with no image left out.

    Each of the N images then has the weight share (N - 1) / N, and the mixture weighs 1.
    A_all = A - share (S + W v v'), with the batch's covariance S and the deviation v of its mean
    from the mixture's: a change of rank N and relative size 1/N. As an integral,

        (1/pi) int_0^inf -log det(I - G(t)) dt = (1/pi) int_0^inf tr G + tr G^2 / 2 + ... dt,

    where G is the change relative to A + t^2. The first two orders are integrated in closed form;
    the rest is small and needs few nodes.
    """
    values, scores = mixture.values, mixture.scores
    if not len(values):
        return scores.new_zeros(())
    rows = reweighting_rows(scores, mixture.total)
    roots = values.sqrt()
    first = (rows**2).sum(0) @ roots / 2
    second = torch.zeros_like(first)
    for part, own in zip(rows.split(IN_CACHE, 1), roots.split(IN_CACHE)):
        squares = (part.T @ rows).square_().div_(own[:, None] + roots)
        second += own @ squares @ roots / 4
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
    """() log determinant of a positive definite matrix."""
    return 2 * torch.linalg.cholesky(matrix).diagonal().log().sum()


def _nodes(values: Tensor, smallest: float, tolerance: float) -> tuple[Tensor, Tensor]:
    nodes, weights = half_line_nodes(smallest, float(values[-1]), tolerance)
    return torch.from_numpy(nodes).to(values), torch.from_numpy(weights).to(values)


def _smallest_root(squares: Tensor, rest: Tensor, values: Tensor) -> Tensor:
    """(N,) smallest eigenvalue m of A - share W z_i z_i', in [0, l_1].

    The root of sum_k squares_k m / (l_k - m) = rest, which increases with m: bisection on sqrt(m),
    the value that the caller needs to full accuracy.
    """
    low, high = torch.zeros_like(rest), values[0].sqrt().expand_as(rest)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        m = (middle**2)[:, None]
        above = (squares * (m / (values - m).clamp(min=1e-300))).sum(1) >= rest
        high, low = torch.where(above, middle, high), torch.where(above, low, middle)
    return low**2
