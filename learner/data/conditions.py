"""Conditions of a run, and the order in which iterations draw them."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from actors.text.captions import caption_conditions
from cluster.errors import CheckpointError, DataError
from cluster.io.paths import expand_user
from cluster.messages import Condition
from cluster.text_limits import LongCaptions
from learner.data.captions import caption_file, encode_captions

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
IMAGENET = "imagenet"


@dataclass(frozen=True, kw_only=True)
class ConditionsConfig:
    """The policy's classes and their names, or a file of captions."""

    names: tuple[str, ...] | Literal["imagenet"] = DIGITS
    """Names of the classes, in the order of the policy's class table; imagenet: open_clip's
    thousand."""
    template: str = "a photo of the digit {}"
    """Text of a class, with {} for the class's name."""
    classes: tuple[int, ...] = ()
    """Indices of the classes to draw from; empty: all."""
    captions: str = ""
    """Captions instead of classes: a text file with one a line, a table (.tsv, .csv, .json,
    .jsonl), or a Parquet file, with features for caption-conditional policies (from `python -m
    actors.captions`, or a column features of lists)."""
    column: str = ""
    """Column with the captions; empty: the one called caption, prompt, text or the like."""
    long_captions: LongCaptions = "error"
    """What to do with captions longer than `encoder` reads: error refuses them, truncate cuts
    them."""
    encoder: str = ""
    """T5 model (folder or name) to encode captions without features, once, when the run starts."""

    def __post_init__(self) -> None:
        if not self.names:
            raise ValueError("names must hold at least one class")
        if "{}" not in self.template:
            raise ValueError(f"template must contain {{}} for the name, found {self.template!r}")
        if self.captions and self.classes:
            raise ValueError("captions have no classes: leave classes empty, or captions")
        if len(set(self.classes)) < len(self.classes) or min(self.classes, default=0) < 0:
            raise ValueError(f"classes must be distinct and >= 0, found {self.classes}")
        if not self.all_of_imagenet and max(self.classes, default=0) >= len(self.names):
            raise ValueError(
                f"classes reach to {max(self.classes)}, but names has {len(self.names)}: "
                f"0 to {len(self.names) - 1}"
            )

    @property
    def all_of_imagenet(self) -> bool:
        """Whether `names` is "imagenet", all thousand names."""
        return self.names in (IMAGENET, (IMAGENET,))

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name for each class of the policy."""
        return imagenet_names() if self.all_of_imagenet else tuple(self.names)

    def encoded(self, target: Path) -> ConditionsConfig:
        """These conditions, with captions encoded into `target` if need be (`encode_captions`)."""
        if not (self.captions and self.encoder):
            return self
        found = encode_captions(
            self.captions, self.column, self.encoder, target, self.long_captions
        )
        if not found:
            return replace(self, encoder="")
        return replace(self, captions=str(target), column="", encoder="")

    def conditions(self) -> list[Condition]:
        """All conditions to draw from, captions with their features.

        Raises:
            DataError: the file of captions cannot be read, or no such class.
        """
        return list(_conditions(self, _version(self.captions)))


def _version(captions: str) -> tuple[int, ...]:
    """Differs when a file was written anew; empty where there is none."""
    if not captions:
        return ()
    try:
        found = expand_user(caption_file(captions)).stat()
    except (OSError, CheckpointError):
        return ()
    return found.st_mtime_ns, found.st_size, found.st_ino


@functools.lru_cache(maxsize=4)
def _conditions(config: ConditionsConfig, version: tuple[int, ...]) -> Sequence[Condition]:
    """Cached: a file may be long.

    Args:
        version: of the file, for the cache.
    """
    if config.captions:
        return caption_conditions(caption_file(config.captions), config.column)
    names = config.class_names
    if max(config.classes, default=0) >= len(names):
        raise DataError(f"conditions.classes: {max(config.classes)} is not below {len(names)}")
    return [
        Condition(text=config.template.format(names[index]), class_index=index)
        for index in config.classes or range(len(names))
    ]


def imagenet_names() -> tuple[str, ...]:
    """The names of ImageNet's thousand classes in open_clip."""
    from cluster.model_files.torchvision_ops import ensure_torchvision

    ensure_torchvision()
    from open_clip import IMAGENET_CLASSNAMES

    return tuple(IMAGENET_CLASSNAMES)


class ConditionStream:
    """Draws conditions in epochs: each once, in a random order, before any is repeated.

    The conditions of an iteration are a function of (seed, iteration), so a checkpoint needs no
    cursor.
    """

    def __init__(self, conditions: list[Condition], per_iteration: int, seed: int) -> None:
        self._conditions, self._per_iteration, self._seed = conditions, per_iteration, seed
        self._latest: tuple[int, np.ndarray] = -1, np.empty(0, np.int64)

    def draw(self, iteration: int) -> list[Condition]:
        """The conditions of one iteration."""
        first = iteration * self._per_iteration
        return [self._at(first + offset) for offset in range(self._per_iteration)]

    def _at(self, position: int) -> Condition:
        epoch, place = divmod(position, len(self._conditions))
        return self._conditions[int(self._order(epoch)[place])]

    def _order(self, epoch: int) -> np.ndarray:
        """The permutation of an epoch; the last one is cached."""
        if self._latest[0] != epoch:
            key = [self._seed, zlib.crc32(b"conditions")]
            generator = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, epoch]))
            self._latest = epoch, generator.permutation(len(self._conditions))
        return self._latest[1]
