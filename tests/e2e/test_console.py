"""A console that fails, or cannot show everything, ends no run; a command whose output nobody reads
ends quietly."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import pytest

from learner.run import main
from tests.small_run import flags

NOTE = "WARNING cluster.program.logs: note: the console cannot be written, the run goes on: "


def closed_pipe() -> TextIO:
    read, write = os.pipe()
    os.close(read)
    return open(write, "w")


def full_disk() -> TextIO:
    return open("/dev/full", "w")


def ascii_only() -> TextIO:
    return io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)


CONSOLES: dict[str, tuple[Callable[[], TextIO | None], str]] = {
    "a pipe that nobody reads": (closed_pipe, "Broken pipe"),
    "a full disk": (full_disk, "No space left on device"),
    "none": (lambda: None, "it is closed"),
    "ASCII": (ascii_only, ""),
}


BEYOND = ("a full disk", "none")
"""Slow: test_streams.py writes to them, without a run."""


@pytest.mark.parametrize(
    "console",
    [pytest.param(each, marks=pytest.mark.slow) if each in BEYOND else each for each in CONSOLES],
)
def test_a_run_continues_to_its_end(
    console: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, why = CONSOLES[console]
    stream = make()
    run = tmp_path / "run"
    arguments = [*flags(), "--iterations", "1", "--inline", "--run-dir", str(run)]
    arguments += ["--evaluation.num-images", "20", "--evaluation.cfg-scales"]
    arguments += ["--output.gallery-every", "0"]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        assert main(arguments) == 0
    assert (run / "evaluation.json").is_file()
    assert (run / "checkpoints" / "step_000001" / "manifest.msgpack").is_file()
    assert (run / "report.html").is_file()
    notes = [line for line in (run / "run.log").read_text().splitlines() if NOTE in line]
    assert [line.partition(NOTE)[2] for line in notes] == ([why] if why else [])
    if console == "ASCII":
        assert isinstance(stream, io.TextIOWrapper)
        shown = stream.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]
        assert "FID?" in shown
        assert "everything is in" in shown
    if stream is not None:
        with contextlib.suppress(OSError):
            stream.close()


HELP, LIST = ["learner.run", "--help"], ["actors.weights", "list"]
MORE = [["learner.run", "--help-all"], ["learner.run", "--dry-run", "--inline"], ["learner.plan"]]
FULL = "error: the standard output cannot be written: No space left on device\n"
OUTPUTS = {"": (141, ""), "> /dev/full": (1, FULL), ">&-": (0, "")}
"""Of a command: exit status and errors. The first is a pipe that nobody reads."""


@pytest.mark.parametrize(
    "lines",
    [
        pytest.param((HELP, LIST, HELP), id="each output"),
        *(
            pytest.param((line,) * 3, id=" ".join(line), marks=pytest.mark.slow)
            for line in (HELP, LIST, *MORE)
        ),
    ],
)
def test_a_command_whose_output_nobody_reads_ends_quietly(
    lines: tuple[list[str], ...], tmp_path: Path
) -> None:
    """All of it at once: each takes seconds to start."""
    running = {
        output: subprocess.Popen(
            ["sh", "-c", f'exec "$@" {output}', "sh", sys.executable, "-m", *line],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
        )
        for output, line in zip(OUTPUTS, lines, strict=True)
    }
    pipe = running[""]
    assert pipe.stdout is not None
    pipe.stdout.close()
    errors = {output: process.communicate(timeout=300)[1] for output, process in running.items()}
    assert {o: (running[o].returncode, errors[o]) for o in OUTPUTS} == OUTPUTS
