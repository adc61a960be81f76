"""The same correlation by arithmetic, without a history that is sampled.

Rewards estimate -q(x), up to a factor and a constant (rewards/DESIGN.md, first order):

    q(x) = |x - mu_r|^2 - (x - m)' K (x - m),    K = L (L' C L)^(-1/2) L'

With a history of n effective images, mean and covariance have errors of variance ~ 1/n, to first
order those below; so has q, with a variance `noise` / n between the images of a group. If the
history is also older than the policy, q is that of older populations, which are known. Hence

    correlation = corr(old q, q) / sqrt(1 + noise / (n var(old q)))

In the eigenbasis Q of A = L' C L = Q diag(l) Q', z = Q' L' (x - m) has the variances l_k = w_k +
b_k, within and between groups. The errors E of A and e of z's mean give

    q's error = sum_jk z_j z_k E_jk / (sqrt l_j sqrt l_k (sqrt l_j + sqrt l_k))
                + 2 sum_k z_k e_k / sqrt l_k
    n var E_jk = (1 + [j = k]) (l_j l_k + (g - 1) b_j b_k),    n var e_k = w_k + g b_k

where groups of G images of one class count as one draw of the class's mean: g = G for few groups,
and g = 0 once every class was drawn equally often. For Gaussian z, within a group,

    var z_j z_k = (1 + [j = k]) w_j w_k + w_j b_k + b_j w_k   (j = k: 4 w_k b_k + 2 w_k^2)

The diagonal form has K = diag(sd_r / sd), and errors of the variances alone:

    q's error = sum_k sd_r / (2 sd^3) v_k^2 E_kk + 2 sum_k sd_r / sd v_k e_k,    v = x - m

Not in it: orders above 1/n, differences between the classes' covariances, the uneven weights of
classes in an exponential history, and what the images of a batch do to each other's rewards. The
simulation has all of them.

Shapes: N images, D dimensions, R rank, G rollouts of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg

from rewards.distribution.moments import Moments
from rewards.distribution.reference import Reference
from tests.bench.reward_noise.mixture import CLASSES, Images, Mixture, blend, faults_at
from tests.bench.reward_noise.simulation import (
    FULL,
    Scorer,
    Setting,
    Space,
    centred,
    correlation,
)

AGES = (0.0, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Windows' e-foldings in units of the iterations before the one looked at; 0: no lag."""
NODES = np.array([0.0, 1 / 6, 1 / 3, 1 / 2])
"""Progress at which populations are known: raw moments are cubic in it, so four give all others."""


@dataclass(frozen=True, slots=True)
class Noise:
    """Variance of q's error between the images of a group, times n, by its dependence on g."""

    images: float
    groups: float

    def of(self, effective: float, rollouts: int) -> float:
        """Variance with so many effective images."""
        drawn = min(effective / (rollouts * CLASSES), 1.0)
        return (self.images + rollouts * (1 - drawn) * self.groups) / effective


def full_noise(x: np.ndarray, population: Moments, reference: Reference, rollouts: int) -> Noise:
    """Of the full covariance, for (N, D) images of groups."""
    factor = reference.factor
    squares = factor.T @ population.cov @ factor
    values, vectors = scipy.linalg.eigh(squares)
    values = np.maximum(values, values[-1] * 1e-12)
    z = (x - population.mean) @ factor @ vectors
    within = within_variances(z, rollouts)
    within = np.minimum(within, values)
    between = values - within
    roots = np.sqrt(values)
    pairs = 1 / (roots[:, None] + roots) ** 2  # (R, R)

    # Relative to the eigenvalues: l_j l_k of `var E` cancels against that of its coefficient.
    w, b = within, between / values
    products = np.outer(w, w) + np.outer(w, between) + np.outer(between, w)
    products[np.diag_indices(len(w))] *= 2
    twice = np.ones_like(pairs)
    twice[np.diag_indices(len(w))] = 2
    products *= pairs * twice
    whole = products.sum()
    classes = b @ products @ b
    mean_images, mean_groups = 4 * (w * within / values).sum(), 4 * (w * between / values).sum()
    return Noise(float(whole - classes + mean_images), float(classes + mean_groups))


