"""Comparison of two rows: paired differences with intervals and p-values."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from cluster.errors import ConfigError, DataError
from cluster.io.paths import expand_user
from cluster.io.strict_json import MALFORMED
from learner.evaluation.kept.identity import FILES, JUDGE, JUDGE_DEVICE, differences
from learner.evaluation.kept.real import REAL, kept_identity, read_real
from learner.evaluation.kept.samples import (
    CONTINUE,
    MANIFEST,
    SAMPLES,
    KeptSamples,
    read_manifest,
    write_json,
)
from learner.evaluation.results import JSON, better, heading, number, write_text
from rewards.metrics.evaluation import (
    Difference,
    Figure,
    MetricSettings,
    estimates,
    pairing,
)
from rewards.metrics.intervals import differences as paired_differences
from rewards.metrics.intervals import intervals
from rewards.metrics.samples import RealImages, Samples

LEVEL = 0.05  # of significance
OF_POLICY = ("policy", "tokenizer", "sampling", "images")
"""What two compared rows may differ in."""
SETTINGS = ("neighbours", "splits", "seed")
REAL_IMAGES = "real images"
"""Of results.json."""
COMPARISON_JSON, COMPARISON_MARKDOWN = "comparison.json", "comparison.md"
NOTE = (
    "Difference: the second minus the first, with its 95 % interval. p: two-sided, of the paired "
    "bootstrap. Holm: p corrected for the number of figures; below 0.05 is called significant, so "
    "that 5 % is the chance of calling any figure different where none is."
)


@dataclass(frozen=True)
class Side:
    """A compared row."""

    name: str
    kept: KeptSamples
    folder: Path
    """Of its evaluation, which holds the real images."""
    identity: Mapping[str, Any]


@dataclass(frozen=True)
class Line:
    """A figure of both rows."""

    first: Figure
    second: Figure
    difference: Difference
    p_value: float
    """Corrected by `holm`; NaN where there is none."""

    @property
    def significant(self) -> bool:
        return self.p_value < LEVEL


@dataclass(frozen=True)
class Comparison:
    """Two rows compared."""

    first: str
    second: str
    lines: Mapping[str, Line]
    """By figure."""


def find_side(given: str, out: Path | None) -> Side:
    """A row: by its directory, by an evaluation's directory or results.json if it has one row, or
    by its name in the evaluation `out`.

    Raises:
        ConfigError: there is none, or several; lists them.
    """
    path = expand_user(given)
    if path.name == JSON:
        path = path.parent
    if (path / MANIFEST).is_file():
        return _side(path)
    if (path / SAMPLES).is_dir():
        rows = rows_in(path)
        if len(rows) == 1:
            return _side(next(iter(rows.values())))
        listed = "\n  ".join(str(folder) for folder in rows.values())
        raise ConfigError(f"--compare {given}: which of its {len(rows)} rows is meant?\n  {listed}")
    if out is not None and given in (rows := rows_in(out)):
        return _side(rows[given])
    there = "\n  ".join(rows_in(out)) if out is not None else ""
    names = f" (in {out} there are\n  {there})" if there else ""
    raise ConfigError(
        f"--compare {given}: expected the directory of an evaluation or of one of its rows "
        f"(DIR/{SAMPLES}/ROW), or the name of a row with --out DIR{names}"
    )


def rows_in(out: Path) -> dict[str, Path]:
    """Name of each kept row of an evaluation -> its directory."""
    folders = sorted(path.parent for path in (out / SAMPLES).glob(f"*/{MANIFEST}"))
    return {read_manifest(folder)["name"]: folder for folder in folders}


def _side(folder: Path) -> Side:
    manifest = read_manifest(folder)
    return Side(manifest["name"], KeptSamples.open(folder), folder.parents[1], manifest["identity"])


def check_comparable(first: Side, second: Side) -> None:
    """
    Raises:
        ConfigError: they differ in more than the policy and its sampling.
    """
    if first.kept.folder.resolve() == second.kept.folder.resolve():
        raise ConfigError(f"--compare: both are {first.kept.folder}")
    given = [side for side in (first, second) if "sampling" not in side.identity]
    besides = list(OF_POLICY)
    if given:  # images of unknown seed and conditions
        every = {**first.identity, **second.identity}
        besides = [name for name in every if name not in (JUDGE, FILES, JUDGE_DEVICE)]
    if found := differences(first.identity, second.identity, besides):
        raise _incomparable(first, second, found)
    if len(first.kept) != len(second.kept):
        raise ConfigError(
            f"{first.kept.folder} has {len(first.kept)} images and {second.kept.folder} "
            f"{len(second.kept)}: FID, recall, coverage and others depend on how many there are: "
            "evaluate as many of both (--num-images of policies; of a folder or file, name one "
            "with as many)"
        )


def _incomparable(first: Side, second: Side, found: Sequence[str]) -> ConfigError:
    return ConfigError(
        f"{first.kept.folder} and {second.kept.folder} cannot be compared: "
        f"{'; '.join(found)}: evaluate both with the same settings"
    )


def _results(side: Side) -> dict[str, Any]:
    """Settings of a side's evaluation.

    Raises:
        ConfigError: it has no results yet.
        DataError: they are damaged.
    """
    path = side.folder / JSON
    if not path.is_file():
        raise ConfigError(
            f"{path}: no such file, which says how the figures of {side.name} are computed: give "
            "the command that evaluated it again"
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        settings = {name: int(found[name]) for name in SETTINGS}
        return settings | {REAL_IMAGES: str(found[REAL_IMAGES])}
    except MALFORMED as error:
        raise DataError(f"{path}: damaged ({error}): remove it, and {CONTINUE}") from error


def settings_of(first: Side, second: Side) -> MetricSettings:
    """The settings that both sides' figures were computed with.

    Raises:
        ConfigError: they differ, or a side has no results.
        DataError: its results are damaged.
    """
    ours, theirs = ({name: _results(side)[name] for name in SETTINGS} for side in (first, second))
    if found := differences(ours, theirs):
        raise _incomparable(first, second, found)
    return MetricSettings(**ours)


def _real(first: Side, second: Side) -> RealImages:
    """The real images of both sides.

    Raises:
        ConfigError: the sides have other ones, or those of one are gone.
        DataError: a file is damaged.
    """
    identities = [kept_identity(side.folder) for side in (first, second)]
    for side, identity in zip((first, second), identities):
        if identity is None and _results(side)[REAL_IMAGES] != "none":
            raise ConfigError(
                f"{side.folder / REAL}: the real images of {side.name} are gone: give the command "
                "that evaluated it again"
            )
    ours, theirs = ({} if identity is None else identity for identity in identities)
    moved = bool(ours.get("sha256")) and ours.get("sha256") == theirs.get("sha256")
    if found := differences(ours, theirs, ["images"] if moved else []):
        raise _incomparable(first, second, [f"real {found[0]}", *found[1:]])
    return read_real(first.folder) or RealImages()


def compare_sides(first: Side, second: Side, bootstrap: int) -> Comparison:
    """Compare two rows, with the settings that they were evaluated with; loads both.

    Args:
        bootstrap: number of resamples.

    Raises:
        ConfigError: they cannot be compared.
        DataError: a file is damaged, or there are too few images.
    """
    check_comparable(first, second)
    settings = replace(settings_of(first, second), bootstrap=bootstrap)
    real = _real(first, second)
    samples = [side.kept.read() for side in (first, second)]
    return compared((first.name, second.name), samples, real, settings)


def compared(
    names: tuple[str, str], samples: Sequence[Samples], real: RealImages, settings: MetricSettings
) -> Comparison:
    """The comparison of two sets of samples.

    Raises:
        ConfigError: too few resamples for their p-values to be significant.
    """
    of_each = [estimates(each, real, settings) for each in samples]
    resamples, seed = settings.bootstrap, settings.seed
    figures = [intervals(each, resamples, seed) for each in of_each]
    found = paired_differences(of_each[0], of_each[1], pairing(*samples), resamples, seed)
    tested = {name: d for name, d in found.items() if better(name)}
    least = 2 * len(tested) / (resamples + 1)  # smallest p-value that can be found, corrected
    if least >= LEVEL:
        raise ConfigError(
            f"--bootstrap: {len(tested)} figures are tested, and with {resamples} resamples none "
            f"could be significant: set at least {math.ceil(2 * len(tested) / LEVEL)}"
        )
    corrected = holm({name: d.p_value for name, d in tested.items()})
    lines = {
        name: Line(figures[0][name], figures[1][name], d, corrected.get(name, math.nan))
        for name, d in found.items()
    }
    lines.pop("images", None)
    return Comparison(*names, lines)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p-values corrected for their number by Holm's method (1979); NaN stays, and does not count.

    The k-th smallest of m is multiplied by m - k + 1 and raised to the ones before it.
    """
    known = sorted((p, name) for name, p in p_values.items() if not math.isnan(p))
    found, least = dict.fromkeys(p_values, math.nan), 0.0
    for rank, (p, name) in enumerate(known):
        least = max(least, min(1.0, p * (len(known) - rank)))
        found[name] = least
    return found


