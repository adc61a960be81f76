"""The FID reward: the leave-one-out FID of every image of a batch.

With EMA moments M before the batch and a decay b, E(u) = b M + (1 - b) u mixes history and batch:

    r_i = F(E(batch without i)) - F(E(batch))          > 0: the image lowers the FID

Leaving one image out of the mixture is a rank-one change of its covariance, so all N rewards follow
from one eigendecomposition and quadratures with shared nodes, without approximation. Moments are
population moments (divided by N); `ddof` cancels to first order in r_i.

Shapes: N images, D dimensions, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.linalg
import torch
from scipy.linalg import blas, lapack
from torch import Tensor

from cluster.errors import DataError
from rewards.distribution.diagonal import Mode, diagonal_rewards
from rewards.distribution.fid import (
    NOISE_MARGIN,
    covariance_factor,
    noise,
    significant,
)
from rewards.distribution.moments import Covariance, Moments, check_features
from rewards.distribution.reference import Reference
from rewards.distribution.root_trace import Mixture, reweighting_drop, trace_drops

Method = Literal["exact", "influence"]

BUDGET = 1.5e-7  # error allowed to `_from_squares`, in standard deviations of the rewards
SOLVER_ULPS = 5  # error of the eigensolver, measured up to D = 2048
LARGE = 512  # R from which `_decompose_large` gains; below, a decomposition takes milliseconds
BLOCK = 64  # columns of LAPACK's blocked routines, for their workspace


def leave_one_out_fid(
    features: np.ndarray,
    moments: Moments,
    reference: Reference,
    decay: float,
    *,
    covariance: Covariance = "full",
    method: Method = "exact",
    mode: Mode = "ema_loo",
    device: str = "cpu",
) -> tuple[np.ndarray, float]:
    """Leave-one-out rewards of a batch.

    Args:
        features: (N, D), N >= 2, of the batch.
        moments: EMA state before this batch; not changed.
        reference: real images' moments in the same feature space.
        decay: the history's weight b in [0, 1); 0 uses the batch alone.
        covariance: "full" is the Fréchet distance; "diagonal" (2603.23086's code) compares standard
            deviations of single features: needs far fewer images, ignores correlations.
        method: of the full covariance: "exact" is the definition, "influence" its first order in
            the weight of an image, for comparison; equally slow.
        mode: of the diagonal form: "ema_loo" is the definition above, "loo_batch" the same with
            decay 0, "ema_scalar" gives every image the drop of the FID by the whole batch.
        device: torch device; float64 on all.

    Returns:
        Rewards (N,) float64 in FID units, and the FID of the mixture with every image. The error of
        exact rewards is below 1e-6 of their standard deviation, also for singular covariances and
        condition numbers of 1e14.

    Raises:
        DataError: fewer than two images, or dimensions that differ.
        ValueError: decay or an option out of range.
    """
    x = check_batch(features, moments.dim, reference.dim, decay)
    if covariance == "diagonal":
        if method != "exact":
            raise ValueError(
                "the diagonal form is exact: method 'influence' needs covariance 'full'"
            )
        return diagonal_rewards(x, moments, reference, decay, mode)
    if covariance != "full" or method not in ("exact", "influence"):
        raise ValueError(f"unknown covariance or method: {covariance!r}, {method!r}")
    if mode != "ema_loo":
        raise ValueError(f"mode {mode!r} needs covariance 'diagonal'")
    problem = _Problem.of(x, moments, reference, decay, torch.device(device))
    if method == "influence":
        return _influence(problem)
    if decay == 0 and len(x) <= problem.factor.shape[1]:
        return _exact(problem, _from_data(problem))
    mixture, uncertainty = _from_squares(problem)
    rewards, fid = _exact(problem, mixture)
    if (uncertainty.cpu().numpy() > BUDGET * rewards.std()).any():
        return _exact(problem, _from_data(problem))
    return rewards, fid


def check_batch(features: np.ndarray, dim: int, reference_dim: int, decay: float) -> np.ndarray:
    """Features (N, D) as float64.

    Raises:
        DataError: fewer than two images, or dimensions that differ.
        ValueError: decay out of range.
    """
    x = check_features(features)
    if not 0 <= decay < 1:
        raise ValueError(f"decay must be in [0, 1), found {decay}")
    if len(x) < 2:
        raise DataError(f"leave-one-out needs at least 2 images, found {len(x)}")
    if not x.shape[1] == dim == reference_dim:
        raise DataError(
            f"features have {x.shape[1]} dimensions, moments {dim}, the reference "
            f"{reference_dim}: all three must come from the same extractor"
        )
    return x


@dataclass(frozen=True, slots=True)
class _Problem:
    """The input as tensors, and the mixture in which every image has the weight that it has when
    another one is left out: removing one is then exactly rank one (rewards/DESIGN.md)."""

    x: Tensor  # (N, D)
    old_mean: Tensor  # (D,)
    old_cov: np.ndarray  # (D, D)
    factor: Tensor  # (D, R), L with L L' the reference's covariance; lower triangular if `large`
    large: bool  # on the CPU, R >= LARGE
    mean: Tensor  # (D,) of the mixture
    decay: float
    distances: Tensor  # (N,) |x_i - mu_r|^2
    old_distance: float  # the history's mean of the same
    reference_trace: float

    @classmethod
    def of(
        cls,
        x: np.ndarray,
        moments: Moments,
        reference: Reference,
        decay: float,
        device: torch.device,
    ) -> _Problem:
        def tensor(array: np.ndarray) -> Tensor:
            return torch.tensor(array, dtype=torch.float64, device=device)

        batch, mu = tensor(x), tensor(reference.mu)
        share = (1 - decay) / (len(x) - 1)
        # Relative to the reference's mean: no digits lost far from the origin.
        history = tensor(moments.mean - reference.mu)
        shifted = batch - mu
        large = device.type == "cpu" and reference.factor.shape[1] >= LARGE
        return cls(
            x=shifted,
            old_mean=history,
            old_cov=moments.cov,
            factor=torch.from_numpy(reference.triangle) if large else tensor(reference.factor),
            large=large,
            mean=(decay * history + share * shifted.sum(0)) / (1 + share),
            decay=decay,
            distances=(shifted**2).sum(1),
            old_distance=float(np.trace(moments.cov)) + float(history @ history),
            reference_trace=float(np.trace(reference.sigma)),
        )

    @property
    def share(self) -> float:
        """Each image's weight."""
        return (1 - self.decay) / (len(self.x) - 1)

    @property
    def projected(self) -> Tensor:
        """L'(x_i - m), (N, R)."""
        return (self.x - self.mean) @ self.factor

    @property
    def old_squares(self) -> Tensor:
        """L' C L of the history's covariance C, (R, R)."""
        old_cov = torch.tensor(self.old_cov, dtype=torch.float64, device=self.x.device)
        return self.factor.T @ (old_cov @ self.factor)


def _exact(problem: _Problem, mixture: Mixture) -> tuple[np.ndarray, float]:
    """Rewards and FID. F is linear in the moments except for the trace of the root:

    F = E|x - mu_r|^2 + tr S_r - 2 tr (L' cov L)^(1/2).
    """
    common = reweighting_drop(mixture)
    rewards = mixture.share * (problem.distances.mean() - problem.distances)
    rewards += 2 * (trace_drops(mixture) - common)
    root_trace = mixture.values.sqrt().sum() - common
    return rewards.cpu().numpy(), _fid(problem, root_trace)


def _fid(problem: _Problem, root_trace: Tensor) -> float:
    batch = (1 - problem.decay) * problem.distances.mean().item()
    linear = problem.decay * problem.old_distance + batch + problem.reference_trace
    return max(linear - 2 * root_trace.item(), 0.0)


def _from_squares(problem: _Problem) -> tuple[Mixture, Tensor]:
    """The mixture by the eigendecomposition of L' cov L, and the uncertainty (N,) of each drop.

    Fast, but small eigenvalues carry the largest one's rounding error v. A shift of A by v changes
    a drop by at most v/4 sum_k share W z_k^2 l_k^(-3/2) / rest, and by at most
    sqrt(m + v) - sqrt(m), m the least eigenvalue without the image; a direction below the noise
    counts with the noise's root.
    """
    decompose = _decompose_large if problem.large else _decompose
    spectrum, coordinates = decompose(problem)
    keep = significant(spectrum.cpu().numpy())
    lost = len(keep) - int(keep.sum())
    values = spectrum[lost:]
    scores = problem.share**0.5 * coordinates[:, lost:] / values.sqrt()
    total = 1 + problem.share
    weights = total * scores**2
    mixture = Mixture(values, scores, (1 - weights.sum(1)).clamp(min=0, max=1), problem.share)

    floor = noise(spectrum.cpu().numpy(), NOISE_MARGIN)
    uncertainty = torch.full_like(mixture.rest, 3 * problem.share * (lost * floor) ** 0.5)
    if len(values):
        error = SOLVER_ULPS * torch.finfo(values.dtype).eps * values[-1]
        left = values[0] * mixture.rest
        shift = error / 4 * (weights @ values.rsqrt()) / mixture.rest
        uncertainty += 2 * torch.minimum(shift, (left + error).sqrt() - left.sqrt())
    return mixture, uncertainty


def _decompose(problem: _Problem) -> tuple[Tensor, Tensor]:
    """The mixture's L' cov L = Q diag(l) Q': l (R,), ascending, and L'(x_i - m) Q, (N, R)."""
    projected = problem.projected
    history = (problem.old_mean - problem.mean) @ problem.factor
    squares = problem.decay * problem.old_squares
    squares += problem.decay * torch.outer(history, history)
    squares += problem.share * projected.T @ projected
    spectrum, vectors = torch.linalg.eigh((squares + squares.T) / 2)
    return spectrum, projected @ vectors


def _decompose_large(problem: _Problem) -> tuple[Tensor, Tensor]:
    """As `_decompose`, in about the time of one `eigh`: LAPACK's routines behind it, in place, on
    lower triangles alone.

    L' C L with a triangular L takes D^3 operations, a quarter of two plain products (`dsygst`). Of
    the eigenvectors Q = H V, Householder reflections H and the eigenvectors V of a tridiagonal
    matrix, H is applied to the N rows that are asked for, and never multiplied out.
    """
    projected = problem.projected
    history = (problem.old_mean - problem.mean) @ problem.factor
    rows = torch.cat([problem.decay**0.5 * history[None], problem.share**0.5 * projected])
    (count, rank), dim = projected.shape, len(problem.factor)
    triangle = np.zeros((dim, dim), order="F")
    triangle[:, :rank] = problem.factor.numpy()
    squares, _ = lapack.dsygst(problem.old_cov.T, triangle, itype=2, lower=1)
    squares = blas.dsyrk(
        1.0, rows.numpy().T, beta=problem.decay, c=squares[:rank, :rank], lower=1, overwrite_c=1
    )
    reduced, diagonal, beside, scales, _ = lapack.dsytrd(
        squares, lower=1, lwork=BLOCK * rank, overwrite_a=1
    )
    # by divide and conquer, from scipy 1.16 on
    values, vectors = scipy.linalg.eigh_tridiagonal(diagonal, beside)
    turned = projected.numpy().copy(order="F")
    turned[:, 1:], _, _ = lapack.dormqr(
        "R", "N", reduced[1:, :-1], scales, turned[:, 1:], BLOCK * (count + BLOCK + 1)
    )
    return torch.from_numpy(values), torch.from_numpy(turned @ vectors)


def _from_data(problem: _Problem) -> Mixture:
    """The mixture by singular values of a square root F of A, F'F = A: several times slower, and
    accurate where `_from_squares` is not.

    F has a row for each direction of the history, the shift of its mean, and each image. Deviations
    from the mixture's mean sum to zero, which gives the rows a known null vector q; a reflection of
    q into the row of the shift removes both. The part of an image outside the range is 1 - h as a
    squared length, accurate also near zero.
    """
    count, total = len(problem.x), 1 + problem.share
    projected = problem.projected
    q_old, q_new = (problem.decay / total) ** 0.5, (problem.share / total) ** 0.5
    shift = problem.decay**0.5 * (problem.old_mean - problem.mean) @ problem.factor
    rows = problem.share**0.5 * projected - q_new / (1 + q_old) * shift
    if problem.decay:
        root = torch.from_numpy(covariance_factor(problem.old_cov)).to(rows)
        rows = torch.cat([problem.decay**0.5 * root.T @ problem.factor, rows])
    left, sizes, _ = torch.linalg.svd(rows, full_matrices=False)
    floor = max(rows.shape) * torch.finfo(rows.dtype).eps * sizes.max().item() if len(sizes) else 0
    rank = int((sizes > floor).sum())
    left, sizes = left[:, :rank].flip(1), sizes[:rank].flip(0)

    unit = rows.new_zeros(len(rows), count)
    unit[len(rows) - count :] = torch.eye(count, out=rows.new_empty(count, count))
    unit[len(rows) - count :] -= q_new**2 / (1 + q_old)
    scores = left.T @ unit
    outside = unit - left @ scores
    outside -= left @ (left.T @ outside)  # again, for orthogonality
    rest = (total * (outside**2).sum(0)).clamp(max=1)
    return Mixture(sizes**2, scores.T, rest, problem.share)


def _influence(problem: _Problem) -> tuple[np.ndarray, float]:
    """First order in an image's weight, about the mixture E(u) with every image:

    r_i = share (mean_j q(x_j) - q(x_i)),   q(x) = |x - mu_r|^2 - (x - m)' K (x - m),
    K = L (L' cov L)^(-1/2) L'. The rewards of a batch sum to zero.
    """
    weight = (1 - problem.decay) / len(problem.x)
    mean = problem.decay * problem.old_mean + weight * problem.x.sum(0)
    projected = (problem.x - mean) @ problem.factor
    history = (problem.old_mean - mean) @ problem.factor
    squares = problem.decay * problem.old_squares
    squares += problem.decay * torch.outer(history, history) + weight * projected.T @ projected
    values, vectors = torch.linalg.eigh((squares + squares.T) / 2)
    keep = torch.from_numpy(significant(values.cpu().numpy())).to(values.device)
    roots = values[keep].sqrt()
    slopes = ((projected @ vectors[:, keep]) ** 2) @ (1 / roots)
    q = problem.distances - slopes
    rewards = problem.share * (q.mean() - q)
    return rewards.cpu().numpy(), _fid(problem, roots.sum())
