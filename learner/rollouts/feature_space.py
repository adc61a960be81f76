"""The feature spaces of the distribution rewards, and the reference moments in them."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from actors.text.features import features_of
from cluster.errors import CheckpointError, ConfigError, DataError
from cluster.fleet import Fleet
from cluster.messages import Condition, FeatureRow
from cluster.model_files.file_kinds import FileKind, file_kind
from cluster.model_files.tensors import locate
from cluster.program.invocation import command_of
from cluster.roles import FEATURE_BATCH
from learner.config import RunConfig
from learner.data.captions import peek_captions
from learner.data.datasets import image_captions, iterate_images, load_labels
from learner.data.named_sets import is_named
from rewards.config import Distribution, LooFidTerm
from rewards.distribution.diagnostics import few_images_warning
from rewards.distribution.joint import (
    CaptionProjection,
    class_table,
    equal_trace_weight,
    joint_features,
    pooled,
)
from rewards.distribution.moments import Moments
from rewards.distribution.reference import Reference, StoredReference, read_stored
from rewards.images.class_labels import contradiction
from rewards.images.sources import array_of_images
from rewards.reference.fetch import reference_file
from rewards.statistics.advice import build_command

logger = logging.getLogger(__name__)

STATISTICS = (".npz", ".pt", ".pth", ".pkl")
"""Suffixes of files of moments, to classify a path that does not exist."""


@dataclass(frozen=True)
class RewardSpace:
    """Features, or features joined with the embedding of the condition (conditional LOO-FID)."""

    table: np.ndarray | None = None
    """(C, E) embedding of each class."""
    projection: CaptionProjection | None = None
    """Embedding of captions."""
    weight: float = 0.0
    """Factor of the embeddings; without a table or projection there are none."""
    _known: dict[FeatureRow, np.ndarray] = field(default_factory=dict, repr=False, compare=False)
    """Embeddings of captions in a file, each of which is read once."""

    @property
    def added(self) -> int:
        """E; 0 without embeddings."""
        if self.projection is not None:
            return self.projection.dim
        return 0 if self.table is None else self.table.shape[1]

    def __call__(self, features: np.ndarray, conditions: Sequence[Condition]) -> np.ndarray:
        """Features (N, D) of images and their N conditions -> (N, D) or (N, D + E).

        Raises:
            DataError: a condition has no class, or a caption no features of this encoder.
        """
        if not self.added:
            return features
        distinct = {id(condition): condition for condition in conditions}
        rows = {key: self._embedded(condition) for key, condition in distinct.items()}
        embeddings = np.stack([rows[id(condition)] for condition in conditions])
        return joint_features(features, embeddings, self.weight)

    def _embedded(self, condition: Condition) -> np.ndarray:
        """(E,)"""
        if self.projection is None:
            assert self.table is not None
            if condition.class_index is None:
                raise DataError(
                    "joint LOO-FID joins features with classes, but the condition "
                    f"{condition.text!r} is a caption without a class"
                )
            return self.table[condition.class_index]
        place = condition.features
        if isinstance(place, FeatureRow) and place in self._known:
            return self._known[place]
        features = features_of(condition)
        if features is None:
            raise DataError(
                f"joint LOO-FID embeds captions by their features, but {condition.text!r} "
                f"has none: encode the captions with {command_of('actors.captions')}"
            )
        embedding = self.projection(pooled(features)[None])[0]
        if isinstance(place, FeatureRow):
            self._known[place] = embedding
        return embedding


Spaces = Mapping[str, RewardSpace]
"""By the names of `RewardsConfig.spaces`."""


def set_reference(config: RunConfig, fleet: Fleet) -> dict[str, RewardSpace]:
    """Give the moments server the moments of real images in every feature space; returns the
    spaces.

    Raises:
        DataError: unreadable reference, or of another feature network or dimension.
        ConfigError: joint moments are configured, but not in the file.
    """
    spaces, references = dict[str, RewardSpace](), dict[str, Reference]()
    distributions = config.rewards.spaces()
    fingerprints = {space: fleet.fingerprint("rewards", space) for space in distributions}
    features: dict[str, dict[str, np.ndarray]] = {}  # of a source's images, in all spaces
    for space, each in distributions.items():
        source, made_by = each.term.reference, fingerprints[space]
        if stored_reference(source):
            joined, reference = fleet.serve_while(partial(read_moments, config, each))
            if dim := fleet.feature_dim("rewards", space):
                reference.check_dim(dim + joined.added, made_by)
        else:
            if source not in features:
                images = iterate_images(source, FEATURE_BATCH)
                features[source] = fleet.features(images, "rewards")
            own = features[source][space]
            joined, reference = fleet.serve_while(partial(_built, config, each, own, made_by))
        if few := few_images_warning(reference, each.term.covariance):
            logger.warning(f"note: {each.option}.reference: {few}")
        spaces[space], references[space] = joined, reference
    fleet.moments.set_references(references, fingerprints)
    return spaces


def _built(
    config: RunConfig, each: Distribution, features: np.ndarray, fingerprint: str
) -> tuple[RewardSpace, Reference]:
    """Space and reference of real images, from their features (N, D)."""
    space, conditions, source = RewardSpace(), list[Condition](), each.term.reference
    if each.term.joint:
        conditions = reference_conditions(config, each, len(features))
        space = _joint_space(config, each.term, features, conditions)
    return space, Reference.from_features(space(features, conditions), fingerprint, source)


def reference_conditions(config: RunConfig, each: Distribution, images: int) -> list[Condition]:
    """Conditions of the real images of a joint reference, in their order: classes, or captions.

    Raises:
        DataError: not one an image, or not the run's.
    """
    if config.conditions.captions:
        return _reference_captions(config, each, images)
    labels = reference_labels(config, each, images)
    return [Condition(text="", class_index=label) for label in labels.tolist()]


def _reference_captions(config: RunConfig, each: Distribution, images: int) -> list[Condition]:
    source = each.term.reference
    if not is_named(source):
        command = build_command("IMAGES", each.features.options())
        raise DataError(
            f"{source}: an array of images has no captions, which a joint reference needs: build "
            f"it from images with captions, {command} --joint captions --captions FEATURES.parquet"
        )
    texts = image_captions(source)
    known = {condition.text: condition for condition in config.conditions.conditions()}
    missing = [text for text in texts if text not in known]
    if missing or len(texts) != images:
        raise DataError(
            f"{source}: {len(missing)} of the captions of its {images} images are not among "
            f"conditions.captions, whose features a joint reference takes; the first: "
            f"{missing[0] if missing else ''!r}: name a file that has them, or set "
            f"{each.option}.joint to false"
        )
    return [known[text] for text in texts]


def reference_labels(config: RunConfig, each: Distribution, images: int) -> np.ndarray:
    """Classes (N,) int64 of the real images of a joint reference.

    Raises:
        DataError: not one an image, or not the run's classes.
    """
    source = each.term.reference
    if not is_named(source):
        command = build_command("IMAGES", each.features.options())
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


def seed_moments(each: Distribution, dim: int, fingerprint: str) -> Moments:
    """The moments in a reward's `seed_from`.

    Args:
        dim, fingerprint: of the run's features; 0 and empty if not known.

    Raises:
        CheckpointError, DataError: no such file, or not moments of this space.
    """
    stored = read_stored(each.term.seed_from, fingerprint, covariance=each.term.covariance)
    if dim:
        stored.reference.check_dim(dim, fingerprint or repr(each.features.network))
    return stored.moments()


def read_moments(config: RunConfig, each: Distribution) -> tuple[RewardSpace, Reference]:
    """The moments in a reward's `reference`, and their space.

    Raises:
        CheckpointError, DataError: no such file, or not one of moments.
        ConfigError: its joint moments are of other classes than the conditions.
    """
    term = each.term
    path = reference_file(term.reference)
    stored = read_stored(path, joint=term.joint, covariance=term.covariance)
    if not term.joint:
        return RewardSpace(), stored.reference
    check, kind = (
        (_check_captions, "captions --captions FEATURES.parquet")
        if config.conditions.captions
        else (_check_classes, "classes")
    )
    again = f"build it again with `{command_of('rewards.reference')} --joint {kind}"
    check(config, term.reference, stored, again)
    projection = stored.projection if config.conditions.captions else None
    table = None if projection else stored.class_table
    space = RewardSpace(table, projection, stored.weight)
    for name, ours, theirs in (
        ("joint_dim", term.joint_dim, space.added),
        ("joint_weight", term.joint_weight, stored.weight),
    ):
        if ours and ours != theirs:
            raise ConfigError(
                f"{term.reference} was built with {name} {theirs:g}, but {each.option}.{name} is "
                f"{ours:g}: leave it 0, which takes the file's, or build it again with "
                f"--{name.replace('_', '-')} {ours:g}"
            )
    return space, stored.reference


def _check_classes(config: RunConfig, source: str, stored: StoredReference, again: str) -> None:
    """Raises ConfigError for joint moments of other classes than the conditions."""
    classes = len(config.conditions.class_names)
    if stored.class_table is None or len(stored.class_table) != classes:
        found = 0 if stored.class_table is None else len(stored.class_table)
        raise ConfigError(
            f"{source} has joint moments of {found} classes, but the conditions are {classes}: "
            f"{again}`"
        )
    difference = contradiction(stored.class_names, config.conditions.class_names)
    if difference:
        raise ConfigError(
            f"{source} has its classes in another order than conditions.names: {difference}: "
            f"{again} --class-names`"
        )


def _check_captions(config: RunConfig, source: str, stored: StoredReference, again: str) -> None:
    """Raises ConfigError for joint moments without captions, or of another text encoder."""
    projection = stored.projection
    if projection is None:
        raise ConfigError(
            f"{source} has no joint moments of captions, but the conditions are captions: {again}`"
        )
    found = peek_captions(config.conditions.captions, config.conditions.column)
    if found.width and found.width != len(projection.mean):
        raise ConfigError(
            f"{source} embeds captions by features of width {len(projection.mean)}, but those of "
            f"{config.conditions.captions} have {found.width}: encode both with one text encoder"
        )
    if found.encoder and projection.encoder and found.encoder != projection.encoder:
        raise ConfigError(
            f"{source} embeds captions by features of the text encoder {projection.encoder}, but "
            f"{config.conditions.captions} was encoded by {found.encoder}: encode both with one"
        )


def _joint_space(
    config: RunConfig, term: LooFidTerm, features: np.ndarray, conditions: Sequence[Condition]
) -> RewardSpace:
    """The space of real images with conditions, with the configured or automatic weight."""
    if config.conditions.captions:
        found = [features_of(condition) for condition in conditions]
        rows = Moments.from_features(np.stack([pooled(each) for each in found if each is not None]))
        space = RewardSpace(projection=CaptionProjection.of(rows.mean, rows.cov, term.joint_dim))
    else:
        space = RewardSpace(class_table(len(config.conditions.class_names), term.joint_dim))
    embeddings = replace(space, weight=1.0)(np.empty((len(features), 0)), conditions)
    weight = term.joint_weight or equal_trace_weight(
        Moments.from_features(features).cov, Moments.from_features(embeddings).cov
    )
    return replace(space, weight=weight)
