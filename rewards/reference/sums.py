"""Sums of a reference, which can be saved and resumed, and the conditions joined with features.

Shapes: N images, M of them readable, D feature dimensions, E embedding dimensions, C classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cluster.errors import DataError
from cluster.io.checksum import DAMAGED_ARRAYS
from rewards.distribution.joint import CaptionProjection, equal_trace_weight
from rewards.distribution.moments import MomentSums
from rewards.distribution.reference import Reference, write_arrays, write_reference

NAMED = 5  # skipped images in the summary
BLOCK = 1024  # feature vectors added at once: a (D, D) sum costs the same for one as for hundreds


@dataclass(frozen=True)
class Part:
    """Features of a batch of images."""

    start: int
    stop: int
    kept: np.ndarray
    """(M,) numbers of the readable images."""
    features: np.ndarray
    """(M, D) float32; (0, 0) if none is readable."""
    unreadable: list[tuple[str, str]]
    """Name and error."""
    notes: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Note about images -> their number, and the first one's name."""
    size: tuple[str, int, int] | None = None
    """An image's name, height and width, if all must have one size."""


@dataclass(frozen=True)
class Conditions:
    """Conditions that features are joined with, image by image."""

    classes: np.ndarray | None
    """(N,) int64"""
    num_classes: int
    table: np.ndarray | None
    """(C, E) embeddings of classes, or None."""
    rows: np.ndarray | None
    """(N, E) embeddings from a file, or None."""
    class_names: tuple[str, ...] = ()
    """In the order of the classes; () without names."""
    projection: CaptionProjection | None = None
    """What made `rows` of captions' features."""

    def join(self, kept: np.ndarray, features: np.ndarray) -> np.ndarray:
        """[features, embeddings] of images `kept`, or the features alone; float64."""
        values = features.astype(np.float64)
        if self.table is not None and self.classes is not None:
            return np.concatenate([values, self.table[self.classes[kept]]], axis=1)
        if self.rows is not None:
            return np.concatenate([values, np.asarray(self.rows[kept], np.float64)], axis=1)
        return values

    @property
    def dim(self) -> int:
        """E; 0 without joined features."""
        joined = self.table if self.table is not None else self.rows
        return 0 if joined is None else joined.shape[1]

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for array in (self.classes, self.table):
            digest.update(b"-" if array is None else np.ascontiguousarray(array).tobytes())
        if self.rows is not None:  # maybe gigabytes: only both ends
            digest.update(repr(self.rows.shape).encode())
            digest.update(self.rows[:64].tobytes() + self.rows[-64:].tobytes())
        return f"{self.num_classes}-{digest.hexdigest()[:16]}"


@dataclass(frozen=True)
class _State:
    """Replaced as a whole, so that it is consistent at any interrupt."""

    counts: np.ndarray
    """(C,) int64, images of each class."""
    sums: MomentSums | None = None
    pending: np.ndarray | None = None
    """(M, D + E) float64, fewer than BLOCK vectors that are not in the sums yet."""
    cursor: int = 0
    skipped: int = 0
    skipped_first: tuple[str, ...] = ()
    notes: tuple[tuple[str, int, str], ...] = ()
    """Note, number of images, the first one's name."""
    size: tuple[str, int, int] | None = None


