"""What the report says first: did tuning help, by which figure; the table; signs of collapse."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from learner.reports.reading import RunData, plain_number
from learner.runs.records import STEP, TUNED
from rewards.config import is_loo_fid
from rewards.metrics.figures import SECOND_SPACE, ordered, prefix_of, prefixes, split_figure

BASE = "base"
MEANINGS = {
    "fid": (
        "FID",
        "Fréchet distance between the features of generated and of held-out real images",
    ),
    "density": ("density", "how densely real images surround generated ones; can exceed 1"),
    "coverage": ("coverage", "share of real images with a generated one nearby: diversity"),
    "precision": ("precision", "share of generated images near real ones: quality"),
    "recall": ("recall", "share of real images near generated ones: diversity"),
    "accuracy": ("accuracy", "share that the judge's classifier puts in the requested class"),
    "clip": ("CLIP", "agreement of image and text, by the judge's CLIP"),
    "hps": ("HPSv2", "human preference score"),
    "r_precision": (
        "R-precision",
        "share for which the judge's CLIP ranks the own text first among the run's",
    ),
    "vendi": ("Vendi", "effective number of different images within a class: diversity"),
    "inception_score": ("IS", "Inception Score: certain about each image, and varied over all"),
    "sfid": ("sFID", "FID on spatial features: layout"),
    "entropy": ("entropy", "mean token entropy, nats; neither direction is better by itself"),
}
"""Figure -> heading, what it means; in the order of the table."""
MAX_LOSS = 0.3
"""Share of the base policy's coverage and recall that may be lost before it is pointed out, in runs
without `evaluation.max_diversity_loss`."""
SAME = 0.02
"""A relative change below this is "about the same": no interval is known here."""
DIVERSITY = ("coverage", "recall", "vendi")
UNTESTED = "Not tested: learner.evaluate RUN has intervals, its --compare paired significance."
FLAT = 0.5
"""A share of flat groups above this is pointed out."""
ENDS = 10  # iterations at each end that are compared
Better = Mapping[str, str]


@dataclass(frozen=True)
class Cell:
    text: str
    best: bool = False


@dataclass(frozen=True)
class Column:
    """A figure of the table."""

    key: str
    heading: str
    meaning: str
    direction: str
    """"lower" or "higher" is better, or empty."""

    @property
    def arrow(self) -> str:
        return {"lower": "↓", "higher": "↑"}.get(self.direction, "")


@dataclass(frozen=True)
class Change:
    """A figure before and after."""

    heading: str
    before: str
    after: str
    change: str
    """In percent, or the difference."""
    mark: str
    """"better", "worse", "same" (`SAME`), or empty where neither direction is better."""


@dataclass(frozen=True)
class Verdict:
    """The first lines of the page."""

    headline: str
    details: list[str]
    changes: list[Change]
    mark: str
    """As of a change, or "mixed"."""


@dataclass(frozen=True)
class Indicator:
    """A sign of diversity or collapse."""

    name: str
    start: str
    end: str
    state: str
    """"ok", "watch", or empty where nothing bounds it."""
    meaning: str


def figure_text(value: float) -> str:
    """A value in two to four digits; a dash where there is none."""
    if not math.isfinite(value):
        return "–"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if value and abs(value) < 1e-3:
        return f"{value:.1e}"
    digits = 3 if abs(value) < 1 else 2 if abs(value) < 100 else 1
    return f"{value:.{digits}f}"


def columns(tables: Sequence[Mapping[str, Mapping[str, float]]], better: Better) -> list[Column]:
    """Figures that any row has, in a fixed order; those of the other spaces last."""
    there = dict.fromkeys(key for table in tables for row in table.values() for key in row)
    names = by_space(there, MEANINGS)
    return [_column(name, better) for name in names if name not in ("images", STEP)]


def by_space(figures: Iterable[str], order: Iterable[str]) -> list[str]:
    """Figures of the judge's main space and of no space, then those of each other one.

    Args:
        order: of the figures of a space, as far as it names them.
    """
    there, ranks = [*figures], {name: rank for rank, name in enumerate(order)}
    spaces = {prefix: at for at, prefix in enumerate(prefixes(there))}

    def place(figure: str) -> tuple[int, int]:
        prefix, name = split_figure(figure)
        return spaces[prefix], ranks.get(name, len(ranks))

    return sorted(there, key=place)


def space_name(figure: str) -> str:
    """A figure's space, as headings call it; empty for the judge's main one."""
    prefix = split_figure(figure)[0]
    if prefix == prefix_of(SECOND_SPACE):
        return "the judge's second features"
    return f"the judge's features {prefix[:-1]!r}" if prefix else ""


def _column(name: str, better: Better) -> Column:
    prefix, plain = split_figure(name)
    heading, meaning = MEANINGS.get(plain, (plain, "mean of this scorer"))
    if prefix:
        short = "2nd" if prefix == prefix_of(SECOND_SPACE) else prefix[:-1]
        heading, meaning = f"{heading} ({short})", f"{meaning}; in {space_name(name)}"
    return Column(name, heading, meaning, better.get(plain, ""))


def table_cells(
    rows: Mapping[str, Mapping[str, float]], shown: Sequence[Column]
) -> dict[str, list[Cell]]:
    """Row name -> its cells; the best of each column is marked, if rows differ."""
    best = {column.key: _best(rows, column) for column in shown}
    found = {}
    for name, row in rows.items():
        values = [plain_number(row.get(column.key)) for column in shown]
        found[name] = [
            Cell(figure_text(value), math.isfinite(value) and value == best[column.key])
            for column, value in zip(shown, values)
        ]
    return found


def _best(rows: Mapping[str, Mapping[str, float]], column: Column) -> float:
    """NaN where nothing is to be marked."""
    values = [plain_number(row.get(column.key)) for row in rows.values()]
    values = [value for value in values if math.isfinite(value)]
    if not column.direction or len(set(values)) < 2:
        return math.nan
    return min(values) if column.direction == "lower" else max(values)


def verdict(run: RunData, better: Better) -> Verdict:
    """Whether tuning helped: by the judge; else by the rewards."""
    after, when = run.table.get(TUNED), "the tuned policy"
    if after is None and run.evaluations:
        after = run.evaluations[-1]
        when = f"the policy after {plain_number(after.get(STEP)):g} iterations"
    before = run.table.get(BASE)
    if before is None or after is None:
        return _by_rewards(run)
    marked = {
        column.key: change
        for column in columns([{BASE: before}], better)
        if (change := _change(column, before, after))
    }
    changes = [change for key, change in marked.items() if "/" not in key]
    main = next((key for key, change in marked.items() if change.mark), None)
    if main is None:
        return Verdict("The evaluation has no figure to compare", [], changes, "")
    details = [f"By the judge's networks: {when} against the base policy. {UNTESTED}"]
    for mark, words in (("better", "Better in"), ("worse", "Worse in")):
        if named := [change.heading for change in marked.values() if change.mark == mark]:
            details.append(f"{words} {', '.join(named)}.")
    details += _against_guidance(run, after, better)
    said, mark = _judgement(run, marked, main, before, after)
    return Verdict(_moved(marked[main]) + said, details, changes, mark)


def _moved(change: Change) -> str:
    """FID fell 33 % (25.00 → 16.75)"""
    figures = f"{change.before} → {change.after}"
    if change.mark == "same":
        return f"{change.heading} is about the same ({figures})"
    if change.change.endswith(" %"):
        word = "fell" if change.change.startswith("−") else "rose"
        return f"{change.heading} {word} {change.change[1:]} ({figures})"
    return f"{change.heading} {figures} ({change.change})"


def _judgement(
    run: RunData,
    marked: Mapping[str, Change],
    main: str,
    before: Mapping[str, float],
    after: Mapping[str, float],
) -> tuple[str, str]:
    """What contradicts the main figure, as the end of the headline; and the mark of both."""
    against = [
        f"{marked[name].heading} lost {1 - _kept(before, after, name):.0%}".replace("%", " %")
        for name in marked
        if split_figure(name)[1] in DIVERSITY and _kept(before, after, name) < 1 - max_loss(run)
    ]
    own = marked[main].mark
    opposite = {"better": "worse", "worse": "better"}.get(own)
    contrary = [
        change
        for name, change in marked.items()
        if name != main and split_figure(name)[1] == main and change.mark == opposite
    ]
    against += [f"{change.heading} is {change.mark}" for change in contrary]
    if not against:
        return "", own
    if own == "better" or contrary:
        return f"; mixed: {', '.join(against)}", "mixed"
    return f"; {', '.join(against)}", "worse"


def _kept(before: Mapping[str, float], after: Mapping[str, float], name: str) -> float:
    """Share of a figure that is left; NaN where it is not known."""
    old, new = plain_number(before.get(name)), plain_number(after.get(name))
    return new / old if old > 0 else math.nan


def max_loss(run: RunData) -> float:
    """Share of the base policy's diversity that may be lost."""
    loss = plain_number(run.setting("evaluation.max_diversity_loss"))
    return loss if math.isfinite(loss) else MAX_LOSS


