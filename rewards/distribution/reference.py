"""Reference moments of real images' features, and their files.

Reads files of FID tools (pytorch-fid, clean-fid, torch-fidelity, the ADM evaluator: arrays `mu` and
`sigma`) and writes such files with the number of images, the feature network and classes.

Shapes: N images, D feature dimensions, E embedding dimensions, C classes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg

from cluster.errors import DataError
from cluster.io.files import replacing
from cluster.io.paths import expand_user
from rewards.base import FeatureExtractor
from rewards.distribution.fid import covariance_factor, distance_with_factor
from rewards.distribution.joint import CaptionProjection
from rewards.distribution.moments import Covariance, Moments, check_features
from rewards.statistics.advice import build_command
from rewards.statistics.files import ArrayFile, open_arrays, read_statistics

UNKNOWN = -1
SPATIAL_SUFFIX = "_s"  # of the arrays of ADM's files for sFID


@dataclass(frozen=True)
class Reference:
    """Mean and covariance of real images' features, float64."""

    mu: np.ndarray
    """(D,)"""
    sigma: np.ndarray
    """(D, D). FID tools divide by N - 1; Tessera's own moments divide by N."""
    fingerprint: str = ""
    """Extractor of the features; empty if unknown."""
    source: str = ""
    """File, or name of the images; for messages."""
    images: int = -1
    """Number of images; -1 if unknown."""
    diagonal: bool = False
    """Only variances are known; sigma is a diagonal matrix."""

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
        """
        Raises:
            DataError: features of another dimension than the reference's.
        """
        if dim != self.dim:
            raise DataError(
                f"{self.source or 'the reference'}: expected moments of {dim} dimensions, as the "
                f"features of {extractor or self.fingerprint or 'the run'} have, found {self.dim}: "
                "build it with the network of the run (`python -m rewards.reference`), or set "
                "the reward's features to the reference's"
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
                "the reward's covariance to diagonal, or take statistics with sigma"
            )
        return covariance_factor(self.sigma)

    @cached_property
    def triangle(self) -> np.ndarray:
        """Lower triangular L (D, R) with L L' = sigma, without the same noise as `factor`."""
        return scipy.linalg.qr(self.factor.T, mode="r")[0].T

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
        """Reference from a file with `mu` and `sigma` (`read_reference`)."""
        return read_reference(path)


def distance_to_reference(mean: np.ndarray, cov: np.ndarray, reference: Reference) -> float:
    """`frechet_distance` to a reference, with its cached factor."""
    trace = float(np.trace(reference.sigma))
    return distance_with_factor(mean, cov, reference.mu, trace, reference.factor)


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


@dataclass(frozen=True)
class StoredReference:
    """Contents of a reference file."""

    reference: Reference
    """Of the features, or of features joined with conditions (`read_stored(joint=True)`)."""
    images: int = UNKNOWN
    """Number of real images; -1 if unknown."""
    ddof: int = 1
    """sigma is divided by images - ddof; default: numpy.cov's 1, as in FID tools. Used as written:
    at 10,000 images the difference is 1e-4 of sigma."""
    class_counts: np.ndarray | None = None
    """(C,) int64, images of each class."""
    class_names: tuple[str, ...] = ()
    """Names of folders or labels in the order of the classes; () if unknown."""
    class_table: np.ndarray | None = None
    """(C, E) embeddings of the joint moments (`joint.class_table`)."""
    weight: float = 0.0
    """Factor of the embeddings in the joint moments; 0 without these."""
    projection: CaptionProjection | None = None
    """Embedding of captions in the joint moments."""

    def moments(self) -> Moments:
        """Population moments of these images, each of weight 1.

        Raises:
            DataError: the number of images is unknown.
        """
        path, count = self.reference.source, self.images
        if count < 2:
            raise DataError(
                f"{path}: count: expected the number of images, which is the weight of their "
                f"moments, found {'none' if count == UNKNOWN else count}: write it beside them: "
                "numpy.savez('statistics.npz', mu=mu, sigma=sigma, count=N)"
            )
        cov = self.reference.sigma * ((count - self.ddof) / count)
        weight = float(count)
        return Moments(mean=self.reference.mu, cov=cov, weight=weight, square_weight=weight)


