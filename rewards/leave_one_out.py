"""Leave-one-out FID: how much each image of a batch brings its distribution nearer the reference.

With EMA moments M before the batch and a decay b, E(u) = b M + (1 - b) u mixes history and batch:

    r_i = F(E(batch without i)) - F(E(batch))          > 0: the image helps

Leaving one image out of the mixture is a rank-one change of its covariance. All N rewards therefore
follow from one eigendecomposition and a quadrature whose nodes all images share; nothing is
approximated. Moments are population moments (divided by N); `ddof` cancels to first order in r_i.

Shapes: N images, D dimensions, R rank, Q quadrature nodes.
"""

from __future__ import annotations

import math

import numpy as np
import scipy.linalg
import scipy.special

from cluster.errors import DataError
from rewards.fid import Reference, distance_to_reference, significant
from rewards.moments import Moments, check_features

TOLERANCE = 1e-13  # relative, of the quadrature
LOSES_RANK = 1e-13  # 1 - h below this: the image alone spans a direction


def leave_one_out_fid(
    features: np.ndarray, moments: Moments, reference: Reference, decay: float
) -> tuple[np.ndarray, float]:
    """Exact leave-one-out rewards with the full covariance.

    Args:
        features: (N, D), N >= 2, of the batch.
        moments: EMA state before this batch; not changed.
        reference: real images' moments in the same feature space.
        decay: the history's weight b in [0, 1); 0 judges the batch alone.

    Returns:
        rewards (N,) float64, in FID units, positive where the image helps, and the FID of the
        mixture with every image.

    Raises:
        DataError: fewer than two images, or dimensions that differ.
    """
    x = check_features(features)
    count, dim = x.shape
    if count < 2:
        raise DataError(f"leave-one-out needs at least 2 images, found {count}")
    if not dim == moments.dim == reference.dim:
        raise DataError(
            f"features have {dim} dimensions, moments {moments.dim}, the reference "
            f"{reference.dim}: all three must come from the same extractor"
        )
    after = moments.update(x, decay)
    fid = distance_to_reference(after.mean, after.cov, reference)

    # The mixture in which every image has the weight it keeps when another one is left out: taking
    # one away then is exactly rank one (notes on the algebra in rewards/README.md).
    share = (1 - decay) / (count - 1)
    total = 1 + share
    batch = Moments.from_features(x)
    mean = (decay * moments.mean + share * count * batch.mean) / total
    cov = _weighted_cov(moments, decay / total, batch, share * count / total)
    deviations = x - mean

    roots, projected = _root_spectrum(total * cov, reference.factor, deviations)
    root_trace = np.sqrt(roots).sum()
    drop = _root_trace_drop(share * total * projected**2, roots)

    gap = mean - reference.mu
    squares = np.einsum("nd,nd->n", deviations, deviations)
    without = (
        gap @ gap
        - 2 * share * (deviations @ gap)
        + share**2 * squares
        + total * np.trace(cov)
        - share * total * squares
        + np.trace(reference.sigma)
        - 2 * (root_trace - drop)
    )
    return without - fid, fid


def _weighted_cov(a: Moments, share_a: float, b: Moments, share_b: float) -> np.ndarray:
    gap = b.mean - a.mean
    return share_a * a.cov + share_b * b.cov + share_a * share_b * np.outer(gap, gap)


