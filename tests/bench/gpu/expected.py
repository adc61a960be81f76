"""What each figure should be: results on any device, speeds by card.

Speeds are estimates from 4.3 TB/s and 790 TFLOP/s in bf16 (H200) until one is measured: a slower
one is no error. Imports nothing beyond the standard library.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

CARDS = ("H200", "H100")
"""Cards that have expectations of speed, by a part of their name."""


class Verdict(Enum):
    PASSED = "passed"
    SLOWER = "slower than expected"
    WRONG = "wrong"
    RECORDED = "recorded"
    """Nothing was expected of it."""


@dataclass(frozen=True)
class Expected:
    """A range, and what a value outside it is."""

    low: float = -math.inf
    high: float = math.inf
    miss: Verdict = Verdict.WRONG

    def __str__(self) -> str:
        if self.low == self.high:
            return f"{self.low:g}"
        if math.isinf(self.high):
            return f">={self.low:g}"
        return f"<={self.high:g}" if math.isinf(self.low) else f"{self.low:g}..{self.high:g}"

    def judge(self, value: float) -> Verdict:
        """NaN is outside every range."""
        return Verdict.PASSED if self.low <= value <= self.high else self.miss


def at_most(limit: float) -> dict[str, Expected]:
    return {"": Expected(high=limit)}


def exactly(value: float) -> dict[str, Expected]:
    return {"": Expected(low=value, high=value)}


def within(h200: float, h100: float) -> dict[str, Expected]:
    """Seconds, at most."""
    return {
        "H200": Expected(high=h200, miss=Verdict.SLOWER),
        "H100": Expected(high=h100, miss=Verdict.SLOWER),
    }


def reaches(h200: float, h100: float) -> dict[str, Expected]:
    """A rate or a ratio, at least."""
    return {
        "H200": Expected(low=h200, miss=Verdict.SLOWER),
        "H100": Expected(low=h100, miss=Verdict.SLOWER),
    }


RECORDED: dict[str, Expected] = {}


def card_of(device_name: str) -> str:
    """The card of `CARDS` that a device's name holds, or an empty string."""
    return next((card for card in CARDS if card in device_name), "")


def expectation(figure: str, card: str, table: dict[str, dict[str, Expected]]) -> Expected | None:
    """What is expected of a figure on a card; None is nothing.

    Raises:
        KeyError: the table does not know the figure.
    """
    entry = table[figure]
    return entry.get(card) or entry.get("")
