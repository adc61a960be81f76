"""The page of results: `python -m learner.miniature.page`.

Reads the study's results (PART.csv, as `learner.miniature.arms` writes them) and writes a page with
tables, comparisons and what came out of each claim (README.md), and a figure of each part
(PART.png), beside them. In a checkout it also renews what the main README says of them.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    import sys

    from cluster.program.start import run_command

    sys.exit(run_command("learner.miniature.page"))

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import tyro

from cluster.errors import ConfigError, DataError, TesseraError
from cluster.io.files import replacing, writing
from cluster.io.locks import locked
from cluster.io.paths import expand_user
from cluster.program.console import exit_status, make_console
from cluster.program.invocation import command_of
from learner.miniature.study.claims import CLAIMS
from learner.miniature.study.figures import draw
from learner.miniature.study.part import Part
from learner.miniature.study.parts import PARTS
from learner.miniature.study.results import read_csv
from learner.miniature.study.statistics import mean
from learner.miniature.study.tables import (
    View,
    comparison_table,
    interval,
    number,
    probability,
    settings_table,
    table,
    verdict,
)

RESULTS = Path(__file__).parent / "results"
TEXT = Path(__file__).parent / "study" / "text"
PAGE = "README.md"
MAIN_PAGE = Path(__file__).parents[2] / "README.md"
"""Of a checkout; a wheel has none."""
BEGIN, END = "<!-- made by learner.miniature.page -->\n", "<!-- end -->\n"
SHOWN = ("fid", "density", "coverage", "recall", "accuracy", "second/fid", "second/recall")
"""Figures of the main page's table."""


@dataclass(frozen=True, kw_only=True)
class PageConfig:
    """Make the page and the figures from the results."""

    results: Path = RESULTS
    """Directory with PART.csv of each part that was run; page and figures are written there."""


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    prog = command_of("learner.miniature.page")
    config = tyro.cli(PageConfig, args=arguments, description=__doc__, prog=prog)
    return exit_status(lambda: write(expand_user(config.results)), refused=(TesseraError,))


def write(folder: Path) -> None:
    """Write page and figures.

    Raises:
        ConfigError: there is no such folder.
        DataError: results that are damaged, or lack what a text names.
    """
    if not folder.is_dir():
        raise ConfigError(f"--results {folder}: there is no such directory")
    with locked(folder, f"--results {folder}"):
        views = read(folder)
        text = render(views)
        for name, view in views.items():
            draw(view, folder / f"{name}.png")
        file = folder / PAGE
        renew(file, text)
        if folder == RESULTS and MAIN_PAGE.is_file():
            renew(MAIN_PAGE, with_results(MAIN_PAGE.read_text(encoding="utf-8"), views))
    parts = ", ".join(views) or "no part"
    make_console().print(f"{parts}: {file}", highlight=False, soft_wrap=True)


def renew(file: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with writing(file, then="start again"), replacing(file) as partial:
        partial.write_text(text, encoding="utf-8")


def with_results(page: str, views: dict[str, View]) -> str:
    """The main page, with the results between its marks.

    Raises:
        DataError: it has no marks.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise DataError(
            f"{MAIN_PAGE}: expected {BEGIN.strip()!r} and {END.strip()!r} around results"
        )
    parts = {name: functions(view) | {"table": table(view, SHOWN)} for name, view in views.items()}
    text = templates().get_template("main.md").render(parts=parts)
    return f"{before}{begin}\n{text.strip()}\n\n{end}{after}"


def read(folder: Path) -> dict[str, View]:
    """The parts that were run, in the study's order."""
    files = {name: folder / f"{name}.csv" for name in PARTS}
    return {n: View(PARTS[n], read_csv(file)) for n, file in files.items() if file.is_file()}


def render(views: dict[str, View]) -> str:
    """The page, Markdown."""
    environment = templates()
    sections = [section(environment, part, views.get(part.name)) for part in PARTS.values()]
    return environment.get_template("page.md").render(sections=sections)


def templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEXT),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )


def section(environment: jinja2.Environment, part: Part, view: View | None) -> dict[str, Any]:
    """What the template shows of a part; `ran` is False without results."""
    found: dict[str, Any] = {"part": part, "ran": view is not None}
    if view is None:
        return found
    verdicts = [v for claim in CLAIMS.get(part.name, ()) if (v := verdict(view, claim))]
    file = TEXT / f"{part.name}.md"
    own = environment.get_template(file.name).render(functions(view)) if file.is_file() else ""
    return found | {
        "seeds": ", ".join(map(str, view.results.seeds)),
        "count": len(view.results.seeds),
        "images": number_of_images(view),
        "settings": settings_table(view.part),
        "main": table(view, ("fid", "density", "coverage", "precision", "recall", "accuracy",
                             "clip", "entropy")),
        "others": table(view, tuple(f"{space}/{name}" for space in ("second", "clip")
                                    for name in ("fid", "density", "coverage", "precision",
                                                 "recall"))),
        "comparisons": comparison_table(view),
        "tests": len(view.comparisons),
        "held": [v for v in verdicts if v.holds],
        "not_held": [v for v in verdicts if not v.holds],
        "own": own.strip(),
    }  # fmt: skip


def functions(view: View) -> dict[str, Any]:
    """What a part's own text takes its numbers from."""

    def wins(policy: str, other: str, metric: str) -> str:
        found = view.compare(policy, other, metric)
        return f"{found.better} of {found.seeds}"

    def better(policy: str, other: str, metric: str) -> str:
        return f"{wins(policy, other, metric)} seeds"

    def jointly(policy: str, other: str, *metrics: str) -> str:
        return f"{view.jointly(policy, other, metrics)} of {len(view.results.seeds)} seeds"

    return {
        "better": better,
        "jointly": jointly,
        "wins": wins,
        "value": lambda policy, metric: interval(mean(view.values(policy, metric))),
        "average": lambda policy, metric: number(float(view.values(policy, metric).mean())),
        "difference": lambda policy, other, metric: interval(
            view.compare(policy, other, metric).difference, sign=True
        ),
        "p": lambda policy, other, metric: probability(view.compare(policy, other, metric).p_value),
        "seeds": len(view.results.seeds),
        "has": view.has,
    }


def number_of_images(view: View) -> str:
    counts = {int(figures["images"]) for figures in view.results.figures.values()}
    return " or ".join(f"{count:,}" for count in sorted(counts))