def read_reference(path: str | os.PathLike[str], fingerprint: str = "") -> Reference:
    """Mean and covariance of real images' features, from a file with `mu` and `sigma`.

    Args:
        fingerprint: of the feature network in use; compared with the file's, if it has one.

    Raises:
        CheckpointError: no such file.
        DataError: an invalid file, or another network's.
    """
    return read_stored(path, fingerprint).reference


def read_stored(
    path: str | os.PathLike[str],
    fingerprint: str = "",
    *,
    joint: bool = False,
    covariance: Covariance = "full",
) -> StoredReference:
    """As `read_reference`, with all contents of the file.

    Args:
        joint: moments of features joined with conditions, (D + E), instead of the features'.
        covariance: "diagonal" accepts a file with variances only.

    Raises:
        CheckpointError: no such file.
        DataError: an invalid file, another network's, or no joint moments with `joint`.
    """
    with open_arrays(path) as file:
        if joint and "joint_mu" not in file and "mu" in file:
            raise DataError(
                f"{path}: has no joint moments of features and conditions: build it with "
                f"{build_command('IMAGES')} --labels --joint classes, or, for captions, --joint "
                "captions --captions FEATURES.parquet"
            )
        prefix = "joint_" if joint else ""
        found = read_statistics(file, prefix, diagonal=covariance == "diagonal")
        made_with = file.text("fingerprint")
        # "count": of the public code of 2603.23086, whose pickled `meta` is not read
        images = file.count("images" if "images" in file else "count", UNKNOWN)
        ddof, weight = file.count("ddof", 1), file.number("joint_weight", 0.0)
        counts, names = file.numbers("class_counts", "iu", 1), file.texts("class_names")
        table = file.numbers("joint_table", "f", 2)
        projection = _projection(file)
    if fingerprint and made_with and fingerprint != made_with:
        raise DataError(
            f"{path}: fingerprint: expected features {fingerprint!r}, the file was made with "
            f"{made_with!r}: build it again with the options --features.* of that network, "
            f"{build_command('IMAGES')}"
        )
    return StoredReference(
        reference=Reference(
            found.mu, found.sigma, made_with, str(path), images, diagonal=found.diagonal
        ),
        images=images,
        ddof=ddof,
        class_counts=counts,
        class_names=names,
        class_table=table,
        weight=weight,
        projection=projection,
    )


def _projection(file: ArrayFile) -> CaptionProjection | None:
    """The embedding of captions in a file; None where it has none."""
    mean, directions = file.numbers("joint_mean", "f", 1), file.numbers("joint_directions", "f", 2)
    if mean is None or directions is None:
        return None
    return CaptionProjection(mean, directions, file.text("joint_encoder"))


def read_spatial(path: str | os.PathLike[str]) -> Reference | None:
    """The moments `mu_s`, `sigma_s` of spatial features, for sFID; None where a file has none.

    Raises:
        CheckpointError: no such file.
        DataError: an invalid file.
    """
    with open_arrays(path) as file:
        if f"mu{SPATIAL_SUFFIX}" not in file:
            return None
        found = read_statistics(file, suffix=SPATIAL_SUFFIX)
    return Reference(found.mu, found.sigma, source=str(path))


def write_reference(
    path: str | os.PathLike[str],
    reference: Reference,
    *,
    images: int = UNKNOWN,
    ddof: int = 0,
    extra: dict[str, np.ndarray] | None = None,
) -> None:
    """Write a file for `read_reference` and FID tools, atomically.

    Args:
        ddof: recorded, not applied: the reference's sigma was divided by images - ddof.
        extra: further arrays by key, without objects.
    """
    arrays: dict[str, Any] = {
        "mu": reference.mu,
        "sigma": reference.sigma,
        "fingerprint": np.array(reference.fingerprint),
        "images": np.array(images),
        "ddof": np.array(ddof),
    }
    write_arrays(expand_user(path), arrays | (extra or {}))


def write_arrays(path: Path, arrays: dict[str, Any]) -> None:
    """Write an .npz file atomically."""
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)
        file.flush()
        os.fsync(file.fileno())
