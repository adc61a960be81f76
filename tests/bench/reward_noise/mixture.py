"""A synthetic generator with known faults, and real images' distribution that it should have.

An image of class c and mode m has the features

    x = class mean + mode offset + within-class noise

with covariances that are shares of one spectrum s_j ~ 1 / j^a. The generator has the same classes
and modes, but a mode of each class is rare, some images of weak classes show another class, some
images have one of several faults, the within-class noise is shrunk, and all images are shifted.
Both are mixtures of Gaussians, so the moments of their populations are known.

The trace is set by the bias of the FID: from n images it is c / n too high, with c = `BIAS`
(`rewards.distribution.diagnostics.bias_constant`), so that 10,000 images give an FID 2.4 above that
of 50,000. A different trace scales all distances and changes no correlation.

Shapes: N images, D dimensions, K = CLASSES * MODES points (means of Gaussians).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import cached_property

import numpy as np

from rewards.distribution.moments import Moments
from rewards.distribution.reference import Reference

CLASSES, MODES = 1000, 4
BETWEEN, OFFSETS, WITHIN = 0.3, 0.3, 0.4
"""Shares of the covariance: of class means, of modes, of images of one mode."""
SHARED = 0.6
"""Share of a mode's offset that is common to all classes: a style."""
COMMON = 0.7
"""Share of classes whose rare mode is of the first style; in the others it is any."""
BIAS = 30_000.0
WEAK_EVERY, HUBS = 10, 20
"""Every so manieth class is weak: its images show one of so many other classes."""
KINDS, FAULT, FAULT_SPREAD = 8, 0.4, 0.3
"""Faulty images: kinds; squared distance from where they belong, in traces; extra noise."""
INFINITE = 1e-12  # square weight of a population's moments


@dataclass(frozen=True, slots=True)
class Faults:
    """Faults of a generator; all 0: none."""

    rare: float
    """Share of its images that the rare mode of each class lacks."""
    confused: float
    """Share of the weak classes' images that show another class."""
    faulty: float
    """Share of faulty images."""
    shrunk: float
    """Share of the within-class variance that is lost."""
    shift: float
    """Distance of all images from where they belong, in roots of the trace."""
    new_shift: float
    """The same in a direction of its own."""

    def blend(self, weight: float, other: Faults, other_weight: float) -> Faults:
        """The weighted sum of both."""
        pairs = zip(astuple(self), astuple(other))
        return Faults(*(weight * mine + other_weight * its for mine, its in pairs))


BASE = Faults(rare=0.9, confused=0.5, faulty=0.3, shrunk=0.0, shift=0.24, new_shift=0.0)
"""Of the policy before the run."""
TUNED = Faults(rare=0.5, confused=0.2, faulty=0.05, shrunk=0.4, shift=0.05, new_shift=0.19)
"""At its end: old faults are smaller, and there are two new ones, as instance rewards bring."""


def faults_at(progress: float, strength: float = 1.0) -> Faults:
    """On the straight line from `BASE` (0) to `TUNED` (1), all times the strength."""
    return BASE.blend(strength * (1 - progress), TUNED, strength * progress)


@dataclass(frozen=True, slots=True)
class Images:
    """Features of images of known kinds."""

    features: np.ndarray
    """(N, D) float64"""
    rare: np.ndarray
    """(N,) bool: of their class's rare mode."""
    confused: np.ndarray
    """(N,) bool: of another class."""
    faulty: np.ndarray
    """(N,) bool"""


