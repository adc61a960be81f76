"""What is asked for: conditions, and the order in which iterations draw them."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from actors.text.captions import caption_conditions
from cluster.errors import DataError
from cluster.messages import Condition
from cluster.text_limits import LongCaptions
from learner.data.captions import encode_captions

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
IMAGENET = "imagenet"


@dataclass(frozen=True, kw_only=True)
class ConditionsConfig:
    """The classes of the policy, in the order of its class table, and the words for them; or a file
    of captions."""

    names: tuple[str, ...] | Literal["imagenet"] = DIGITS
    """One name a class; imagenet is open_clip's thousand."""
    template: str = "a photo of the digit {}"
    """Text of a class; {} takes its name."""
    classes: tuple[int, ...] = ()
    """Classes that are asked for, by index; empty is all of them."""
    captions: str = ""
    """Captions in place of classes: a text file, one a line, a table (.tsv, .csv, .json, .jsonl),
    or a Parquet file, for caption-conditional policies with features (as `python -m
    actors.captions` writes it, or with a column features of lists)."""
    column: str = ""
    """Column of a table that holds the captions; empty: the only one called caption, prompt, text
    or the like."""
    long_captions: LongCaptions = "error"
    """Of captions that `encoder` would cut: error refuses them, truncate has them cut."""
    encoder: str = ""
    """T5 model (folder or name) that encodes captions whose file has no features, when the run
    starts, into its directory."""

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
        """Whether the names are a known list rather than written out."""
        return self.names in (IMAGENET, (IMAGENET,))

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name a class of the policy, asked for or not."""
        return imagenet_names() if self.all_of_imagenet else tuple(self.names)

    def encoded(self, target: Path) -> ConditionsConfig:
        """These conditions, or, where there is an `encoder` and captions that need it, those of a
        file that it has written. See `encode_captions`."""
        if not (self.captions and self.encoder):
            return self
        found = encode_captions(
            self.captions, self.column, self.encoder, target, self.long_captions
        )
        if not found:
            return replace(self, encoder="")
        return replace(self, captions=str(target), column="", encoder="")

    def conditions(self) -> list[Condition]:
        """Every condition there is to draw from; captions with features where their file has them.

        Raises:
            DataError: the file of captions cannot be read, or a class is not there.
        """
        return list(_conditions(self))


@functools.lru_cache(maxsize=4)
def _conditions(config: ConditionsConfig) -> Sequence[Condition]:
    """Read once: a file may be long, and its features are compared by nobody."""
    if config.captions:
        return caption_conditions(Path(config.captions), config.column)
    names = config.class_names
    if max(config.classes, default=0) >= len(names):
        raise DataError(f"conditions.classes: {max(config.classes)} is not below {len(names)}")
    return [
        Condition(text=config.template.format(names[index]), class_index=index)
        for index in config.classes or range(len(names))
    ]


def imagenet_names() -> tuple[str, ...]:
    """ImageNet's thousand classes in words, one each, as open_clip has them."""
    from cluster.model_files.torchvision_ops import ensure_torchvision

    ensure_torchvision()
    from open_clip import IMAGENET_CLASSNAMES

    return tuple(IMAGENET_CLASSNAMES)


class ConditionStream:
    """Draws conditions in epochs: each once, in a new order, before any comes again.

    Which conditions an iteration gets is a function of (seed, iteration) alone: there is no cursor
    that a resumed run could lose.
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
        """Of one epoch; the last one asked for is kept, for files may be long."""
        if self._latest[0] != epoch:
            key = [self._seed, zlib.crc32(b"conditions")]
            generator = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, epoch]))
            self._latest = epoch, generator.permutation(len(self._conditions))
        return self._latest[1]
