"""What a run shows: the live table at every size, its cost, and the lines without a terminal."""

from __future__ import annotations

import io
import logging
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from fcntl import ioctl
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cluster.program import logs
from cluster.program.console import make_console
from learner.monitoring.console import COLUMNS, RunConsole
from learner.monitoring.live import POINTS, Curve, LiveTable, Pace, duration
from learner.monitoring.timeline import RoleUse

ROOT = Path(__file__).parents[4]
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
SHARES = [RoleUse("learner", 1, 0.9), RoleUse("reward-server", 2, 0.25), RoleUse("driver", 1, 0.1)]


def row(iteration: int) -> dict[str, Any]:
    return {
        "iteration": iteration,
        "time/iteration": 0.5,
        "time/images_per_s": 320.0,
        "reward/clip": 0.4 + iteration / 100,
        "reward/loo_fid": 0.1,
        "fid/ema": 9.0 - iteration / 10,
        "policy/entropy": 2.5,
        "policy/entropy_coef": 0.0,
        "policy/mismatch_kl": 1e-9,
        "policy/clip_fraction": None,
    }


def terminal(width: int, height: int = 30) -> Console:
    file = io.StringIO()
    return Console(file=file, force_terminal=True, width=width, height=height, color_system=None)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def frame(width: int, height: int = 30) -> list[str]:
    """The table after ten of two hundred iterations."""
    console = terminal(width, height)
    with RunConsole(200) as run:
        run.start(0)
        for iteration in range(1, 11):
            run.roles(SHARES)
            run.update(row(iteration))
        run.evaluated(10, {"fid": 3.21, "recall": 0.4, "unknown": 1.0})
        logging.getLogger("learner").warning("note: something")
        console.print(run._table)
    return shown(console).splitlines()


@pytest.mark.parametrize("width", [20, 40, 60, 80, 120])
def test_the_live_table_fits_a_terminal(width: int) -> None:
    lines = frame(width)
    assert max(map(len, lines)) <= width
    assert lines[0].startswith("iteration 10/200")
    names = [line.split()[0] for line in lines[4:-3]]
    assert names == ["clip", "FID,", "entropy"]  # not what has been 0 so far
    assert ("change" in lines[3]) == (width >= 60)
    assert ("█" in "".join(lines[4:])) == (width >= 80)


def test_the_live_table_says_how_the_run_goes() -> None:
    text = "\n".join(frame(80))
    assert re.search(r"iteration 10/200  █+░+  5%  0:01:35 left", text)
    assert "0.5 s/iteration  320 images/s" in text
    assert "1 warning" in text
    assert re.search(r"clip +0.5 +0.41 +\+0.09  ▁▂.*█\n", text)
    assert "idle: learner 10%  reward 75%  driver 90%" in text
    assert "evaluation after 10: FID↓ 3.21  recall↑ 0.4\n" in text + "\n"
    assert len(frame(80, height=6)) == 2  # a terminal of few lines
    console = terminal(80)
    console.print(LiveTable(200, Pace(200)))  # before the first iteration
    first, second = filter(None, shown(console).splitlines())
    assert re.fullmatch(r"iteration 0/200  ░+  0%  \? left", first)
    assert second == "0:00:00 so far"


def test_further_feature_spaces_have_a_row_and_a_word(logged: list[str]) -> None:
    """The mean of their rewards says as little as that of loo_fid."""
    console, metrics = terminal(120), row(1) | {"reward/loo_fid/clip": 0.1, "fid/clip/ema": 4.25,
                                                "fid/clip/batch": 5.0}  # fmt: skip
    with RunConsole(200, console) as run:
        run.start(0)
        run.update(metrics)
        console.print(run._table)
    lines = shown(console).splitlines()
    names = [line[:14].strip() for line in lines if "4.25" in line or "8.9" in line]
    assert {"FID, clip", "FID, history"} <= {*names}
    assert "loo_fid" not in shown(console)
    assert any("FID clip 4.25  FID 8.9" in line for line in logged)


def test_it_is_redrawn_a_few_times_a_second_whatever_happens() -> None:
    console, start = terminal(80), time.monotonic()
    with RunConsole(5000, console) as run:
        run.start(0)
        for iteration in range(1, 3001):
            run.update(row(iteration))
    drawn = shown(console).count("/5000")
    assert 1 <= drawn <= 4 + 2 * (time.monotonic() - start)
    assert "iteration 3000/5000" in shown(console)


def test_what_follows_appears_below() -> None:
    console = terminal(80)
    with RunConsole(4, console) as run, logs.to_console(console):
        run.start(2, [row(1), row(2)])
        run.update(row(3))
        run.stop()
        run.start(2, [row(1), row(2)])  # as after the learner was lost
        run.update(row(3))
        run.stop()
        run.table({"base": {"fid": 1.0}})
    text = ESCAPE.sub("", shown(console))
    assert text.rindex("Held-out judge") > text.rindex("iteration 3/4")
    assert re.search(r"clip +0.43 +0.41", text)  # the start is the run's, not this process's