class ReferenceSums:
    """Sums of features up to an image.

    Args:
        key: digest of everything that the sums depend on; only saved sums of the same key resume.
    """

    def __init__(self, key: str, conditions: Conditions) -> None:
        self._key, self._conditions = key, conditions
        self._state = _State(np.zeros(conditions.num_classes, np.int64))

    @property
    def cursor(self) -> int:
        """Number of the next image."""
        return self._state.cursor

    @property
    def skipped(self) -> int:
        return self._state.skipped

    @property
    def skipped_first(self) -> tuple[str, ...]:
        """Names of the first skipped images."""
        return self._state.skipped_first

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes about images, in lines."""
        return tuple(f"{n} images, the first {at}: {what}" for what, n, at in self._state.notes)

    @property
    def images(self) -> int:
        sums, pending = self._state.sums, self._state.pending
        return int(sums.weight if sums else 0) + (0 if pending is None else len(pending))

    @property
    def dim(self) -> int:
        """D; 0 before the first image."""
        sums, pending = self._state.sums, self._state.pending
        if pending is not None:
            return pending.shape[1] - self._conditions.dim
        return len(sums.shift) - self._conditions.dim if sums else 0

    def add(self, part: Part) -> None:
        """Add the next batch.

        Raises:
            DataError: images of different sizes, if they must have one size.
        """
        known = self._state.size
        if known and part.size and known[1:] != part.size[1:]:
            raise DataError(mixed_sizes(known, part.size))
        counts, classes, sums = self._state.counts, self._conditions.classes, self._state.sums
        pending = self._state.pending
        if len(part.kept):
            joined = self._conditions.join(part.kept, part.features)
            pending = joined if pending is None else np.concatenate([pending, joined])
            if len(pending) >= BLOCK:
                sums, pending = _flush(sums, pending), None
            if classes is not None:
                counts = counts + np.bincount(classes[part.kept], minlength=len(counts))
        names = tuple(name for name, _ in part.unreadable)
        self._state = _State(
            counts=counts,
            sums=sums,
            pending=pending,
            cursor=part.stop,
            skipped=self._state.skipped + len(names),
            skipped_first=(self._state.skipped_first + names)[:NAMED],
            notes=_added(self._state.notes, part.notes),
            size=known or part.size,
        )

    def save(self, path: Path) -> None:
        """Save the sums, if there are any."""
        state = self._state
        if not self.images:
            return
        arrays: dict[str, Any] = {
            "key": np.array(self._key),
            "cursor": np.array(state.cursor),
            "skipped": np.array(state.skipped),
            "skipped_first": np.array(state.skipped_first, dtype=np.str_),
            "counts": state.counts,
            "notes": np.array([(what, str(n), at) for what, n, at in state.notes], dtype=np.str_),
            "size": np.array(state.size or (), dtype=np.str_),
        }
        if state.sums is not None:
            arrays["shift"], arrays["weight"] = state.sums.shift, np.array(state.sums.weight)
            arrays["total"], arrays["outer"] = state.sums.total, state.sums.outer
        if state.pending is not None:
            arrays["pending"] = state.pending
        write_arrays(path, arrays)

    def load(self, path: Path, *, allow_skipped: bool) -> str:
        """Resume from saved sums; returns why not if they exist and do not fit."""
        if not path.is_file():
            return ""
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            if str(arrays["key"]) != self._key:
                return "it is of other images, labels, features or options"
            if int(arrays["skipped"]) and not allow_skipped:
                return "unreadable images were left out, which needs --skip-unreadable"
            self._state = _State(
                counts=arrays["counts"],
                sums=_sums_of(arrays),
                pending=arrays.get("pending"),
                cursor=int(arrays["cursor"]),
                skipped=int(arrays["skipped"]),
                skipped_first=tuple(str(name) for name in arrays["skipped_first"]),
                notes=tuple((str(w), int(n), str(at)) for w, n, at in arrays.get("notes", ())),
                size=_size_of(arrays.get("size", ())),
            )
        except DAMAGED_ARRAYS as error:
            return f"it is damaged ({error})"
        return ""

    def write(self, path: Path, fingerprint: str, list_fingerprint: str, weight: float) -> None:
        """Write the reference; sigma is divided by N - 1, as FID tools do.

        Args:
            weight: of the embeddings; 0 for equal traces.

        Raises:
            DataError: fewer than two images, or no variance.
        """
        sums, pending = self._state.sums, self._state.pending
        if pending is not None:
            sums = _flush(sums, pending)
        if sums is None or self.images < 2:
            raise DataError(f"a covariance needs at least 2 images, found {self.images}")
        moments, conditions = sums.moments(), self._conditions
        mean, sigma = moments.mean, moments.cov * (self.images / (self.images - 1))
        extra = {"source": np.array(list_fingerprint), "skipped": np.array(self.skipped)}
        if conditions.classes is not None:
            extra["class_counts"] = self._state.counts
        if conditions.class_names:
            extra["class_names"] = np.array(conditions.class_names, dtype=np.str_)
        dim = self.dim
        if conditions.dim:
            weight = weight or equal_trace_weight(sigma[:dim, :dim], sigma[dim:, dim:])
            scale = np.concatenate([np.ones(dim), np.full(conditions.dim, weight)])
            extra["joint_mu"] = mean * scale
            extra["joint_sigma"] = sigma * np.outer(scale, scale)
            extra["joint_weight"] = np.array(weight)
            if conditions.table is not None:
                extra["joint_table"] = conditions.table
            if conditions.projection is not None:
                extra["joint_mean"] = conditions.projection.mean
                extra["joint_directions"] = conditions.projection.directions
                extra["joint_encoder"] = np.array(conditions.projection.encoder)
        reference = Reference(mean[:dim], sigma[:dim, :dim], fingerprint)
        write_reference(path, reference, images=self.images, ddof=1, extra=extra)


def mixed_sizes(one: tuple[str, int, int], other: tuple[str, int, int]) -> str:
    """Message for two images (name, height, width) of different sizes."""
    return (
        f"{other[0]} is {other[1]} x {other[2]}, but {one[0]} is {one[1]} x {one[2]}: pixel "
        "features compare images of one size: resize them, or choose a network"
    )


def _added(
    notes: tuple[tuple[str, int, str], ...], more: Mapping[str, tuple[int, str]]
) -> tuple[tuple[str, int, str], ...]:
    found = {what: (count, first) for what, count, first in notes}
    for what, (count, first) in more.items():
        before, name = found.get(what, (0, first))
        found[what] = before + count, name
    return tuple((what, count, first) for what, (count, first) in found.items())


def _size_of(stored: Any) -> tuple[str, int, int] | None:
    return (str(stored[0]), int(stored[1]), int(stored[2])) if len(stored) else None


def _flush(sums: MomentSums | None, rows: np.ndarray) -> MomentSums:
    """Add vectors, about the first ones' mean, which is near enough to the mean of all."""
    return (sums or MomentSums.about(rows.mean(0))).add(rows)


def _sums_of(arrays: dict[str, np.ndarray]) -> MomentSums | None:
    if "shift" not in arrays:
        return None
    return MomentSums(
        shift=arrays["shift"],
        weight=float(arrays["weight"]),
        total=arrays["total"],
        outer=arrays["outer"],
    )