def _change(
    column: Column, before: Mapping[str, float], after: Mapping[str, float]
) -> Change | None:
    old, new = plain_number(before.get(column.key)), plain_number(after.get(column.key))
    if not (math.isfinite(old) and math.isfinite(new)):
        return None
    mark = ""
    if column.direction:
        gain = (old - new) if column.direction == "lower" else (new - old)
        same = abs(gain) <= SAME * abs(old)
        mark = "same" if same else "better" if gain > 0 else "worse"
    return Change(column.heading, figure_text(old), figure_text(new), change_text(old, new), mark)


def change_text(old: float, new: float) -> str:
    """-33 %, or the difference where a share of the old value says nothing."""
    if old > 0 and new >= 0:
        percent = round(100 * (new - old) / old)
        return f"{percent:+d} %".replace("-", "−") if percent else "0 %"
    return f"{new - old:+.3g}".replace("-", "−")


def _against_guidance(run: RunData, after: Mapping[str, float], better: Better) -> list[str]:
    """How the tuned policy compares with the base policy sampled with guidance, by FID."""
    rows = {name: row for name, row in run.table.items() if name.startswith(f"{BASE},")}
    values = {name: plain_number(row.get("fid")) for name, row in rows.items()}
    values = {name: value for name, value in values.items() if math.isfinite(value)}
    tuned = plain_number(after.get("fid"))
    if not values or not math.isfinite(tuned):
        return []
    name = min(values, key=lambda name: values[name])
    word = "better" if tuned < values[name] else "worse"
    guided = name.removeprefix(f"{BASE}, ")
    return [f"FID is {word} than the base policy's with {guided} ({figure_text(values[name])})."]


