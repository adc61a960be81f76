"""What commands show: control codes on terminals alone, names as they are."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from rich.table import Table

from cluster import status
from cluster.program.console import make_console, progress_bar

ROOT = Path(__file__).parents[4]
SHOW = """
from cluster.program.console import progress_bar, make_console
make_console().print("[bold]name[/bold] :smile: 'a' 1")
with progress_bar("[red]task", 2, "images") as advance:
    advance(1), advance(1)
print(make_console().is_terminal)
"""


def on_terminal(**variables: str) -> str:
    """What a terminal gets of `SHOW`."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": "80", **variables}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen(
        [sys.executable, "-c", SHOW], cwd=ROOT, env=environment, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    text = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # the other side was closed
            part = b""
        if not part:
            break
        text += part
    os.close(ours)
    assert process.wait(60) == 0
    return text.decode()


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"])
def test_a_file_gets_lines_whatever_the_environment_says(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "1")
    monkeypatch.setattr(sys, "stdout", out := io.StringIO())
    monkeypatch.setattr(sys, "stderr", error := io.StringIO())
    table = Table(title="[bold]title")
    table.add_column("[bold]head")
    table.add_row("[/] :smile: [link=x]")
    make_console().print(table)
    status.console().print("[bold]run")
    with progress_bar("[red]task", 2, "images") as advance:
        advance(1)
        advance(1)
    assert "\x1b" not in out.getvalue() + error.getvalue()
    for text in ("[bold]title", "[bold]head", "[/] :smile: [link=x]", "[bold]run"):
        assert text in out.getvalue()
    assert "[red]task 2/2" in error.getvalue()


def test_a_terminal_that_cannot_move_its_cursor_gets_lines() -> None:
    text = on_terminal(TERM="dumb")
    assert "\x1b" not in text
    assert "[red]task 2/2" in text
    assert "False" in text


def test_a_terminal_gets_a_bar_and_names_as_they_are() -> None:
    text = on_terminal(TERM="xterm")
    assert "[bold]name[/bold] :smile: 'a' 1" in text
    assert "\x1b[" in text
    assert "[red]task" in text
    assert "True" in text


def test_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert status.console().width == status.WIDTH
    monkeypatch.setenv("COLUMNS", "60")
    assert status.console().width == 60
    for odd in ("0", "-3", "many"):
        monkeypatch.setenv("COLUMNS", odd)
        assert status.console().width >= status.WIDTH
