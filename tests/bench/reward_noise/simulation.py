"""Rewards of a simulated iteration against those of an infinite, current history.

A run of `Setting.iterations` iterations is looked at half-way. Its history started from images of
the base policy, a window of them, and has every batch since. The rewards are those of
`leave_one_out_fid`. The true rewards are of the same images with the generator's population moments
at that moment as history, of weight nearly 1: an image's influence on the population's FID.

Shapes: N images of a batch, D dimensions, G rollouts of a group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from cluster.messages import Condition
from learner.data.conditions import ConditionStream
from rewards.distribution.leave_one_out import leave_one_out_fid
from rewards.distribution.moments import Covariance, Moments, decay_for
from rewards.distribution.reference import Reference
from tests.bench.reward_noise.mixture import CLASSES, Faults, Images, Mixture, faults_at, generator

STEADY = 150  # iterations before the one looked at, of a policy that does not move
NEGLIGIBLE = 0.01  # weight below which a batch of the history is left out
POPULATION = 1 - 1e-6  # weight of the population's moments in the true rewards
CHUNK = 4096  # images at a time


@dataclass(frozen=True)
class Setting:
    """A batch, a window, and how fast the policy moves."""

    dim: int
    batch: int
    window: int
    iterations: int
    """Of the whole run, from `BASE` to `TUNED`; 0: the policy stays half-way between them."""
    batches: int = 1
    """Batches that are scored with the same history, for the statistics."""
    repeat: int = 0
    strength: float = 1.0
    """Of all faults."""

    @property
    def rollouts(self) -> int:
        """G."""
        return 12 if self.batch % 12 == 0 else 16

    @property
    def decay(self) -> float:
        return decay_for(self.window, self.batch)

    @property
    def past(self) -> int:
        """Iterations before the one looked at."""
        return self.iterations // 2 or STEADY

    def faults(self, iteration: int) -> Faults:
        """Of the policy; half-way between `BASE` and `TUNED` in the iteration looked at."""
        return faults_at(iteration / self.iterations if self.iterations else 0.5, self.strength)


@dataclass(frozen=True)
class Space:
    """Where rewards are computed: all dimensions or the first ones, full or diagonal covariance."""

    name: str
    covariance: Covariance = "full"
    dims: int = 0
    """First dimensions, along which the spectrum is largest: nearly principal components; 0: all.
    """
    rotated: bool = False
    """Features are a random rotation of the principal axes, as a network's are of its own."""


FULL = Space("full")
DIAGONAL = Space("diagonal", "diagonal", rotated=True)
ALIGNED = Space("diagonal-aligned", "diagonal")


def spaces(dim: int) -> tuple[Space, ...]:
    """All that are compared."""
    cut = [Space(f"pca-{size}", dims=size) for size in (64, 256, 512, 1024) if size < dim]
    return FULL, DIAGONAL, ALIGNED, *cut


class Scorer:
    """Rewards in each space, against the mixture's reference."""

    def __init__(self, mixture: Mixture) -> None:
        self.mixture = mixture
        self._references = {space.name: self._reference(space) for space in spaces(mixture.dim)}

    @cached_property
    def _rotation(self) -> np.ndarray:
        dim = self.mixture.dim
        return np.linalg.qr(generator("rotation", dim).standard_normal((dim, dim)))[0]

    def __call__(
        self, space: Space, features: np.ndarray, moments: Moments, decay: float
    ) -> np.ndarray:
        """(N,) rewards of (N, D) features with a history."""
        x, m, reference = self.within(space, features, moments)
        return leave_one_out_fid(x, m, reference, decay, covariance=space.covariance)[0]

    def influence(self, space: Space, features: np.ndarray, population: Moments) -> np.ndarray:
        """(N,) rewards with a population as history, times N / (1 - decay): free of N."""
        x, m, reference = self.within(space, features, population)
        rewards, _ = leave_one_out_fid(
            x,
            m,
            reference,
            POPULATION,
            covariance=space.covariance,
            method="influence" if space.covariance == "full" else "exact",
        )
        return rewards * ((len(features) - 1) / (1 - POPULATION))

    def within(
        self, space: Space, features: np.ndarray, moments: Moments
    ) -> tuple[np.ndarray, Moments, Reference]:
        """Features, moments and the reference in a space."""
        reference = self._references[space.name]
        return self._moved(space, features), self._moments(space, moments), reference

    def _moved(self, space: Space, features: np.ndarray) -> np.ndarray:
        if space.rotated:
            return features @ self._rotation
        return features[..., : space.dims] if space.dims else features

    def _moments(self, space: Space, moments: Moments) -> Moments:
        mean = self._moved(space, moments.mean)
        if space.dims:
            return replace(moments, mean=mean, cov=moments.cov[: space.dims, : space.dims].copy())
        if not space.rotated:
            return moments
        variances = ((moments.cov @ self._rotation) * self._rotation).sum(0)
        return replace(moments, mean=mean, cov=np.diag(variances))

    def _reference(self, space: Space) -> Reference:
        whole = self.mixture.reference
        if space == FULL:
            return whole
        found = self._moments(
            space, Moments(mean=whole.mu, cov=whole.sigma, weight=1.0, square_weight=1.0)
        )
        return Reference(found.mean, found.cov, diagonal=space.rotated)


