"""What is asked for: conditions, and the order in which iterations draw them."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from cluster.messages import Condition

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True, kw_only=True)
class ConditionsConfig:
    """The classes of the policy, in the order of its class table, and the words for them."""

    names: tuple[str, ...] = DIGITS
    """One name a class."""
    template: str = "a photo of the digit {}"
    """Text of a class; {} takes its name."""

    def __post_init__(self) -> None:
        if not self.names:
            raise ValueError("names must hold at least one class")
        if "{}" not in self.template:
            raise ValueError(f"template must contain {{}} for the name, found {self.template!r}")

    def conditions(self) -> list[Condition]:
        """Every condition there is."""
        return [
            Condition(text=self.template.format(name), class_index=index)
            for index, name in enumerate(self.names)
        ]


class ConditionStream:
    """Draws conditions in epochs: each class once, in a new order, before any comes again.

    Which conditions an iteration gets is a function of (seed, iteration) alone: there is no cursor
    that a resumed run could lose.
    """

    def __init__(self, conditions: list[Condition], per_iteration: int, seed: int) -> None:
        self._conditions, self._per_iteration, self._seed = conditions, per_iteration, seed

    def draw(self, iteration: int) -> list[Condition]:
        """The conditions of one iteration."""
        first = iteration * self._per_iteration
        return [self._at(first + offset) for offset in range(self._per_iteration)]

    def _at(self, position: int) -> Condition:
        epoch, place = divmod(position, len(self._conditions))
        key = [self._seed, zlib.crc32(b"conditions")]
        generator = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, epoch]))
        return self._conditions[int(generator.permutation(len(self._conditions))[place])]
