"""The command `python -m learner.rollouts`: a run's rollouts by their rewards.

It reads the run's Parquet files alone; images are decoded from their tokens by the run's tokenizer.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import tyro

from actors.sample_source import check_unused
from cluster.errors import ConfigError, DataError
from cluster.io.locks import locked
from cluster.io.paths import output_path
from cluster.program.console import REFUSED, exit_status, make_console
from cluster.program.help import answer_help
from cluster.program.invocation import command_of
from learner.rollouts.images import RolloutDecoder, token_grid
from learner.rollouts.selection import (
    PLACE,
    Selection,
    read_figures,
    rows_with_lists,
    select,
)
from learner.rollouts.sheets import SHEET, write_images, write_sheets, write_tables
from learner.rollouts.shown import (
    figures_in_group,
    grid_lines,
    identity_lines,
    table_of,
)
from learner.runs.run_dir import RunDirectory

MODULE = "learner.rollouts"
ABOUT = (
    "Stored rollouts of a run, active or ended: their rewards, images, tokens and logprobs. RUN is "
    "a run's directory, or its name under runs/. A rollout is named ITERATION.GROUP.ROLLOUT."
)
COMMON = {
    "which rollouts": ("--iterations", "--groups", "--classes", "--text", "--at-least", "--at-most",
                       "--errors"),
    "in which order, how many": ("--sort", "--ascending", "--limit"),
    "one in full": ("--show",),
    "images": ("--out", "--png", "--device"),
}  # fmt: skip
"""What --help shows; --help-all shows every option."""
WIDTH = 120  # columns, where there is no terminal
AT_ONCE = 20 * SHEET  # images in memory


@dataclass(frozen=True, kw_only=True)
class Output:
    """Options: what is shown and written."""

    show: str = ""
    """Print this rollout in full, ITERATION.GROUP.ROLLOUT: its tokens with the logprob and entropy
    of each, and its rewards beside those of its group."""
    out: Path | None = None
    """New directory for contact sheets, rollouts.csv and rollouts.json of the chosen rollouts."""
    png: bool = False
    """Also write each image to images/, with --out."""
    device: str = "auto"
    """Device to decode images on: auto (a GPU if there is one), cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        if self.png and self.out is None:
            raise ValueError("--png needs --out, the directory to write to")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Stored rollouts of a run: their rewards, images, tokens and logprobs."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Directory of the run, or its name under runs/."""
    selection: Annotated[Selection, tyro.conf.arg(name="")] = field(default_factory=Selection)
    output: Annotated[Output, tyro.conf.arg(name="")] = field(default_factory=Output)


def run(arguments: list[str] | None = None) -> int:
    """Returns the exit status; FAILED also if no rollout matches."""
    prog = command_of(MODULE)
    arguments = answer_help(arguments, f"{prog} RUN", ABOUT, COMMON, Selection(), Output())
    try:
        given = tyro.cli(Arguments, args=arguments, prog=prog)
    except ValueError as error:  # of a dataclass's own check
        print(f"error: command line: {error}", file=sys.stderr)
        return REFUSED
    return exit_status(lambda: _browse(given), refused=(ConfigError,))


def _browse(given: Arguments) -> None:
    """
    Raises:
        ConfigError: no run, no such figure, or an output directory that is not empty.
        DataError: no rollouts are there, or none matches.
    """
    of, output, chosen = RunDirectory.existing(given.run), given.output, given.selection
    if output.out is not None:
        output = replace(output, out=output_path(output.out, "--out"))
        assert output.out is not None
        check_unused(output.out)
    shown = output.show
    table = read_figures(of, shown.partition(".")[0] if shown else chosen.iterations)
    if shown:
        found = _one(table, shown)
        _print_in_full(of, table, found)
    else:
        found = select(table, chosen)
        if not found.num_rows:
            raise DataError(f"none of {table.num_rows} rollouts matches")
        there = found.num_rows
        found = found.slice(0, chosen.limit or there)
        console = make_console()
        wide = console if console.is_terminal else make_console(width=max(console.width, WIDTH))
        wide.print(table_of(found))
        print(_summary(chosen, found.num_rows, there, table.num_rows))
    if output.out is not None:
        _write(of, found, output, output.out)


def _summary(chosen: Selection, shown: int, matching: int, there: int) -> str:
    order = f", by {chosen.sort}" if chosen.sort else ""
    which = f"of {there} rollouts" if matching == there else f"of {matching} that match, of {there}"
    more = "; --limit 0 shows all" if shown < matching else ""
    return f"{shown} {which}{order}{more}"


def _one(table: pa.Table, name: str) -> pa.Table:
    """The row of a rollout.

    Raises:
        ConfigError: not its name, or no such rollout; says which there are.
    """
    if not re.fullmatch(r"\d+\.\d+\.\d+", name):
        raise ConfigError(f"--show takes ITERATION.GROUP.ROLLOUT, as in 50.3.7, found {name!r}")
    wanted = tuple(int(part) for part in name.split("."))
    places = list(zip(*(table[part].to_pylist() for part in PLACE)))
    if wanted not in places:
        groups, rollouts = (1 + max(place[at] for place in places) for at in (1, 2))
        raise ConfigError(
            f"there is no rollout {name}: iteration {wanted[0]} has groups 0 to {groups - 1} of "
            f"rollouts 0 to {rollouts - 1}"
        )
    return table.slice(places.index(wanted), 1)


def _print_in_full(of: RunDirectory, table: pa.Table, found: pa.Table) -> None:
    (row,) = found.to_pylist()
    of_group = [number == row["group"] for number in table["group"].to_pylist()]
    grid = token_grid(of.read_config())
    lists = rows_with_lists(of, found, ("tokens", "logprobs", "entropies"))
    console = make_console()
    for line in identity_lines(row):
        console.print(line, soft_wrap=True)
    console.print(figures_in_group(table.filter(pa.array(of_group)), row))
    units = {"tokens": "tokens", "logprobs": "logprob, nats", "entropies": "entropy, nats"}
    for name, (values,) in lists.items():
        for line in grid_lines(units[name], values[grid]):
            console.print(line, soft_wrap=True)


def _write(of: RunDirectory, rows: pa.Table, output: Output, out: Path) -> None:
    """Write sheets, images and tables; the table in JSON comes last."""
    config, sheets = of.read_config(), 0
    with locked(out, f"--out {out}"):
        check_unused(out)  # again, now that it is locked
        decoder = RolloutDecoder(config, output.device)
        for first in range(0, rows.num_rows, AT_ONCE):
            part = rows.slice(first, AT_ONCE)
            images = decoder.images(rows_with_lists(of, part)["tokens"])
            sheets += write_sheets(out, part, images, sheets)
            if output.png:
                write_images(out / "images", part, images)
        write_tables(out, rows, of.path)
    print(f"{rows.num_rows} images on {sheets} sheet{'s' * (sheets > 1)}: {out}")