def _by_rewards(run: RunData) -> Verdict:
    """Means of the first and last iterations' rewards, where no judge compared."""
    changes, counts = [], []
    for name in run.names("reward/"):
        values = run.column(f"reward/{name}")
        old, new = ends(values)
        counts.append(ends_counted(values))
        # the mean of a distribution reward says little: what a group adds, not its quality
        column = Column(name, name, "", "" if is_loo_fid(name) else "higher")
        if change := _change(column, {name: old}, {name: new}):
            changes.append(change)
    why = "No evaluation before and after: set --evaluation.num-images (and --evaluation.every)."
    if not run.evaluations and run.table:
        why = "The tuned policy was not evaluated yet: resume the run to its end."
    if not changes:
        return Verdict("Nothing was learned yet", [why], [], "")
    main = changes[0]
    head = f"Mean reward {main.heading} {main.before} → {main.after}"
    count = max(counts)
    which = f"first {count} against last {count} iterations" if count > 1 else "first against last"
    details = [why, f"Means of rewards, {which}: rewards judge themselves."]
    return Verdict(head, details, changes, "")


def ends(values: Sequence[float]) -> tuple[float, float]:
    """Means of the first and of the last finite values."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return math.nan, math.nan
    count = ends_counted(finite)
    return sum(finite[:count]) / count, sum(finite[-count:]) / count


def ends_counted(values: Sequence[float]) -> int:
    """How many values each mean of `ends` is of: never more than half of them."""
    return max(min(ENDS, sum(map(math.isfinite, values)) // 2), 1)


def indicators(run: RunData) -> list[Indicator]:
    """Signs of diversity and collapse, with what was found at the start and the end."""
    found = []
    entropy = run.column("policy/entropy")
    base = next((v for v in run.column("policy/base_entropy") if math.isfinite(v)), math.nan)
    last = ends(entropy)[1]
    bound = plain_number(run.setting("guards.min_entropy_share"))
    if math.isfinite(last) and base > 0:
        low = last < (bound if math.isfinite(bound) else 0.3) * base
        found.append(
            Indicator("token entropy", figure_text(base), figure_text(last),
                      "watch" if low else "ok",
                      f"{last / base:.0%} of the base policy's; the entropy guard acts below "
                      f"{bound if math.isfinite(bound) else 0.3:.0%}")
        )  # fmt: skip
    found += _of_evaluations(run)
    groups = plain_number(run.setting("groups_per_iteration"))
    old, new = ends(run.column("groups/flat"))
    if math.isfinite(new) and groups > 0:
        found.append(
            Indicator("flat groups", f"{old / groups:.0%}", f"{new / groups:.0%}",
                      "watch" if new / groups > FLAT else "ok",
                      "groups whose rewards are all equal, from which nothing is learned")
        )  # fmt: skip
    return found


def _of_evaluations(run: RunData) -> list[Indicator]:
    before = run.table.get(BASE, {})
    after = run.table.get(TUNED) or (run.evaluations[-1] if run.evaluations else {})
    found = []
    kept = 1 - max_loss(run)
    for name in ordered(name for name in before if split_figure(name)[1] in DIVERSITY):
        old, new = plain_number(before.get(name)), plain_number(after.get(name))
        if math.isfinite(old) and math.isfinite(new):
            state = "watch" if new < kept * old else "ok"
            column = _column(name, {})
            found.append(
                Indicator(column.heading, figure_text(old), figure_text(new), state, column.meaning)
            )
    return found