def diagonal_noise(
    x: np.ndarray, population: Moments, reference: Reference, rollouts: int
) -> Noise:
    """Of the diagonal form, whose features are correlated."""
    sd_r, sd = np.sqrt(np.diag(reference.sigma)), np.sqrt(np.diag(population.cov))
    v = x - population.mean
    groups = v.reshape(-1, rollouts, v.shape[1])
    means = groups.mean(1)
    within = (groups - means[:, None]).reshape(v.shape) * (rollouts / (rollouts - 1)) ** 0.5
    total = v.T @ v / len(v)
    inside = within.T @ within / len(v)
    between = total - inside
    scale = sd_r / (2 * sd**3)
    squares = 2 * inside * (inside + 2 * between) * np.outer(scale, scale)
    linear = 4 * inside * np.outer(sd_r / sd, sd_r / sd)
    classes = (squares * 2 * between**2).sum()
    return Noise(
        float((squares * 2 * total**2).sum() - classes + (linear * inside).sum()),
        float(classes + (linear * between).sum()),
    )


def within_variances(z: np.ndarray, rollouts: int) -> np.ndarray:
    """(R,) variances of (N, R) within groups of consecutive images."""
    groups = z.reshape(-1, rollouts, z.shape[1])
    return ((groups - groups.mean(1, keepdims=True)) ** 2).sum((0, 1)) / (len(z) - len(groups))


class Arithmetic:
    """Correlations in one space.

    Args:
        images: to take variances and correlations of, of whole groups of `rollouts`.
        past: populations of a policy that moves, at `NODES`; the last is the current one.
        ages: at which correlations are computed; between them they are interpolated.
    """

    def __init__(
        self,
        scorer: Scorer,
        space: Space,
        images: Images,
        rollouts: int,
        past: list[Moments],
        ages: Sequence[float] = AGES,
    ) -> None:
        x, now = images.features, past[-1]
        truth = centred(scorer.influence(FULL, x, now), rollouts)
        noise = diagonal_noise if space.covariance == "diagonal" else full_noise
        self.noise = noise(*scorer.within(space, x, now), rollouts)
        self.signal, self.agreement = [], []
        self._ages = ages
        for age in ages:
            found = centred(scorer.influence(space, x, older(past, age) if age else now), rollouts)
            self.signal.append(float(found @ found) / (len(x) * (1 - 1 / rollouts)))
            self.agreement.append(correlation(found, truth))

    def correlation(self, setting: Setting) -> float:
        """Expected."""
        age = efolding(setting)
        signal = float(np.interp(age, self._ages, self.signal))
        agreement = float(np.interp(age, self._ages, self.agreement))
        noise = self.noise.of(setting.window, setting.rollouts)
        return agreement / (1 + noise / signal) ** 0.5


def efolding(setting: Setting) -> float:
    """The age in which the history's weight falls by e, in units of the iterations before."""
    if not setting.iterations:
        return 0.0
    return 1 / (-np.log(max(setting.decay, 1e-9)) * setting.past)


def older(past: list[Moments], age: float) -> Moments:
    """The mean population of an exponential history half-way through the run.

    Args:
        past: at `NODES`; the last is the current one.
        age: e-folding, in units of the time since the start; before it, the policy was the first.
    """
    ages = (np.arange(4000) + 0.5) / 4000
    weights = np.exp(-ages / age)
    weights *= (1 - np.exp(-1 / age)) / weights.sum()
    parts = [weights @ _lagrange(k, (1 - ages) / 2) for k in range(len(NODES))]
    parts[0] += np.exp(-1 / age)
    return blend(list(zip(parts, past)))


def _lagrange(k: int, at: np.ndarray) -> np.ndarray:
    others = np.delete(NODES, k)
    return np.prod([(at - other) / (NODES[k] - other) for other in others], axis=0)


def populations(mixture: Mixture, strength: float = 1.0) -> list[Moments]:
    """Of the policy that moves, at `NODES`."""
    return [mixture.population(faults_at(node, strength)) for node in NODES]
