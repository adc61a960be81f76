"""The feature space of the distribution reward, and the reference moments in it."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cluster.errors import CheckpointError, ConfigError, DataError
from cluster.fleet import Fleet
from cluster.messages import MAIN_SPACE
from cluster.model_files.file_kinds import FileKind, file_kind
from cluster.model_files.tensors import locate
from cluster.program.invocation import command_of
from cluster.roles import FEATURE_BATCH
from learner.config import RunConfig
from learner.data.datasets import iterate_images, load_labels
from learner.data.named_sets import is_named
from rewards.distribution.diagnostics import few_images_warning
from rewards.distribution.joint import class_table, equal_trace_weight, joint_features
from rewards.distribution.moments import Moments
from rewards.distribution.reference import Reference, read_stored
from rewards.images.class_labels import contradiction
from rewards.images.sources import array_of_images
from rewards.reference.fetch import reference_file
from rewards.statistics.advice import build_command

logger = logging.getLogger(__name__)

STATISTICS = (".npz", ".pt", ".pth", ".pkl")
"""Suffixes of files of moments, to classify a path that does not exist."""


@dataclass(frozen=True)
class RewardSpace:
    """Features, or features joined with the embedding of the class (conditional LOO-FID)."""

    table: np.ndarray | None = None
    """(C, E) embedding of each class; None: features only."""
    weight: float = 0.0
    """Factor of the embeddings."""

    @property
    def added(self) -> int:
        """E; 0 without embeddings."""
        return 0 if self.table is None else self.table.shape[1]

    def __call__(self, features: np.ndarray, classes: np.ndarray) -> np.ndarray:
        """Features (N, D) and classes (N,; -1 for captions) -> (N, D) or (N, D + E).

        Raises:
            DataError: joint features for a caption.
        """
        if self.table is None:
            return features
        if (classes < 0).any():
            raise DataError(
                "rewards.loo_fid.joint joins features with classes, but a condition is a caption "
                "without a class: set joint to false"
            )
        return joint_features(features, self.table[classes], self.weight)


def set_reference(config: RunConfig, fleet: Fleet) -> RewardSpace:
    """Give the moments server the moments of real images; returns their space.

    Raises:
        DataError: unreadable reference, or of another feature network or dimension.
        ConfigError: joint moments are configured, but not in the file.
    """
    term, fingerprint = config.rewards.loo_fid, fleet.fingerprint("rewards")
    if stored_reference(term.reference):
        space, reference = fleet.serve_while(lambda: read_moments(config))
        if dim := fleet.feature_dim("rewards"):
            reference.check_dim(dim + space.added, fingerprint)
    else:
        images = iterate_images(term.reference, FEATURE_BATCH)
        features = fleet.features(images, "rewards")[MAIN_SPACE]
        space, reference = fleet.serve_while(lambda: _built(config, features, fingerprint))
    if few := few_images_warning(reference, term.covariance):
        logger.warning(f"note: {few}")
    fleet.moments.set_reference(reference, fingerprint)
    return space


def _built(
    config: RunConfig, features: np.ndarray, fingerprint: str
) -> tuple[RewardSpace, Reference]:
    """Space and reference of real images, from their features (N, D)."""
    term, space, classes = config.rewards.loo_fid, RewardSpace(), np.zeros(len(features), int)
    if term.joint:
        classes = reference_labels(config, len(features))
        space = _joint_space(config, features, classes)
    return space, Reference.from_features(space(features, classes), fingerprint, term.reference)


def reference_labels(config: RunConfig, images: int) -> np.ndarray:
    """Classes (N,) int64 of the real images of a joint reference.

    Raises:
        DataError: not one an image, or not the run's classes.
    """
    source = config.rewards.loo_fid.reference
    if not is_named(source):
        command = build_command("IMAGES", config.rewards.features.options())
        raise DataError(
            f"{source}: an array of images has no classes, which a joint reference needs: build it "
            f"from a source that has, {command} --joint classes"
        )
    labels, known = load_labels(source), len(config.conditions.class_names)
    if len(labels) != images:
        raise DataError(f"{source}: {images} images, but {len(labels)} classes")
    if labels.min() < 0 or labels.max() >= known:
        raise DataError(
            f"{source}: expected classes 0 to {known - 1}, as conditions.names has them, found "
            f"{labels.min()} to {labels.max()}: is it labelled for another policy?"
        )
    return labels


def stored_reference(reference: str) -> bool:
    """Whether the configured reference is a file of moments; else images by name, or an .npy file
    of images. Other files count as moments; reading them fails."""
    path = reference_file(reference)
    if is_named(path):
        return False
    with suppress(CheckpointError, ConfigError, OSError):
        place = locate(path)
        return file_kind(place) is not FileKind.NPY or not array_of_images(place)
    return Path(path).suffix.lower() in STATISTICS or os.path.isdir(path)


def seed_moments(config: RunConfig, dim: int, fingerprint: str) -> Moments:
    """The moments in `rewards.loo_fid.seed_from`.

    Args:
        dim, fingerprint: of the run's features; 0 and empty if not known.

    Raises:
        CheckpointError, DataError: no such file, or not moments of this space.
    """
    term = config.rewards.loo_fid
    stored = read_stored(term.seed_from, fingerprint, covariance=term.covariance)
    if dim:
        stored.reference.check_dim(dim, fingerprint or repr(config.rewards.features.network))
    return stored.moments()


def read_moments(config: RunConfig) -> tuple[RewardSpace, Reference]:
    """The moments in `rewards.loo_fid.reference`, and their space.

    Raises:
        CheckpointError, DataError: no such file, or not one of moments.
        ConfigError: its joint moments are of other classes than the conditions.
    """
    term = config.rewards.loo_fid
    path = reference_file(term.reference)
    stored = read_stored(path, joint=term.joint, covariance=term.covariance)
    if not term.joint:
        return RewardSpace(), stored.reference
    classes = len(config.conditions.class_names)
    if stored.class_table is None or len(stored.class_table) != classes:
        found = 0 if stored.class_table is None else len(stored.class_table)
        raise ConfigError(
            f"{term.reference} has joint moments of {found} classes, but the conditions are "
            f"{classes}: build it again with `{command_of('rewards.reference')} --joint classes`"
        )
    difference = contradiction(stored.class_names, config.conditions.class_names)
    if difference:
        raise ConfigError(
            f"{term.reference} has its classes in another order than conditions.names: "
            f"{difference}: build it again with "
            f"`{command_of('rewards.reference')} --joint classes --class-names`"
        )
    for name, ours, theirs in (
        ("joint_dim", term.joint_dim, stored.class_table.shape[1]),
        ("joint_weight", term.joint_weight, stored.weight),
    ):
        if ours and ours != theirs:
            raise ConfigError(
                f"{term.reference} was built with {name} {theirs:g}, but rewards.loo_fid.{name} is "
                f"{ours:g}: leave it 0, which takes the file's, or build it again with "
                f"--{name.replace('_', '-')} {ours:g}"
            )
    return RewardSpace(stored.class_table, stored.weight), stored.reference


def _joint_space(config: RunConfig, features: np.ndarray, classes: np.ndarray) -> RewardSpace:
    term = config.rewards.loo_fid
    table = class_table(len(config.conditions.class_names), term.joint_dim)
    weight = term.joint_weight or equal_trace_weight(
        Moments.from_features(features).cov, Moments.from_features(table[classes]).cov
    )
    return RewardSpace(table, weight)
