"""The real images that evaluations compare with: their features by the judge's networks, and the
moments of a file that has them.

At most `MOST` images' features are kept; moments are of all images. A file's moments are used in
the feature space that they are of (`moments_of`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np

from cluster.errors import DataError
from cluster.fleet import Fleet
from cluster.io.paths import expand_user
from cluster.messages import MAIN_SPACE
from cluster.model_files.file_kinds import FileKind, file_kind
from cluster.model_files.tensors import locate
from cluster.roles import FEATURE_BATCH
from learner.config import RunConfig
from learner.data.datasets import open_images
from learner.data.named_sets import is_named
from rewards.config import JUDGE, JudgeConfig
from rewards.distribution.moments import MomentSums
from rewards.distribution.reference import Reference, read_reference, read_spatial
from rewards.images.sources import SAMPLES
from rewards.metrics.samples import LOGITS, SPATIAL, RealImages
from rewards.networks.features import FeaturesConfig
from rewards.networks.features_check import fits_fingerprint
from rewards.networks.inception import FEATURES, SPATIAL_DIM
from rewards.reference.fetch import reference_file
from rewards.statistics.files import open_arrays

logger = logging.getLogger(__name__)

MOST = 10_000
"""Real images whose features are kept: as many as ADM's files hold, 250 MB in the spaces of
Inception and DINOv2."""
FID_NETWORK = "inception"
Arrays = Mapping[str, np.ndarray]


def real_images(config: RunConfig, fleet: Fleet) -> RealImages:
    """Features and moments of `evaluation.images`, by the panel "judge" of a fleet; none if that is
    empty.

    Raises:
        CheckpointError, DataError: no such images, or none of their moments is of the judge's
            spaces.
        StopRequestedError: a stop was requested meanwhile.
    """
    source = config.evaluation.images
    if not source:
        return RealImages()
    moments = fleet.serve_while(lambda: moments_of(source, config.judge))
    main = moments.get(MAIN_SPACE)
    if main and main.fingerprint and main.fingerprint != (ours := fleet.fingerprint(JUDGE)):
        raise DataError(
            f"evaluation.images: {source} has moments of the features {main.fingerprint!r}, but "
            f"the judge's are {ours!r}: build it again with judge.features, or name the weights "
            "that it was made with"
        )
    if not has_images(source):
        return RealImages(moments=moments)
    images = open_images(source)
    if not is_named(source):
        logger.info(f"features of {len(images)} real images, of {source}")
    spaces = _Spaces(len(images), moments)
    for batch in images.batches(FEATURE_BATCH):
        spaces.add(fleet.features([batch], JUDGE))
    return fleet.serve_while(spaces.result)


def moments_of(source: str, judge: JudgeConfig) -> dict[str, Reference]:
    """Space of the judge -> the moments in a file that are of it; empty for other sources.

    Files of other tools do not say which network made them: taken are those of 2048 dimensions, as
    of the FID literature's Inception. Files of `python -m rewards.reference` do.

    Raises:
        CheckpointError: no such file.
        DataError: an invalid file; or one of moments alone, and none is of the judge's spaces.
    """
    if "mu" not in arrays_of(source):
        return {}
    path = reference_file(source)
    stored, spatial = read_reference(path), read_spatial(path)
    found: dict[str, Reference] = {}
    for space, features in judge.spaces().items():
        if not _is_of(features, stored):
            continue
        found[space] = stored
        if features.network == FID_NETWORK and spatial is not None:
            if spatial.dim != SPATIAL_DIM:
                raise DataError(
                    f"{path}: mu_s: expected {SPATIAL_DIM} dimensions, of the first channels of "
                    f"Inception's mixed_6/conv, found {spatial.dim}: is it of another evaluator?"
                )
            found[SPATIAL] = spatial
    if not found and not has_images(source):
        made_with = repr(stored.fingerprint) if stored.fingerprint else "believed to be Inception's"
        networks = " and ".join(features.network for features in judge.spaces().values())
        raise DataError(
            f"{source}: holds moments of {stored.dim} dimensions ({made_with}) and no images, and "
            f"the judge's networks are {networks}: name images, or set judge.features to the "
            "network of the moments"
        )
    return found


def arrays_of(source: str) -> Sequence[str]:
    """Names of the arrays of an .npz file; empty for other sources.

    Raises:
        CheckpointError, DataError: no such file, or a damaged one.
    """
    path = reference_file(source)
    if is_named(source) or expand_user(path).is_dir():
        return ()
    if file_kind(locate(path)) is not FileKind.NPZ:
        return ()
    with open_arrays(path) as file:
        return file.names


def has_images(source: str) -> bool:
    """Whether there are images, not moments alone."""
    names = arrays_of(source)
    return "mu" not in names or SAMPLES in names


def _is_of(features: FeaturesConfig, stored: Reference) -> bool:
    if stored.fingerprint:
        return fits_fingerprint(features, stored.fingerprint)
    return features.network == FID_NETWORK and stored.dim == FEATURES


def kept_images(count: int) -> np.ndarray:
    """Numbers of the images whose features are kept, of `count` images."""
    return np.unique(np.linspace(0, count - 1, min(count, MOST)).round().astype(int))


class _Spaces:
    """Features of some of the images, and moments of all where these are more.

    Args:
        count: of all images.
        moments: known ones, which need not be computed.
    """

    def __init__(self, count: int, moments: Mapping[str, Reference]) -> None:
        self._kept = kept_images(count)
        self._all = len(self._kept) == count
        self._known, self._at = dict(moments), 0
        self._parts: dict[str, list[np.ndarray]] = {}
        self._sums: dict[str, MomentSums] = {}

    def add(self, features: Arrays) -> None:
        """Features of the next images."""
        size = len(next(iter(features.values())))
        rows = self._kept[(self._kept >= self._at) & (self._kept < self._at + size)] - self._at
        self._at += size
        for space, values in features.items():
            if space == LOGITS or (space == SPATIAL and SPATIAL in self._known):
                continue
            if space != SPATIAL or self._all:
                self._parts.setdefault(space, []).append(values if self._all else values[rows])
            if not self._all and space not in self._known:
                start = MomentSums.about(values.mean(0, dtype=np.float64))
                self._sums[space] = self._sums.get(space, start).add(values)

    def result(self) -> RealImages:
        """After the last image."""
        features = {space: np.concatenate(parts) for space, parts in self._parts.items()}
        moments = {space: _reference(sums) for space, sums in self._sums.items()}
        return RealImages(features, self._known | moments)


def _reference(sums: MomentSums) -> Reference:
    """With sigma divided by N - 1, as FID tools do."""
    found = sums.moments()
    count = int(found.weight)
    return Reference(found.mean, found.cov * (count / (count - 1)), images=count)
