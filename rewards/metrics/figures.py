"""Names of figures, and which direction is better.

A figure of a feature space is NAME in the judge's main space, and SPACE/NAME in its others:
`fid`, `second/fid`, `clip/fid`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from cluster.messages import MAIN_SPACE

Direction = Literal["lower", "higher", ""]
SECOND_SPACE = "second"
OF_A_SPACE: dict[str, Direction] = {
    "fid": "lower",
    "precision": "higher",
    "recall": "higher",
    "density": "higher",
    "coverage": "higher",
}
"""Figures that every space has -> their better direction, "" for neither."""
BETTER: dict[str, Direction] = {
    **OF_A_SPACE,
    "sfid": "lower",
    "inception_score": "higher",
    "vendi": "higher",
    "clip": "higher",
    "hps": "higher",
    "r_precision": "higher",
    "accuracy": "higher",
    "entropy": "",
    "images": "",
}
"""The same of all figures, in the order of tables."""


def prefix_of(space: str) -> str:
    """What the names of a space's figures begin with."""
    return "" if space == MAIN_SPACE else f"{space}/"


def split_figure(figure: str) -> tuple[str, str]:
    """Prefix of a figure's space, and its name there: "second/fid" -> ("second/", "fid")."""
    space, slash, name = figure.partition("/")
    return (space + slash, name) if slash and name in OF_A_SPACE else ("", figure)


def better(figure: str, other: Direction = "higher") -> Direction:
    """The better direction of a figure; `other`: that of scores of other scorers."""
    return BETTER.get(split_figure(figure)[1], other)


def ordered(figures: Iterable[str]) -> list[str]:
    """Figures of the main space, then of each other one, then all others; the number of images
    last."""
    named = list(dict.fromkeys(figures))
    ranks = {name: rank for rank, name in enumerate(BETTER)}
    spaces = {prefix: at for at, prefix in enumerate(prefixes(named))}

    def place(figure: str) -> tuple[float, int, int]:
        prefix, name = split_figure(figure)
        part = 0 if name in OF_A_SPACE else 2 if figure == "images" else 1
        return part, spaces[prefix] if part == 0 else 0, ranks.get(name, len(ranks))

    return sorted(named, key=place)


def prefixes(figures: Iterable[str]) -> list[str]:
    """Prefixes of the figures' spaces: the main one's, the second's, and the others'."""
    found = dict.fromkeys(split_figure(figure)[0] for figure in figures)
    first = ("", prefix_of(SECOND_SPACE))
    return sorted(found, key=lambda prefix: first.index(prefix) if prefix in first else len(first))
