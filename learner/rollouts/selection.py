"""Which rollouts of a run are shown, and in which order.

A figure of a rollout is one of its rewards, its advantage, or the mean logprob or entropy of its
tokens.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import ConfigError, DataError, did_you_mean
from learner.rollouts.images import read_files, rollout_files
from learner.rollouts.parquet import REWARD, reward_names
from learner.runs.run_dir import RunDirectory

LISTS = {"logprobs": "logprob", "entropies": "entropy"}
"""Column with a value a token -> figure: their mean, nats."""
PLACE = ("iteration", "group", "rollout")
BY_FIGURE = re.compile(r"([^=]+)=([^=]+)")


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Options: which rollouts, in which order."""

    iterations: str = ""
    """Iterations, as in 5, 10-20 or 1-10,50-. Default: all that were kept."""
    groups: tuple[int, ...] = ()
    """Numbers of groups within their iterations, from 0; default: all."""
    classes: tuple[int, ...] = ()
    """Class indices; default: all."""
    text: str = ""
    """Part of the class's text or of the caption, in upper or lower case."""
    at_least: tuple[str, ...] = ()
    """Lower bounds of figures, as in clip=0.3 advantage=0: of rewards by name, advantage, and
    logprob and entropy (means over tokens, nats)."""
    at_most: tuple[str, ...] = ()
    """Upper bounds of figures, written alike."""
    errors: Literal["any", "only", "none"] = "any"
    """Rollouts whose image could not be scored: with the others, alone, or left out."""
    sort: str = ""
    """Figure to sort by, the largest first; default: by iteration, group and rollout."""
    ascending: bool = False
    """Sort the smallest first."""
    limit: int = 20
    """Most rollouts that are shown, 0: all."""

    def __post_init__(self) -> None:
        self.bounds()
        if self.iterations:
            Numbers.parse(self.iterations)
        if self.limit < 0 or min((*self.groups, *self.classes), default=0) < 0:
            raise ValueError("--limit, --groups and --classes must be >= 0")
        if self.ascending and not self.sort:
            raise ValueError("--ascending is an option of --sort: name a figure by it")

    def bounds(self) -> list[tuple[str, float, bool]]:
        """Figure, bound, and whether it is a lower one."""
        given = [(text, True) for text in self.at_least] + [(text, False) for text in self.at_most]
        return [(*_bound(text, "least" if low else "most"), low) for text, low in given]


@dataclass(frozen=True)
class Numbers(Container[int]):
    """Ranges of whole numbers, ends included."""

    ranges: tuple[tuple[float, float], ...]

    @classmethod
    def parse(cls, text: str) -> Numbers:
        """From "5", "10-20", "-20" or "1-10,50-".

        Raises:
            ConfigError: it is none of these.
        """
        ranges = []
        for part in text.split(","):
            found = re.fullmatch(r"(\d*)(-?)(\d*)", part.strip())
            if not found or not (found[1] or found[3]):
                raise ConfigError(f"iterations are written as 5, 10-20 or 1-10,50-, found {text!r}")
            first, dash, last = found.groups()
            low = float(first or 0)
            high = low if not dash else float(last or math.inf)
            if low > high:
                raise ConfigError(f"iterations {part.strip()} end before they begin")
            ranges.append((low, high))
        return cls(tuple(ranges))

    def __contains__(self, number: object) -> bool:
        return isinstance(number, int) and any(low <= number <= high for low, high in self.ranges)


def read_figures(run: RunDirectory, iterations: str = "") -> pa.Table:
    """One row a rollout: its identity and its figures, without its tokens.

    Args:
        iterations: see `Selection`.

    Raises:
        DataError: no rollouts are there, or none of them can be read.
    """
    there = rollout_files(run)
    chosen = list(there)
    if iterations:
        numbers = Numbers.parse(iterations)
        if there and not (chosen := [number for number in there if number in numbers]):
            raise DataError(
                f"{run.path} keeps rollouts of iterations {min(there)} to {max(there)}, none of "
                f"{iterations}"
            )
    tables = (_with_means(table) for table in read_files(run, chosen))
    return pa.concat_tables(tables, promote_options="default")