def _root_spectrum(
    cov: np.ndarray, factor: np.ndarray, deviations: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues l (R,) of L' cov L above noise, and the deviations in that basis, (N, R)."""
    values, vectors = scipy.linalg.eigh(factor.T @ cov @ factor)
    keep = significant(values)
    return values[keep], deviations @ (factor @ vectors[:, keep])


def _root_trace_drop(updates: np.ndarray, values: np.ndarray) -> np.ndarray:
    """How much the trace of the square root falls when each rank-one part is taken away.

    For A = diag(values) and A_i = A - z_i z_i' with updates = z_i^2 elementwise,

        tr sqrt(A) - tr sqrt(A_i) = -(1/pi) int_0^inf log(1 - g_i(t)) dt,
        g_i(t) = sum_k updates_ik / (values_k + t^2).

    All terms of g are positive, so nothing cancels however small the drop is. Where an image all
    but spans a direction of its own, the smallest eigenvalue m of A_i nears zero and the integrand
    turns singular; the factor (m + t^2) / (l + t^2) is then integrated in closed form, to
    sqrt l - sqrt m.

    Args:
        updates: (N, R) >= 0.
        values: (R,) > 0, ascending.

    Returns:
        (N,) >= 0.
    """
    if not len(values):
        return np.zeros(len(updates))
    updates = np.minimum(updates, values)  # a theorem, up to rounding
    nodes, weights = _nodes(float(values[0]), float(values[-1]))
    squares = nodes**2
    inverse = 1 / (values[:, None] + squares)  # (R, Q)
    ratios = updates / values
    at_zero = np.minimum(ratios.sum(1), 1.0)
    logs = np.log1p(-np.minimum(updates @ inverse, 0.5))
    closed = np.zeros(len(updates))

    large = at_zero > 0.5
    if large.any():
        rest = 1 - at_zero[large]
        rest[rest < LOSES_RANK] = 0.0
        complement = rest[:, None] + ratios[large] @ (squares * inverse)  # 1 - g, no cancellation
        smallest = _smallest_root(updates[large], values)
        lowest = values[0]
        factor = (smallest[:, None] - lowest) / (lowest + squares)  # log1p: (m + t^2) / (l + t^2)
        logs[large] = np.log(complement) - np.log1p(factor)
        closed[large] = np.sqrt(lowest) - np.sqrt(smallest)
    return closed - logs @ weights / math.pi


def _smallest_root(updates: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Smallest eigenvalue of diag(values) - z z': the root of 1 = sum_k updates_k / (values_k - m).

    In [0, values[0]]. The sum rises with m, so bisection cannot fail; it runs on sqrt(m), which the
    caller needs to full accuracy.
    """
    ceiling = values[0]
    low, high = np.zeros(len(updates)), np.full(len(updates), math.sqrt(ceiling))
    full = 1 - (updates / values).sum(1) < LOSES_RANK
    for _ in range(60):
        middle = (low + high) / 2
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = np.where(updates > 0, updates / (values - middle[:, None] ** 2), 0.0)
        above = ~(terms.sum(1) < 1)
        high, low = np.where(above, middle, high), np.where(above, low, middle)
    return np.where(full, 0.0, low**2)


def _nodes(smallest: float, largest: float) -> tuple[np.ndarray, np.ndarray]:
    """Nodes t and weights (Q,) with int_0^inf f(t) dt ~ sum w f(t) for f analytic off i[sqrt l].

    Midpoint rule in the Jacobi elliptic variable t = sqrt(smallest) sc(u | 1 - smallest/largest),
    u in (0, K) (Hale, Higham, Trefethen 2008, method 3). Error about
    exp(-2 pi^2 Q / (log(largest/smallest) + 6)).
    """
    smallest = min(smallest, largest * (1 - 1e-9))
    ratio = smallest / largest
    count = math.ceil((6 - math.log(ratio)) * -math.log(TOLERANCE) / (2 * math.pi**2))
    count += count % 2
    quarter = scipy.special.ellipkm1(ratio)
    u = (np.arange(count // 2) + 0.5) * quarter / count
    sc, slope = _sc(u, ratio)
    # The upper half mirrors the lower: sc(K - u) = 1 / (sqrt(ratio) sc(u)), accurate where a direct
    # evaluation near K would have lost the argument.
    low, high = math.sqrt(smallest) * sc, math.sqrt(largest) / sc
    step = quarter / count
    weights_low = math.sqrt(smallest) * slope * step
    weights_high = math.sqrt(largest) * slope / sc**2 * step
    return np.concatenate([low, high]), np.concatenate([weights_low, weights_high])


def _sc(u: np.ndarray, complement: float) -> tuple[np.ndarray, np.ndarray]:
    """sc(u | m) = sn/cn and its derivative dn/cn^2, m = 1 - complement."""
    if complement > 1e-10:
        sn, cn, dn, _ = scipy.special.ellipj(u, 1 - complement)
        return sn / cn, dn / cn**2
    # First order in 1 - m (Abramowitz & Stegun 16.15): the library routine cannot hold 1 - 1e-11.
    tanh, sech, product = np.tanh(u), 1 / np.cosh(u), np.sinh(u) * np.cosh(u)
    quarter = complement / 4
    sn = tanh + quarter * (product - u) * sech**2
    cn = sech - quarter * (product - u) * tanh * sech
    dn = sech + quarter * (product + u) * tanh * sech
    return sn / cn, dn / cn**2
