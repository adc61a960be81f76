"""Streams that fail, in this process."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import sys
from pathlib import Path
from typing import TextIO

import msgpack
import pyarrow as pa
import pytest

from cluster.program.console import make_console
from cluster.program.logs import to_console
from cluster.program.streams import console_failure, printable, safe_streams


class Failing(io.StringIO):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error


def broken() -> Failing:
    return Failing(BrokenPipeError(32, "Broken pipe"))


@pytest.mark.parametrize(
    "stream",
    [
        broken(),
        Failing(OSError(28, "No space left on device")),
        Failing(ValueError("closed")),
        None,
    ],
)
def test_what_continues_is_not_ended(
    stream: TextIO | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", stream)
    with safe_streams(output_is_all=False):
        print("one", flush=True)
        make_console().print("two")
        assert console_failure()
        with safe_streams(output_is_all=False):
            assert console_failure()
            print("three")
    assert sys.stdout is stream


@pytest.mark.parametrize(
    ("error", "status"), [(BrokenPipeError(32, "gone"), 141), (OSError(28, "full"), 1)]
)
def test_what_nobody_needs_is_ended(
    error: OSError,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdout", Failing(error))
    with pytest.raises(SystemExit) as ended, safe_streams(output_is_all=True):
        make_console().print("one")
    assert ended.value.code == status
    assert capsys.readouterr().err.count("cannot be written: full") == (status == 1)


@pytest.mark.parametrize("goes_on", [False, True])
def test_a_message_that_cannot_be_shown_ends_no_work(
    goes_on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `--auto-resume` has before the run, and `fetch` before the download."""
    monkeypatch.setattr(sys, "stdout", Failing(OSError(28, "full")))
    done: list[str] = []

    def command() -> None:
        with safe_streams(output_is_all=True), to_console(make_console()):
            for what in ("begun", "gone on"):
                logging.getLogger("learner").info("starting")
                done.append(what)
            with safe_streams(output_is_all=False) if goes_on else contextlib.nullcontext():
                done.append(console_failure())
                print("the run")
            done.append("ended")

    if goes_on:  # a run
        command()
    else:
        with pytest.raises(SystemExit) as ended:
            command()
        assert ended.value.code == 1
    assert done == ["begun", "gone on", "full", "ended"][: 4 if goes_on else 3]


def test_a_failure_that_comes_with_the_last_flush_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    class Late(io.StringIO):
        def flush(self) -> None:
            raise BrokenPipeError(32, "gone")

    def shows_help() -> None:
        print("--help")
        raise SystemExit(0)

    monkeypatch.setattr(sys, "stdout", Late())
    with pytest.raises(SystemExit) as ended, safe_streams(output_is_all=True):
        shows_help()
    assert ended.value.code == 141


def test_a_handler_that_writes_within_a_write_loses_its_line_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = Failing(RuntimeError("reentrant call"))
    monkeypatch.setattr(sys, "stdout", stream)
    with safe_streams(output_is_all=False):
        print("stopping")
        assert not console_failure()


@pytest.mark.parametrize("text", ["FID↓", "caf\udce9.png", "mosaïque"])
def test_what_is_not_in_the_encoding_is_replaced(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    with safe_streams(output_is_all=True):
        print(text)
    shown = stream.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]
    assert len(shown) == len(text) + 1
    assert "?" in shown


@pytest.mark.parametrize("name", [b"caf\xe9.png", b"\xff\xfe", b"plain", "mosaïque ↓".encode()])
def test_printable_text_goes_into_every_file(name: bytes, tmp_path: Path) -> None:
    found = os.fsdecode(name)
    text = printable(found)
    pa.array([text])
    assert msgpack.unpackb(msgpack.packb(text)) == text
    assert json.loads(json.dumps(text, ensure_ascii=False).encode()) == text
    (tmp_path / "file").write_text(text, encoding="utf-8")
    assert (text == found) == (name.decode(errors="replace") == found)