def _with_means(table: pa.Table) -> pa.Table:
    """The rows of a file, lists replaced by their means."""
    for column, figure in LISTS.items():
        table = table.append_column(figure, pa.array(_means(table[column]), pa.float64()))
    return table.select([name for name in table.column_names if not _of_tokens(table, name)])


def _of_tokens(table: pa.Table, name: str) -> bool:
    return pa.types.is_list(table.schema.field(name).type)


def _means(column: pa.ChunkedArray) -> np.ndarray:
    """(N,) float64: the mean of each list; NaN where it is missing."""
    found = np.full(len(column), math.nan)
    there = column.is_valid().to_numpy()
    if there.any():
        values = column.drop_null().combine_chunks().flatten().to_numpy()
        found[there] = values.reshape(there.sum(), -1).mean(1, dtype=np.float64)
    return found


def figure_names(table: pa.Table) -> list[str]:
    """The figures of a table's rollouts: rewards first."""
    return [*reward_names(table.column_names), "advantage", *LISTS.values()]


def column_of(table: pa.Table, figure: str) -> str:
    """The column of a figure.

    Raises:
        ConfigError: there is none of this name; names those that exist.
    """
    names = figure_names(table)
    if figure not in names:
        hint = did_you_mean(figure, names)
        raise ConfigError(f"these rollouts have no {figure!r}: {hint}there are {', '.join(names)}")
    return f"{REWARD}{figure}" if f"{REWARD}{figure}" in table.column_names else figure


def select(table: pa.Table, chosen: Selection) -> pa.Table:
    """The rows that match a selection, in its order; all of them, whatever its limit.

    Raises:
        ConfigError: a figure that the rollouts do not have.
    """
    mask = np.ones(table.num_rows, bool)
    for column, wanted in (("group", chosen.groups), ("class_index", chosen.classes)):
        if wanted:
            mask &= np.isin(_numbers(table, column), wanted)
    if chosen.text:
        texts = pc.match_substring(table["text"], chosen.text, ignore_case=True)
        mask &= texts.fill_null(False).to_numpy()
    if chosen.errors != "any":
        failed = table["error"].is_valid().to_numpy()
        mask &= failed if chosen.errors == "only" else ~failed
    for figure, bound, low in chosen.bounds():
        values = _numbers(table, column_of(table, figure))
        mask &= values >= bound if low else values <= bound  # NaN is neither
    order = [(name, "ascending") for name in PLACE]
    if chosen.sort:
        direction = "ascending" if chosen.ascending else "descending"
        order = [(column_of(table, chosen.sort), direction), *order]
    found = table.filter(pa.array(mask))
    return found.take(pc.sort_indices(found, sort_keys=order))  # missing ones come last


def _numbers(table: pa.Table, column: str) -> np.ndarray:
    """(N,) float64; NaN where a value is missing."""
    return table[column].cast(pa.float64()).to_numpy()


def rows_with_lists(
    run: RunDirectory, rows: pa.Table, columns: Sequence[str] = ("tokens",)
) -> dict[str, np.ndarray]:
    """Columns with a value a token, of these rows in their order: name -> (N, T).

    Raises:
        DataError: a file was removed meanwhile.
    """
    places = list(zip(*(rows[name].to_pylist() for name in PLACE)))
    found: dict[tuple[int, ...], list[np.ndarray]] = {}
    for table in read_files(run, {place[0] for place in places}, [*PLACE, *columns]):
        of_file = zip(*(table[name].to_pylist() for name in PLACE))
        wanted = set(places)
        at = [(row, place) for row, place in enumerate(of_file) if place in wanted]
        lists = [table[name].take([row for row, _ in at]).to_numpy() for name in columns]
        found |= {place: list(values) for (_, place), *values in zip(at, *lists)}
    if lacking := [place for place in places if place not in found]:
        raise DataError(f"the rollouts of iteration {lacking[0][0]} are not there any more")
    return {
        name: np.stack([found[place][number] for place in places])
        for number, name in enumerate(columns)
    }


def _bound(text: str, which: str) -> tuple[str, float]:
    found = BY_FIGURE.fullmatch(text)
    try:
        if found and not math.isnan(bound := float(found[2])):
            return found[1].strip(), bound
    except ValueError:
        pass
    raise ValueError(f"--at-{which} takes bounds as in clip=0.3, found {text!r}")
