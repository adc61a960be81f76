"""Exact leave-one-out rewards from the eigendecomposition of an older history.

The decomposition is the expensive part. The batches since then, and the one to be scored, change
the history's covariance by low rank: a row for each image and one for the shift of the mean. With
A = diag(l) + P'P in the old eigenbasis, determinants and single images follow from

    K(t) = I + P (diag(l) + t^2)^-1 P',    1 - g_i(t) = W (K(t)^-1)_ii - share

with one small Cholesky factorisation a node: O(Q n^2 (R + n)) instead of O(D^3). The rewards equal
those of `leave_one_out_fid`, so the basis may be built in the background, replaced or lost.

Shapes: N images, D dimensions, R rank, n images since the decomposition, Q quadrature nodes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rewards.distribution.fid import significant
from rewards.distribution.leave_one_out import check_batch
from rewards.distribution.moments import Moments
from rewards.distribution.quadrature import half_line_nodes
from rewards.distribution.reference import Reference
from rewards.distribution.root_trace import TOLERANCE, log_det, reweighting_rows

MAX_CONDITION = 1e12  # of L' cov L; above, rounding errors reach 1e-6 of the rewards' spread
USELESS_BATCHES = 8  # batches after which an unusable decomposition is computed again
MAX_SHARE = 1 / 4  # of R, images since the decomposition; above, a new one is as cheap


@dataclass(frozen=True, slots=True)
class HistoryBasis:
    """L' cov L = Q diag(values) Q' of a history, L L' the reference's covariance. Immutable."""

    values: Tensor
    """(R,) float64, ascending."""
    vectors: Tensor
    """(D, R) float64: L Q."""
    mean: Tensor
    """(D,) float64, of the history about the reference's mean."""
    mu: np.ndarray
    """(D,) the reference's mean."""
    spread: float
    """E|x - mu|^2 of the history."""
    reference_trace: float

    @classmethod
    def of(cls, moments: Moments, reference: Reference, device: str = "cpu") -> HistoryBasis:
        """Decompose a history; O(D^3), as one exact reward. Keeps no reference to the arguments."""
        factor = torch.tensor(reference.factor, dtype=torch.float64, device=device)
        cov = torch.tensor(moments.cov, dtype=torch.float64, device=device)
        squares = factor.T @ (cov @ factor)
        values, vectors = torch.linalg.eigh((squares + squares.T) / 2)
        mean = moments.mean - reference.mu
        return cls(
            values=values,
            vectors=factor @ vectors,
            mean=torch.tensor(mean, dtype=torch.float64, device=device),
            mu=reference.mu.copy(),
            spread=float(np.trace(moments.cov)) + float(mean @ mean),
            reference_trace=float(np.trace(reference.sigma)),
        )

    def fits(self, pending: Sequence[np.ndarray], features: np.ndarray, decay: float) -> bool:
        """Whether `leave_one_out` is exact and faster than `leave_one_out_fid`: full rank in the
        reference's space, a condition number below `MAX_CONDITION` after the decay since, and few
        images since.
        """
        return self.has_room(len(features) + sum(map(len, pending)), len(pending) + 1, decay)

    def has_room(self, images: int, batches: int, decay: float) -> bool:
        """`fits` for numbers of images and batches, including the one to be scored."""
        faded = decay**batches
        return (
            images <= MAX_SHARE * len(self.values)
            and bool(significant(self.values.cpu().numpy()).all())
            and float(self.values[0]) * faded * MAX_CONDITION >= float(self.values[-1])
        )

    def leave_one_out(
        self, pending: Sequence[np.ndarray], features: np.ndarray, decay: float
    ) -> tuple[np.ndarray, float]:
        """`leave_one_out_fid` of `features`, after the history was updated with `pending`.

        Args:
            pending: batches (N_k, D) of the updates since, oldest first, each with `decay`.
            features: (N, D), N >= 2, the batch to be scored.
            decay: the history's weight in each update, in (0, 1).

        Returns:
            As `leave_one_out_fid`; rewards to within 1e-6 of their standard deviation.

        Raises:
            DataError: fewer than two images, or dimensions that differ.
            ValueError: `fits` is false, or decay out of range.
        """
        dim = len(self.mean)
        x = check_batch(features, dim, len(self.mu), decay)
        if not self.fits(pending, x, decay):
            raise ValueError(
                "this basis does not fit these batches: compute the rewards without it"
            )
        share = (1 - decay) / (len(x) - 1)
        old, shares, rows = self._mixture(pending, x, decay)
        # Relative to the mixture's mean; total weight old + sum of shares = 1 + share.
        mean = (old * self.mean + shares @ rows) / (1 + share)
        deviations = torch.cat([(self.mean - mean)[None], rows - mean])
        weights = torch.cat([shares.new_tensor([old]), shares]).sqrt()
        projected = weights[:, None] * (deviations @ self.vectors)

        drops, common, root_trace = self._integrals(projected, old, share, len(x))
        distances = (rows**2).sum(1)
        own = distances[len(distances) - len(x) :]
        rewards = share * (own.mean() - own) + 2 * (drops - common)
        # The batch's shares sum to 1 - decay + share; E(u) has 1 - decay.
        linear = old * self.spread + float(shares @ distances - share * own.mean())
        fid = linear + self.reference_trace - 2 * float(root_trace - common)
        return rewards.cpu().numpy(), max(fid, 0.0)

    def _mixture(
        self, pending: Sequence[np.ndarray], x: np.ndarray, decay: float
    ) -> tuple[float, Tensor, Tensor]:
        """The old history's weight, and all images since: weights (n,), and (n, D) about mu."""
        count = len(pending)
        sizes = [len(batch) for batch in pending]
        each = [(1 - decay) * decay ** (count - k) / size for k, size in enumerate(sizes)]
        shares = np.repeat([*each, (1 - decay) / (len(x) - 1)], [*sizes, len(x)])
        rows = np.concatenate([*pending, x]) - self.mu
        device = self.values.device
        return (
            decay ** (count + 1),
            torch.tensor(shares, dtype=torch.float64, device=device),
            torch.tensor(rows, dtype=torch.float64, device=device),
        )

    def _integrals(
        self, rows: Tensor, old: float, share: float, count: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Integrals over the half line: the drop of tr sqrt(A) for each of the last `count` rows
        (count,), the drop common to them () and tr sqrt(A) ().

        A = old diag(values) + rows' rows. The first term stays when an image is removed, so no
        integrand is singular.
        """
        values, total = old * self.values, 1 + share
        largest = values[-1] + torch.linalg.eigvalsh(rows @ rows.T)[-1]
        nodes, steps = half_line_nodes(float(values[0]), float(largest), TOLERANCE)
        drops, common, root_trace = rows.new_zeros(count), 0.0, values.sqrt().sum()
        one = torch.eye(len(rows), out=rows.new_empty(len(rows), len(rows)))
        last = one[:count, :count]
        for node, step in zip(nodes, steps / math.pi):
            scaled = rows * (values + node**2).rsqrt()
            triangle = torch.linalg.cholesky(one + scaled @ scaled.T)
            inverse = torch.cholesky_inverse(triangle[-count:, -count:])  # the last block of K^-1
            part = reweighting_rows(reweighting_rows(last - inverse, total).T, total)
            drops -= step * (total * inverse.diagonal() - share).log()
            common = common - step * log_det(last - part)
            root_trace = root_trace + 2 * step * triangle.diagonal().log().sum()
        return drops, torch.as_tensor(common), root_trace


class MaintainedBasis:
    """A server's decomposition of an older history, and the batches committed since.

    Computed again between commits when it does not fit another batch like the last.
    """

    def __init__(self) -> None:
        self.base: Moments | None = None
        """The decomposed history."""
        self.pending: tuple[np.ndarray, ...] = ()
        """Batches since then, each committed with the decay `share`."""
        self.share = 0.0
        self._basis: HistoryBasis | None = None

    def start(
        self, base: Moments | None, pending: tuple[np.ndarray, ...] = (), share: float = 0.0
    ) -> None:
        """Set the decomposed history and the batches since; None: no decomposition."""
        self.base, self.pending, self.share, self._basis = base, pending, share, None

    def change_reference(self) -> None:
        """Decompose the same history again, in another reference's space."""
        self._basis = None

    def refresh(self, history: Moments, reference: Reference, count: int) -> bool:
        """Prepare for a batch of `count` images (0: unknown); True if it was decomposed again."""
        if count > MAX_SHARE * reference.factor.shape[1]:
            self.start(None)  # such batches are decomposed inside their commit
            return False
        before = self._basis
        if not self._serves(count, reference):
            self.start(history.normalised())
        self._current(reference)
        return self._basis is not before

    def leave_one_out(
        self, features: np.ndarray, decay: float, reference: Reference
    ) -> tuple[np.ndarray, float] | None:
        """Rewards and FID as `leave_one_out_fid`'s; None if the decomposition does not fit."""
        basis = self._current(reference)
        steady = not self.pending or self.share == decay
        if basis is None or not steady or not basis.fits(self.pending, features, decay):
            return None
        return basis.leave_one_out(self.pending, features, decay)

    def record(self, features: np.ndarray, decay: float) -> None:
        """Record a committed batch."""
        if self.base is None:
            return
        if self.pending and decay != self.share:  # of another size: start anew
            self.start(None)
            return
        self.pending, self.share = (*self.pending, features), decay

    def _serves(self, count: int, reference: Reference) -> bool:
        basis, batches = self._current(reference), len(self.pending)
        if basis is None or not batches:
            return basis is not None
        if basis.has_room(sum(map(len, self.pending)) + count, batches + 1, self.share):
            return True
        # An unusable one is not computed again at once: histories change slowly.
        return not basis.has_room(count, 1, self.share) and batches < USELESS_BATCHES

    def _current(self, reference: Reference) -> HistoryBasis | None:
        if self._basis is None and self.base is not None:
            self._basis = HistoryBasis.of(self.base, reference)
        return self._basis
