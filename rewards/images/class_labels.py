"""Class numbers from the names of folders or labels.

A decimal name is its number: folders 0 to 11 are classes 0 to 11, and a missing number is a class
without images. Other names are numbered in alphabetical order, as ImageNet's. Ambiguous names are
refused.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cluster.errors import DataError
from cluster.io.files import split_lines
from cluster.program.streams import escaped

MOST_CLASSES = 1_000_000  # larger numbers are identifiers or dates
SHOWN = 3  # classes at either end in messages
DECIMAL = re.compile(r"\d+")
DIGITS = re.compile(r"(\d+)")
CHOICE = "rename them, move away other folders, or give the order in a file with --class-names"


@dataclass(frozen=True)
class ClassLabels:
    """Class of every image."""

    indices: np.ndarray
    """(N,) int64"""
    names: tuple[str, ...] = ()
    """Names in the order of their numbers, empty for a number without a name; () without names."""

    @property
    def count(self) -> int:
        """C, the number of classes: named or occurring."""
        return max(len(self.names), int(self.indices.max(initial=-1)) + 1)

    def __post_init__(self) -> None:
        if self.count > MOST_CLASSES:
            raise DataError(
                f"class number {self.indices.max()} is none: expected classes, numbered from 0, "
                "found identifiers"
            )


def described(indices: np.ndarray, count: int, names: Sequence[str]) -> str:
    """The mapping of `count` classes in a line: the first and last ones, with their images."""
    counts = np.bincount(indices, minlength=count)
    empty = int((counts == 0).sum())
    numbers = list(range(count))
    if len(numbers) > 2 * SHOWN + 1:
        numbers = [*numbers[:SHOWN], -1, *numbers[-SHOWN:]]

    def one(number: int) -> str:
        if number < 0:
            return "..."
        name = names[number] if names else ""
        label = f" {name!r}" if name and name != str(number) else ""
        return f"{number}{label} ({counts[number]} images)"

    without = f" ({empty} without images)" if empty else ""
    return f"{count} classes{without}: {', '.join(map(one, numbers))}"


def class_numbers(
    found: Iterable[str], where: str, given: Sequence[str] = ()
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Number of each name, and the classes' names in the order of their numbers.

    Args:
        found: occurring names, in any order.
        where: for messages.
        given: all names in the order of their numbers, from the user.

    Raises:
        DataError: ambiguous names.
    """
    names = sorted(set(found))
    if given:
        return _as_given(names, where, given)
    _check_accents(names, where)
    decimal = [name for name in names if DECIMAL.fullmatch(name)]
    if decimal and len(decimal) < len(names):
        other = next(name for name in names if not DECIMAL.fullmatch(name))
        raise DataError(
            f"{where}: some classes are numbers and some are names ({decimal[0]!r}, "
            f"{escaped(other)!r}): {CHOICE}"
        )
    if decimal:
        return _as_numbers(decimal, where)
    _check_counted(names, where)
    return {name: number for number, name in enumerate(names)}, tuple(map(escaped, names))


def _as_numbers(names: list[str], where: str) -> tuple[dict[str, int], tuple[str, ...]]:
    numbers = {name: int(name) for name in names if len(name.lstrip("0")) <= len(str(MOST_CLASSES))}
    far = [name for name in names if numbers.get(name, MOST_CLASSES) >= MOST_CLASSES]
    if far:
        raise DataError(
            f"{where}: {far[0][:40]!r} is no class number: expected classes, numbered from 0, "
            f"found identifiers; {CHOICE}"
        )
    by_number: dict[int, str] = {}
    for name, number in numbers.items():
        if number in by_number:
            raise DataError(f"{where}: {by_number[number]!r} and {name!r} are one number: {CHOICE}")
        by_number[number] = name
    return numbers, tuple(by_number.get(number, "") for number in range(max(by_number) + 1))


def _as_given(
    names: list[str], where: str, given: Sequence[str]
) -> tuple[dict[str, int], tuple[str, ...]]:
    numbers = {name: number for number, name in enumerate(given)}
    composed = {_composed(name): number for name, number in numbers.items()}
    for name in names:
        if _composed(name) in composed:
            numbers.setdefault(name, composed[_composed(name)])
    unknown = [escaped(name) for name in names if name not in numbers]
    if unknown:
        raise DataError(
            f"{where}: {len(unknown)} classes are not among the {len(given)} of --class-names; the "
            f"first: {unknown[0]!r}, where the file begins with {escaped(given[0])!r}"
        )
    return numbers, tuple(given)


def _composed(name: str) -> str:
    """A name in Unicode NFC; macOS stores file names decomposed."""
    return unicodedata.normalize("NFC", name)


def _check_accents(names: list[str], where: str) -> None:
    """Refuse two names with the same NFC form."""
    before: dict[str, str] = {}
    for name in names:
        if before.setdefault(_composed(name), name) != name:
            raise DataError(
                f"{where}: two classes are called {escaped(name)!r}, with accents in their "
                "letters and apart: put them together"
            )


def _check_counted(names: list[str], where: str) -> None:
    """Refuse class_1, class_2, class_10: in alphabetical order they are 1, 10, 2."""
    split = [DIGITS.split(name) for name in names]  # texts at even places, numbers at odd ones
    if all(parts[0] == "" and len(parts) > 1 for parts in split):
        keys = [[int(parts[1][:18])] for parts in split]  # 10_dog
    elif len({tuple(parts[::2]) for parts in split}) == 1:
        keys = [[int(number[:18]) for number in parts[1::2]] for parts in split]  # class_10.old
    else:
        return
    for at in range(1, len(names)):
        if keys[at] < keys[at - 1]:
            raise DataError(
                f"{where}: in alphabetical order {escaped(names[at - 1])!r} comes before "
                f"{escaped(names[at])!r}, by their numbers after it: {CHOICE}"
            )


def read_class_names(path: Path) -> tuple[str, ...]:
    """
    Raises:
        DataError: not a file with a class name in each line.
    """
    try:
        lines = split_lines(path.read_bytes().decode("utf-8-sig"))
    except (OSError, UnicodeError) as error:
        raise DataError(f"{path}: expected names of classes, one a line ({error})") from error
    names = tuple(line.strip() for line in lines)
    while names and not names[-1]:
        names = names[:-1]
    twice = [name for name, count in Counter(names).items() if count > 1 or not name]
    if not names or twice:
        found = f"{twice[0]!r} twice" if twice and twice[0] else "an empty line"
        raise DataError(f"{path}: expected names of classes, one a line, found {found}")
    return names


def contradiction(ours: Sequence[str], theirs: Sequence[str]) -> str:
    """A name that two lists of classes have under different numbers, for messages; else empty.
    Decimal and repeated names are ignored."""

    def places(names: Sequence[str]) -> dict[str, int]:
        plain = [_composed(name).casefold().replace("_", " ").strip() for name in names]
        once = {name for name, count in Counter(plain).items() if count == 1}
        return {
            name: number
            for number, name in enumerate(plain)
            if name in once and not DECIMAL.fullmatch(name)
        }

    known = places(theirs)
    for name, number in places(ours).items():
        if known.get(name, number) != number:
            return f"class {number} is {name!r} here, and number {known[name]} there"
    return ""
