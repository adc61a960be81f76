"""Nodes for integrals over the half line of functions singular on an imaginary slit.

The traces of square roots behind the leave-one-out FID are such integrals: of log(l + t^2), which
is analytic in t off the points i sqrt(l), so off the slit i [sqrt(smallest), sqrt(largest)].
"""

from __future__ import annotations

import math

import numpy as np
import scipy.special

LIBRARY_HOLDS = 1e-10  # below this, the library's sn(u | 1 - x) has lost x
MIRRORED = 1e-9  # least relative width of a spectrum; a single point needs no more


def half_line_nodes(
    smallest: float, largest: float, tolerance: float
) -> tuple[np.ndarray, np.ndarray]:
    """Nodes t and weights w, both (Q,) float64, with sum w f(t) ~ the integral of f over (0, inf).

    Midpoint rule in the Jacobi elliptic variable t = sqrt(smallest) sc(u | 1 - smallest/largest),
    u in (0, K) (Hale, Higham, Trefethen 2008, "Computing A^alpha, log(A) and related matrix
    functions by contour integrals", method 3), of relative error about
    exp(-2 pi^2 Q / (log(largest/smallest) + 6)).

    Args:
        smallest, largest: > 0; squares of the ends of the slit that holds f's singularities.
        tolerance: relative; 1e-12 takes 33 nodes for a spectrum of condition 1e8.
    """
    smallest = min(smallest, largest * (1 - MIRRORED))
    ratio = smallest / largest
    count = max(math.ceil((6 - math.log(ratio)) * -math.log(tolerance) / (2 * math.pi**2)), 2)
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
    if complement > LIBRARY_HOLDS:
        sn, cn, dn, _ = scipy.special.ellipj(u, 1 - complement)
        return sn / cn, dn / cn**2
    # First order in 1 - m (Abramowitz & Stegun 16.15).
    tanh, sech, product = np.tanh(u), 1 / np.cosh(u), np.sinh(u) * np.cosh(u)
    quarter = complement / 4
    sn = tanh + quarter * (product - u) * sech**2
    cn = sech - quarter * (product - u) * tanh * sech
    dn = sech + quarter * (product + u) * tanh * sech
    return sn / cn, dn / cn**2