@pytest.mark.parametrize("term", ["xterm", "dumb", "unknown"])
def test_without_a_terminal_there_is_a_line_an_iteration(
    term: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file, `ray job submit`, an editor's shell."""
    monkeypatch.setenv("TERM", term)
    console = make_console()
    with logs.to_console(console), RunConsole(3, console) as run:
        run.start(0)
        for iteration in (1, 2, 3):
            run.update(row(iteration))
        run.evaluated(3, {"fid": 3.0})
    assert capsys.readouterr().out.splitlines() == [
        "iteration 1/3  clip 0.41  FID 8.9  entropy 2.5  img/s 320  0:00:01 left",
        "iteration 2/3  clip 0.42  FID 8.8  entropy 2.5  img/s 320  0:00:00 left",
        "iteration 3/3  clip 0.43  FID 8.7  entropy 2.5  img/s 320",
        "evaluation after 3: FID↓ 3",
    ]


TERMINAL = """
import signal, sys, time
from learner.monitoring.console import COLUMNS, RunConsole
from tests.unit.learner.monitoring.test_console import row
signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background inherit SIG_IGN
try:
    with RunConsole(10_000) as run:
        run.start(0)
        for iteration in range(1, 10_000):  # longer than the slowest machine's test
            run.update(row(iteration))
            time.sleep(0.1)
except KeyboardInterrupt:
    print("stopped")
"""


def test_a_real_terminal_that_is_resized_and_interrupted() -> None:
    ours, theirs = pty.openpty()
    set_width(theirs, 100)
    environment = os.environ | {"TERM": "xterm-256color", "NO_COLOR": "1"}
    environment.pop("COLUMNS", None)
    process = subprocess.Popen(
        [sys.executable, "-c", TERMINAL],
        stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT, env=environment,
        start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    try:
        wide = read_until(ours, "images/s", 60)
        assert max(map(len, ESCAPE.sub("", wide).split("\r\n"))) > 60
        set_width(ours, 40)
        read_until(ours, "images/s", 60)
        narrow = read_until(ours, "images/s", 60)
        process.send_signal(2)
        end = read_until(ours, "stopped", 60)
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert "iteration" in narrow
    assert max(map(len, ESCAPE.sub("", narrow).split("\r\n"))) <= 40
    assert "\x1b[?25h" in end  # the cursor is back
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", wide + narrow + end)  # NO_COLOR


def set_width(descriptor: int, columns: int) -> None:
    ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))


def read_until(descriptor: int, text: str, seconds: float) -> str:
    """What a terminal shows up to the first line with `text`."""
    found, deadline = "", time.monotonic() + seconds
    while text not in found:
        assert time.monotonic() < deadline, found
        if select.select([descriptor], [], [], 0.1)[0]:
            try:
                found += os.read(descriptor, 65536).decode(errors="replace")
            except OSError:  # EIO: the process ended, and its terminal with it
                assert text in found, found
    return found


def test_the_table_has_the_figures_that_the_judge_has() -> None:
    """The miniature's is the same as ever."""
    figures = dict.fromkeys(COLUMNS.values(), 1.0)
    inception = {"fid": 3.0, "sfid": 5.0, "inception_score": 180.0, "hps": 0.27125}
    told: list[str] = []
    for rows in ({"base": figures}, {"base": inception, "tuned": {"fid": 2.0}}):
        console = Console(file=io.StringIO(), width=80, force_terminal=False)
        with RunConsole(1, console) as run, logs.to_console(console):
            run.table(rows)
        told.append(shown(console))
    ours, theirs = told
    assert [word for word in ours.splitlines()[2].split() if word != "policy"] == list(COLUMNS)
    assert ours.endswith(
        """
  FID, density, coverage, precision, recall: against held-out images, in the judge's
  features; class: share that the judge's classifier puts in the requested class;
  CLIP: a second CLIP, never rewarded; entr.: mean token entropy, nats
"""
    )
    assert theirs.splitlines()[2].split() == ["policy", "FID↓", "sFID↓", "IS↑", "HPS↑"]
    assert "3.00   5.00  180.00  0.2712" in theirs
    assert "2.00      -       -       -" in theirs
    assert "spatial features; IS: Inception Score; HPS" in theirs


def test_the_time_left_is_not_jolted_by_one_evaluation() -> None:
    pace = Pace(1000)
    assert (pace.seconds, pace.left(0)) == (0.0, "?")
    for _ in range(199):
        pace.add(1.0, 100.0)
    pace.add(60.0, 2.0)
    assert pace.left(200) == duration(800 * 259 / 200)
    assert pace.seconds == pytest.approx(79 / 20)
    assert duration(90061) == "1 day, 1:01:01"


def test_a_curve_keeps_the_whole_run_in_few_points() -> None:
    curve = Curve()
    for value in range(100_000):
        curve.add(float(value))
    assert (curve.first, curve.last) == (0.0, 99_999.0)
    drawn = curve.drawn(200)
    assert POINTS <= len(drawn) <= 2 * POINTS
    assert (drawn[0], drawn[-1]) == ("▁", "█")
    assert list(drawn) == sorted(drawn)
    assert len(curve.drawn(12)) == 12
    assert Curve().drawn(5) == ""