def classes_of(setting: Setting) -> Iterator[np.ndarray]:
    """(N,) classes of the iterations from the one looked at backwards, as a run draws them."""
    conditions = [Condition(text=str(c)) for c in range(CLASSES)]
    groups = setting.batch // setting.rollouts
    stream = ConditionStream(conditions, groups, setting.repeat)
    for iteration in range(setting.past + setting.batches - 1, -1, -1):
        drawn = [int(condition.text) for condition in stream.draw(iteration)]
        yield np.repeat(drawn, setting.rollouts)


def simulated(mixture: Mixture, setting: Setting) -> tuple[Images, Moments]:
    """Images of the iterations looked at (batches * N), and the history before them."""
    rng = generator("run", setting.dim, setting.batch, setting.iterations, setting.repeat)
    order = classes_of(setting)
    now = setting.faults(setting.past)
    looked_at = np.concatenate([next(order) for _ in range(setting.batches)])
    images = mixture.sample(looked_at, now, rng)

    history = History(mixture.reference.mu)
    left = 1.0
    for back, classes in enumerate(order, 1):
        faults = setting.faults(setting.past - back)
        history.add(mixture.sample(classes, faults, rng).features, left * (1 - setting.decay))
        left *= setting.decay
        if left < NEGLIGIBLE:
            break
    else:
        start = setting.faults(0)
        for first in range(0, setting.window, CHUNK):
            count = min(CHUNK, setting.window - first)
            classes = np.arange(first, first + count) % CLASSES
            seeds = mixture.sample(classes, start, rng).features
            history.add(seeds, left * count / setting.window)
    return images, history.moments()


class History:
    """Moments of batches of given weights: what `Moments.update` of each in turn gives, with one
    product of matrices for several small ones."""

    def __init__(self, shift: np.ndarray) -> None:
        dim = len(shift)
        self._shift, self._first, self._second = shift, np.zeros(dim), np.zeros((dim, dim))
        self._weight = self._square = 0.0
        self._waiting: list[np.ndarray] = []
        self._count = 0

    def add(self, features: np.ndarray, weight: float) -> None:
        """(N, D) images, which weigh so much together."""
        each = weight / len(features)
        x = features - self._shift
        self._first += each * x.sum(0)
        self._weight += weight
        self._square += each * weight
        self._waiting.append(x * each**0.5)
        self._count += len(x)
        if self._count >= CHUNK:
            self._sum_up()

    def moments(self) -> Moments:
        """Of weight 1."""
        self._sum_up()
        mean, second = self._first / self._weight, self._second / self._weight
        return Moments(
            mean=self._shift + mean,
            cov=second - np.outer(mean, mean),
            weight=1.0,
            square_weight=self._square / self._weight**2,
        )

    def _sum_up(self) -> None:
        if self._waiting:
            rows = np.concatenate(self._waiting)
            self._second += rows.T @ rows
        self._waiting, self._count = [], 0


def figures(
    rewards: np.ndarray, truth: np.ndarray, images: Images, rollouts: int
) -> dict[str, float]:
    """How well group-centred rewards tell what the true ones do; NaN without such images.

    `correlation` is over all images, after each group's mean is taken off; `correlation_good`
    is over those that are not faulty. `auc_rare`: of images of
    rare modes, above all others that are not faulty; `auc_faulty`, `auc_confused`: of these below
    all others. `sign_faulty`: share of the groups with faulty and other images where the faulty
    ones have the lower mean.
    """
    r, t = (centred(values, rollouts) for values in (rewards, truth))
    good = ~images.faulty
    return {
        "correlation": correlation(r, t),
        "correlation_good": correlation(r[good] - r[good].mean(), t[good] - t[good].mean()),
        "auc_rare": auc(r[images.rare & good], r[~images.rare & good]),
        "auc_faulty": auc(r[good], r[~good]),
        "auc_confused": auc(r[~images.confused], r[images.confused]),
        "sign_faulty": sign_share(r, images.faulty, rollouts),
    }


def centred(values: np.ndarray, rollouts: int) -> np.ndarray:
    """(N,) values less the means of their groups of consecutive images."""
    groups = values.reshape(-1, rollouts)
    return (groups - groups.mean(1, keepdims=True)).ravel()


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Of values with mean 0."""
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def auc(above: np.ndarray, below: np.ndarray) -> float:
    """Probability that one of the first is above one of the second."""
    if not (len(above) and len(below)):
        return float("nan")
    ordered = np.sort(below)
    wins = np.searchsorted(ordered, above, "left") + np.searchsorted(ordered, above, "right")
    return float(wins.mean() / (2 * len(below)))


def sign_share(rewards: np.ndarray, marked: np.ndarray, rollouts: int) -> float:
    """Share of the groups with marked and other images where the marked have the lower mean."""
    r, m = rewards.reshape(-1, rollouts), marked.reshape(-1, rollouts)
    counts = m.sum(1)
    both = (counts > 0) & (counts < rollouts)
    r, m, counts = r[both], m[both], counts[both]
    if not len(r):
        return float("nan")
    gap = (r * m).sum(1) / counts - (r * ~m).sum(1) / (rollouts - counts)
    return float((gap < 0).mean())
