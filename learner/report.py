"""The report of a run, or of several side by side: one HTML page without other files.

python -m learner.report runs/NAME               writes runs/NAME/report.html
python -m learner.report --compare runs/A runs/B     writes comparison.html

A run writes its report itself when it ends, stops or fails; the command is for a killed run, for
one of an earlier version, and for a look at an active one.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    import sys

    from cluster.program.start import run_command

    sys.exit(run_command("learner.report"))

import logging
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from cluster.errors import ConfigError, LockHeldError, LockLostError, TesseraError
from cluster.io.files import AGAIN, replacing, writing
from cluster.io.locks import acquire, locked_file, owner_of
from cluster.io.paths import default_root, output_path
from cluster.io.run_layout import CONFIG, OWNER, REPORT
from cluster.io.starts import Ending
from cluster.program import logs
from cluster.program.console import FAILED, REFUSED, make_console
from cluster.program.invocation import command_of
from cluster.program.streams import printable
from learner.reports.extremes import AT_END, AT_STOP, BY_COMMAND, Decoding
from learner.reports.page import render
from learner.runs.run_dir import RunDirectory
from learner.runs.starts import record_end

logger = logging.getLogger(__name__)

MODULE = "learner.report"
COMPARISON = "comparison.html"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Write the report of a run: one HTML page without other files.

    A run writes its own when it ends, stops or fails. This command is for a killed run, for one of
    an earlier version, and for a look at an active one.
    """

    run: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="RUN")]] = ""
    """A run's directory, or its name under runs/; by default the newest there."""
    compare: tuple[str, ...] = ()
    """Runs side by side on one page: curves over each other, tables, differences of their
    configurations."""
    out: str = ""
    """The page's file. By default RUN/report.html; of an active run NAME-report.html, and of
    several comparison.html, in the working directory."""


def write_report(run: RunDirectory, decoding: Decoding = AT_END) -> None:
    """Write `report.html` from what is in the run's directory. For the process that owns it.

    Raises:
        LockLostError: another process took it over.
        StorageError: the page cannot be written.
    """
    page = render([run], decoding)
    run.check_owned()
    _write(page, run.report)


def note_end(run: RunDirectory, how: Ending, detail: str = "") -> None:
    """Record how a run ended; what fails is a note, since the run's own end matters more."""
    try:
        record_end(run, how, detail)
    except Exception as error:
        logger.warning(f"note: the end of the run was not recorded ({error})")


def conclude(run: RunDirectory, how: Ending, detail: str = "", *, report: bool = True) -> bool:
    """Record how a run ended, and write its report if it kept anything; returns whether it was
    written. Neither hides the run's own error: what fails here is a note.

    Args:
        detail: the error of a run that failed.

    Raises:
        LockLostError: the directory of a run that finished is another process's now.
    """
    try:
        record_end(run, how, detail)
        if not report or not run.has_results():
            return False
        write_report(run, AT_END if how == "finished" else AT_STOP)
        if how != "finished":
            logger.info(f"report:  {run.report}")
    except Exception as error:
        if how == "finished" and isinstance(error, LockLostError):
            raise
        again = f"{command_of(MODULE)} {shlex.quote(str(run.path))}"
        logger.warning(f"note: the report was not written ({error}); `{again}` writes it")
        return False
    return True


def _write(page: str, path: Path) -> None:
    with writing(path, then=AGAIN), replacing(path) as partial:
        partial.write_text(page, encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    with logs.to_console(make_console()):
        parsed = tyro.cli(Arguments, args=arguments, prog=command_of(MODULE))
        try:
            names = [*([parsed.run] if parsed.run else []), *parsed.compare]
            runs = [RunDirectory.existing(name) for name in names] or [newest()]
            if parsed.compare and len(runs) < 2:
                raise ConfigError("--compare needs two runs or more")
            return _report(runs, parsed.out)
        except (ConfigError, LockHeldError) as error:
            print(f"error: {error}", file=sys.stderr)
            return REFUSED
        except (TesseraError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return FAILED


def _report(runs: list[RunDirectory], out: str) -> int:
    run = runs[0]
    if out:
        file = output_path(out, "--out")
    elif len(runs) > 1:
        file = output_path(COMPARISON, "--out")
    elif owner := owner_of(run.path):
        file = output_path(f"{run.path.name}-{REPORT}", "--out")
        logger.info(f"the run is active ({owner}), and writes its own report when it ends")
    else:
        file = run.report
    if file.is_dir():
        raise ConfigError(f"--out {file} is a directory: name a file")
    if file.resolve() == run.report.resolve():
        page = render(runs, BY_COMMAND)  # before this process is the directory's owner
        with acquire(run.path / OWNER, f"the run directory {run.path}"):
            _write(page, file)
    else:
        with locked_file(file, f"--out {file}"):
            _write(render(runs, BY_COMMAND), file)
    logger.info(f"report:  {printable(file.absolute())}")
    return 0


def newest() -> RunDirectory:
    """The newest run under runs/.

    Raises:
        ConfigError: there is none.
    """
    files = sorted(default_root().glob(f"*/{CONFIG}"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise ConfigError(f"name a run: there is none under {default_root()}")
    return RunDirectory(files[-1].parent)