def verdict(comparison: Comparison) -> str:
    """Which row is better in what, in a sentence or a few."""
    wins: dict[str, list[str]] = {comparison.first: [], comparison.second: []}
    open_, untested = list[str](), list[str]()
    for name, line in comparison.lines.items():
        direction = better(name)
        if not direction:
            continue
        if math.isnan(line.p_value):
            untested.append(heading(name, arrow=False))
        elif not line.significant:
            open_.append(heading(name, arrow=False))
        else:
            second = (line.difference.value < 0) == (direction == "lower")
            winner = comparison.second if second else comparison.first
            wins[winner].append(f"{heading(name, arrow=False)} (by {_gap(line)})")
    parts = [f"{name} is better in {_listed(won)}." for name, won in wins.items() if won]
    if not parts:
        parts = [f"No figure tells {comparison.first} and {comparison.second} apart."]
    elif open_:
        parts.append(f"No significant difference in {_listed(open_)}.")
    if untested:
        parts.append(f"Not tested: {_listed(untested)}.")
    return " ".join(parts)


def _gap(line: Line) -> str:
    p = "p < 0.001" if line.p_value < 0.001 else f"p = {line.p_value:.3f}"
    return f"{number(abs(line.difference.value), 3)}, {p}"


def _listed(words: Sequence[str]) -> str:
    return ", ".join(words[:-1]) + f" and {words[-1]}" if len(words) > 1 else words[0]


