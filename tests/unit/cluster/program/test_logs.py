"""Where messages go: the console as they are, the run's log with time, level and module."""

from __future__ import annotations

import contextlib
import logging
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from cluster.errors import FleetError
from cluster.program import logs
from cluster.program.console import make_console
from learner import run as command
from learner.monitoring.console import RunConsole

ours = logging.getLogger("cluster.some.module")
LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d{4} (INFO|WARNING|ERROR|CRITICAL) \S+: .*")


@contextmanager
def logging_set_up(path: Path) -> Iterator[StringIO]:
    shown = StringIO()
    console = Console(file=shown, width=40, force_terminal=False)
    with logs.to_console(console), logs.to_file(path):
        yield shown


def test_lines_have_time_level_and_module_and_are_appended(tmp_path: Path) -> None:
    path = tmp_path / "run.log"
    for number in (1, 2):
        with logging_set_up(path) as shown:
            ours.info("resumed %d times", number)
            ours.warning("a worker was lost")
            ours.debug("not heard")
            ours.info("of a table", extra=logs.FILE_ONLY)
        assert shown.getvalue() == f"resumed {number} times\na worker was lost\n"
    lines = path.read_text().splitlines()
    assert all(LINE.fullmatch(line) for line in lines)
    assert [line.split(" ", 2)[2] for line in lines[3:]] == [
        "INFO cluster.some.module: resumed 2 times",
        "WARNING cluster.some.module: a worker was lost",
        "INFO cluster.some.module: of a table",
    ]


@pytest.mark.parametrize("message", ["my [bold]run[/bold]", "[/]", "a :warning: b", "a" * 300])
def test_a_message_is_not_markup_and_not_wrapped(tmp_path: Path, message: str) -> None:
    with logging_set_up(tmp_path / "run.log") as shown:
        ours.info("%s", message)
    assert shown.getvalue() == f"{message}\n"
    assert message in (tmp_path / "run.log").read_text()


def test_others_are_heard_from_warnings_on(tmp_path: Path) -> None:
    other = logging.getLogger("somebody.elses")
    with logging_set_up(tmp_path / "run.log") as shown, warnings.catch_warnings():
        warnings.simplefilter("always")
        other.info("chatter")
        other.warning("deprecated")
        warnings.warn("too hot", stacklevel=1)
    for text in (shown.getvalue(), (tmp_path / "run.log").read_text()):
        assert "chatter" not in text
        assert "deprecated" in text
        assert "UserWarning: too hot" in text


def test_everything_is_undone(tmp_path: Path) -> None:
    def state() -> tuple:
        loggers = [logging.getLogger(name) for name in ("", *logs.PACKAGES)]
        hooks = warnings.showwarning, threading.excepthook
        return hooks, [(each.level, list(each.handlers)) for each in loggers]

    before = state()
    with logging_set_up(tmp_path / "run.log"):
        assert state() != before
    assert state() == before


def test_the_packages_configure_nothing() -> None:
    script = (
        "import logging, threading, warnings\n"
        "def state():\n"
        "    found = map(logging.getLogger, ('', 'actors', 'cluster', 'learner', 'rewards'))\n"
        "    hooks = warnings.showwarning, threading.excepthook, logging._warnings_showwarning\n"
        "    return hooks, [(each.level, each.handlers, each.propagate) for each in found]\n"
        "before = state()\n"
        "import actors.sample, cluster.status, learner.run, rewards.reference\n"
        "assert state() == before, (state(), before)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)


def test_tracebacks_of_bugs_are_in_the_log(tmp_path: Path) -> None:
    path = tmp_path / "run.log"
    with logging_set_up(path) as shown, contextlib.suppress(ZeroDivisionError), logs.to_file(path):
        thread = threading.Thread(target=lambda: [][1], name="uploader")
        thread.start()
        thread.join()
        1 / 0  # noqa: B018
    text = path.read_text()
    assert "unexpected exception in uploader\nTraceback" in text
    assert "IndexError: list index out of range" in text
    assert "CRITICAL cluster.program.logs: unexpected exception\nTraceback" in text
    assert "ZeroDivisionError: division by zero" in text
    assert "ZeroDivisionError" not in shown.getvalue()  # the interpreter shows it


def test_a_log_that_cannot_be_written_is_noted_once_and_ends_nothing(tmp_path: Path) -> None:
    with logging_set_up(Path("/dev/full")) as shown:
        for number in range(3):
            ours.info("message %d", number)
    lines = shown.getvalue().splitlines()
    assert sorted(lines[:2])[0] == "message 0"
    assert [line for line in lines if "/dev/full" in line] == [
        "note: /dev/full cannot be written, the run goes on: OSError: [Errno 28] No space left on "
        "device"
    ]
    assert lines[-1] == "message 2"
    with logging_set_up(tmp_path) as shown:  # a directory
        ours.info("message")
    assert "cannot be written, the run goes on" in shown.getvalue()
    assert shown.getvalue().endswith("message\n")


def test_a_colour_forced_on_a_file_gives_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    console = make_console()
    with logs.to_console(console), logs.to_file(tmp_path / "log"), RunConsole(2, console) as shown:
        shown.start(0)
        shown.update({"iteration": 1, "time/iteration": 1.0, "time/images_per_s": 8.0} | FIGURES)
        shown.table({"base": {"fid": 1.0}})
    for text in (capsys.readouterr().out, (tmp_path / "log").read_text()):
        assert "iteration 1/2" in text
        assert "Held-out judge" in text
        assert "\x1b" not in text


FIGURES = {"fid/ema": 2.0, "policy/entropy": 1.0}


@pytest.mark.parametrize("error", [FleetError("no GPU is free"), KeyError("a bug")])
def test_a_run_that_ends_by_an_error_says_it_in_its_log(
    error: Exception,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = command.RunDirectory(tmp_path / "run")

    @contextmanager
    def failing(*_: object) -> Iterator[None]:
        (made.gallery / "base.png").touch()  # else nothing of it would be kept
        raise error
        yield

    monkeypatch.setattr(command, "open_fleet", failing)
    arguments = ["--inline", "--run-dir", str(made.path)]
    if isinstance(error, FleetError):
        assert command.main(arguments) == 1
        assert "error: no GPU is free" in capsys.readouterr().out
    else:
        with pytest.raises(KeyError):
            command.main(arguments)
    text = made.log.read_text()
    assert "INFO learner.run: starting: every role in this process" in text
    assert ("Traceback" in text) == isinstance(error, KeyError)
    assert ("ERROR learner.run: error: no GPU is free\n" in text) == isinstance(error, FleetError)
