"""The Fréchet distance of two Gaussians (Heusel et al. 2017, 1706.08500), and references for it.

    F = |mu_a - mu_b|^2 + tr S_a + tr S_b - 2 tr (S_a S_b)^(1/2)

The last trace is computed in its symmetric form, tr (L' S_a L)^(1/2) with S_b = L L': eigenvalues
of a symmetric matrix are real and accurate where `sqrtm` of the product is neither.

Shapes: N images, D feature dimensions.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.linalg

from cluster.errors import DataError
from rewards.base import FeatureExtractor
from rewards.moments import Moments, check_features

NOISE_MARGIN = 4.0
NOISE_ULPS = 50  # at most; symmetric eigensolvers stay within some sqrt(D)


@dataclass(frozen=True)
class Reference:
    """Mean and covariance of real images' features, float64."""

    mu: np.ndarray
    """(D,)"""
    sigma: np.ndarray
    """(D, D). FID tools divide by N - 1; Tessera's own moments divide by N."""
    fingerprint: str = ""
    """Extractor that made the features; empty where the file does not say."""
    source: str = ""
    """File it was read from, or name of the images; for messages."""
    images: int = -1
    """How many images; -1 where the file does not say."""
    diagonal: bool = False
    """Only variances are known, and sigma is a diagonal matrix of them: no covariance."""

    def __post_init__(self) -> None:
        dim = len(self.mu)
        if self.mu.shape != (dim,) or self.sigma.shape != (dim, dim):
            raise DataError(
                f"a reference needs mu (D,) and sigma (D, D), found {self.mu.shape} and "
                f"{self.sigma.shape}"
            )
        if not (np.isfinite(self.mu).all() and np.isfinite(self.sigma).all()):
            raise DataError("the reference's mu or sigma is not finite")
        largest = np.abs(self.sigma).max(initial=0)
        if np.abs(self.sigma - self.sigma.T).max(initial=0) > 1e-6 * largest:
            raise DataError("the reference's sigma is not symmetric: it is no covariance")

    @property
    def dim(self) -> int:
        return len(self.mu)

    def check_dim(self, dim: int, extractor: str = "") -> None:
        """Refuse features of another dimension than the reference's.

        Raises:
            DataError: names the file, both dimensions and the extractor.
        """
        if dim != self.dim:
            raise DataError(
                f"{self.source or 'the reference'}: expected moments of {dim} dimensions, as the "
                f"features of {extractor or self.fingerprint or 'the run'} have, found {self.dim}: "
                "build it with the network of the run (`python -m rewards.reference`), or set "
                "rewards.features to the reference's"
            )

    @cached_property
    def factor(self) -> np.ndarray:
        """L (D, R) with L L' = sigma, R its numerical rank.

        Raises:
            DataError: only variances are known.
        """
        if self.diagonal:
            raise DataError(
                "the reference holds variances alone (sigma_diagonal), no covariance: set "
                "rewards.loo_fid.covariance to diagonal, or take statistics with sigma"
            )
        return covariance_factor(self.sigma)

    @classmethod
    def from_features(
        cls, features: np.ndarray, fingerprint: str = "", source: str = ""
    ) -> Reference:
        """Reference of (N, D) features."""
        moments = Moments.from_features(features)
        return cls(moments.mean, moments.cov, fingerprint, source, len(features))

    @classmethod
    def from_images(
        cls, images: np.ndarray, extractor: FeatureExtractor, batch: int = 256
    ) -> Reference:
        """Reference of (N, H, W, 3) uint8 images in memory, `batch` at a time through a network."""
        parts = [extractor(images[at : at + batch]) for at in range(0, len(images), batch)]
        return cls.from_features(np.concatenate(parts), extractor.fingerprint)

    @classmethod
    def from_npz(cls, path: str | os.PathLike[str]) -> Reference:
        """Reference from a file with arrays `mu` and `sigma`, as FID tools write them; see
        `rewards.reference.read_reference`."""
        from rewards.reference import read_reference  # which builds on this module

        return read_reference(path)


def covariance_factor(cov: np.ndarray) -> np.ndarray:
    """L (D, R) with L L' = cov; eigenvalues that are rounding noise are dropped."""
    values, vectors = scipy.linalg.eigh(cov)
    keep = significant(values)
    return vectors[:, keep] * np.sqrt(values[keep])


def significant(values: np.ndarray) -> np.ndarray:
    """Mask of eigenvalues (D,) of a covariance that stand above rounding noise."""
    return values > noise(values, NOISE_MARGIN)


def noise(values: np.ndarray, margin: float = 1.0) -> float:
    """Size of the rounding error in computed eigenvalues (D,) of a covariance.

    The true ones are not negative, so the most negative computed one shows how large the noise is,
    times a margin; but never less than the eigensolver's own error.
    """
    ulps = min(len(values), NOISE_ULPS) * np.finfo(np.float64).eps
    return float(max(ulps * values.max(initial=0), -margin * values.min(initial=0)))


def frechet_distance(
    mu_a: np.ndarray, cov_a: np.ndarray, mu_b: np.ndarray, cov_b: np.ndarray
) -> float:
    """Fréchet distance of N(mu_a, cov_a) and N(mu_b, cov_b), in squared feature units; >= 0."""
    factor = covariance_factor(cov_b)
    return _distance(mu_a, cov_a, mu_b, float(np.trace(cov_b)), factor)


def distance_to_reference(mean: np.ndarray, cov: np.ndarray, reference: Reference) -> float:
    """`frechet_distance` to a reference, whose factor is computed once."""
    trace = float(np.trace(reference.sigma))
    return _distance(mean, cov, reference.mu, trace, reference.factor)


def features_to_reference(features: np.ndarray, reference: Reference) -> float:
    """`distance_to_reference` of the moments of (N, D) features, without their covariance.

    With X the centred features, tr sqrt(L' X'X L / N) is the sum of the singular values of X L over
    sqrt N: O(N D^2) for few images, where the covariance's decomposition costs O(D^3).
    """
    x = check_features(features)
    mean = x.mean(0)
    centred = x - mean
    roots = scipy.linalg.svdvals(centred @ reference.factor) if reference.factor.size else 0.0
    root_trace = float(np.sum(roots)) / len(x) ** 0.5
    gap, trace = mean - reference.mu, float((centred**2).sum()) / len(x)
    return max(float(gap @ gap + trace + np.trace(reference.sigma) - 2 * root_trace), 0.0)


def _distance(
    mean: np.ndarray, cov: np.ndarray, mu: np.ndarray, trace: float, factor: np.ndarray
) -> float:
    values = scipy.linalg.eigvalsh(factor.T @ cov @ factor) if factor.size else np.zeros(0)
    root_trace = np.sqrt(values[significant(values)]).sum()
    gap = mean - mu
    return max(float(gap @ gap + np.trace(cov) + trace - 2 * root_trace), 0.0)