def _columns(name: str, line: Line) -> list[str]:
    d = line.difference
    interval = "" if math.isnan(d.low) else f" [{number(d.low, 3)}, {number(d.high, 3)}]"
    ps = ["-" if math.isnan(p) else f"{p:.2g}" for p in (d.p_value, line.p_value)]
    return [heading(name), number(line.first.value), number(line.second.value),
            f"{'+' if d.value > 0 else ''}{number(d.value, 3)}{interval}", *ps]  # fmt: skip


def _headings(comparison: Comparison) -> list[str]:
    return ["figure", comparison.first, comparison.second, "difference", "p", "Holm"]


def show_comparison(comparison: Comparison, console: Console) -> None:
    """Print table and verdict."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    first, *others = _headings(comparison)
    table.add_column(first, no_wrap=True)
    for heading_ in others:
        table.add_column(heading_, justify="right")
    for name, line in comparison.lines.items():
        table.add_row(*_columns(name, line))
    console.print(table)
    console.print(f"{verdict(comparison)}\n\n{NOTE}", highlight=False)


def write_comparison(out: Path, comparison: Comparison) -> None:
    """Write comparison.json and comparison.md.

    Raises:
        StorageError: no space left.
    """
    heads = _headings(comparison)
    rows = [_columns(name, line) for name, line in comparison.lines.items()]
    lines = [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)]
    text = "\n".join(["# Comparison", "", *lines, "", verdict(comparison), "", NOTE, ""])
    write_text(out / COMPARISON_MARKDOWN, text)
    plain = {
        "first": comparison.first,
        "second": comparison.second,
        "verdict": verdict(comparison),
        "figures": {
            name: {
                "first": asdict(line.first),
                "second": asdict(line.second),
                "difference": asdict(line.difference),
                "p_value_holm": line.p_value,
                "better": better(name),
            }
            for name, line in comparison.lines.items()
        },
    }
    write_json(out / COMPARISON_JSON, plain)