class Mixture:
    """The generator's and the real images' distributions.

    Args:
        dim: D.
        exponent: a of the spectrum.
    """

    def __init__(self, dim: int, exponent: float = 1.0) -> None:
        self.dim = dim
        self.spectrum = spectrum(dim, exponent)
        rng = generator("mixture", dim, exponent)
        scale = np.sqrt(self.spectrum)

        def drawn(*shape: int) -> np.ndarray:
            return rng.standard_normal((*shape, dim)) * scale

        styles = drawn(MODES)
        offsets = SHARED**0.5 * styles + (1 - SHARED) ** 0.5 * drawn(CLASSES, MODES)
        means = BETWEEN**0.5 * drawn(CLASSES)[:, None] + OFFSETS**0.5 * offsets
        self.points = means.reshape(-1, dim)
        self.faults = FAULT**0.5 * drawn(KINDS)
        self.shifts = drawn(2)
        same = rng.random(CLASSES) < COMMON
        self.rare_mode = np.where(same, 0, rng.integers(MODES, size=CLASSES))
        self.hub = WEAK_EVERY * rng.integers(HUBS, size=CLASSES) + 1
        self.weak = np.arange(CLASSES) % WEAK_EVERY == 0

    @cached_property
    def reference(self) -> Reference:
        """Of infinitely many real images."""
        found = self._moments(
            np.full(len(self.points), 1 / len(self.points)), Faults(0, 0, 0, 0, 0, 0)
        )
        return Reference(found.mean, found.cov, source="the synthetic reference")

    def population(self, faults: Faults) -> Moments:
        """Of infinitely many images of every class."""
        modes = self._modes(faults)
        own = modes * np.where(self.weak, 1 - faults.confused, 1)[:, None]
        weights = own.copy()
        for c in np.flatnonzero(self.weak):
            weights[self.hub[c]] += faults.confused * modes[self.hub[c]]
        return self._moments(weights.ravel() / CLASSES, faults)

    def sample(self, classes: np.ndarray, faults: Faults, rng: np.random.Generator) -> Images:
        """An image of each of the classes (N,)."""
        confused = self.weak[classes] & (rng.random(len(classes)) < faults.confused)
        shown = np.where(confused, self.hub[classes], classes)
        cumulative = self._modes(faults).cumsum(1)[shown]
        modes = (rng.random(len(classes))[:, None] > cumulative[:, :-1]).sum(1)
        faulty = rng.random(len(classes)) < faults.faulty
        x = rng.standard_normal((len(classes), self.dim), dtype=np.float32) * np.sqrt(self.spectrum)
        x *= np.sqrt(WITHIN * (1 - faults.shrunk + FAULT_SPREAD * faulty))[:, None]
        x += self.points[shown * MODES + modes] + self._shift(faults)
        x[faulty] += self.faults[rng.integers(KINDS, size=faulty.sum())]
        return Images(x, (modes == self.rare_mode[shown]) & ~confused, confused, faulty)

    def _shift(self, faults: Faults) -> np.ndarray:
        return np.array([faults.shift, faults.new_shift]) @ self.shifts

    def _modes(self, faults: Faults) -> np.ndarray:
        """(CLASSES, MODES) weights of the modes of each class."""
        rare = np.zeros((CLASSES, MODES), dtype=bool)
        rare[np.arange(CLASSES), self.rare_mode] = True
        left = (1 - faults.rare) / MODES
        return np.where(rare, left, (1 - left) / (MODES - 1))

    def _moments(self, weights: np.ndarray, faults: Faults) -> Moments:
        mean = weights @ self.points
        centred = self.points - mean
        cov = (centred * weights[:, None]).T @ centred
        fault = self.faults.mean(0)
        cov += faults.faulty * (self.faults.T @ self.faults / KINDS)
        cov -= faults.faulty**2 * np.outer(fault, fault)
        noise = WITHIN * (1 - faults.shrunk + FAULT_SPREAD * faults.faulty)
        cov[np.diag_indices(self.dim)] += noise * self.spectrum
        mean = mean + faults.faulty * fault + self._shift(faults)
        return Moments(mean=mean, cov=cov, weight=1.0, square_weight=INFINITE)


def spectrum(dim: int, exponent: float) -> np.ndarray:
    """(D,) eigenvalues ~ 1 / j^exponent.

    Their sum is that which gives 2,048 dimensions the bias `BIAS`, whatever `dim` is.
    """
    return _trace(exponent) * _shape(dim, exponent)


def _shape(dim: int, exponent: float) -> np.ndarray:
    values = np.arange(1, dim + 1) ** -float(exponent)
    return values / values.sum()


def _trace(exponent: float) -> float:
    """Of a covariance of 2,048 dimensions with the bias `BIAS`."""
    values = _shape(2048, exponent)
    pairs = values[:, None] * (values / (values[:, None] + values))
    return BIAS / float(values.sum() + (pairs.sum() + np.trace(pairs)) / 2)


def blend(parts: Sequence[tuple[float, Moments]]) -> Moments:
    """The moments whose raw moments are the weighted sum of others'. Weights sum to 1."""
    mean = sum((weight * part.mean for weight, part in parts), np.zeros(parts[0][1].dim))
    second = sum((weight * part.m2 for weight, part in parts), np.zeros_like(parts[0][1].cov))
    cov = second - np.outer(mean, mean)
    return Moments(mean=mean, cov=(cov + cov.T) / 2, weight=1.0, square_weight=INFINITE)


def generator(*key: object) -> np.random.Generator:
    """Random numbers that belong to a name and numbers: results do not depend on their order."""
    return np.random.Generator(np.random.Philox(zlib.crc32(repr(key).encode())))
