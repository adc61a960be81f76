"""Runs that are not where their file says: named in seconds, with how to go on."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster import scale, status, stop
from cluster.errors import FleetError
from cluster.processes import process_lives
from cluster.whereabouts import (
    WHEREABOUTS,
    Place,
    announced,
    check_alive,
    left_behind,
    locate_run,
)


@pytest.fixture
def gone() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait(30)
    return process.pid


@pytest.fixture
def closed() -> int:
    """A port that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def write(directory: Path, **changes: object) -> Path:
    found = {
        "run": directory.name,
        "address": "127.0.0.1:1",
        "token_authentication": False,
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / WHEREABOUTS).write_text(json.dumps({**found, **changes}))
    return directory


def test_a_run_says_where_it_is_while_it_runs(tmp_path: Path) -> None:
    with announced(tmp_path, "10.0.0.1:6379"):
        place = locate_run(str(tmp_path), "")
        assert place == Place(
            tmp_path.name,
            "10.0.0.1:6379",
            tmp_path,
            socket.gethostname(),
            os.getpid(),
            str(tmp_path / WHEREABOUTS),
        )
    with pytest.raises(FleetError, match=f"no run is active in {tmp_path}: it has ended"):
        locate_run(str(tmp_path), "")


def test_a_run_that_was_killed_is_known_by_its_process(tmp_path: Path, gone: int) -> None:
    directory = write(tmp_path / "night", pid=gone)
    with pytest.raises(
        FleetError, match=r"it was killed\. Go on with\n  python -m learner\.run"
    ) as e:
        check_alive(locate_run(str(directory), ""))
    assert str(e.value).endswith(f"--resume --run-dir {directory}")


def test_or_by_its_cluster(tmp_path: Path, closed: int) -> None:
    """Its process number may belong to another program by now, or to another machine."""
    for changes in ({}, {"host": "elsewhere"}):
        directory = write(tmp_path / "night", address=f"127.0.0.1:{closed}", **changes)
        place = locate_run(str(directory), "")
        message = "it was killed" if not changes else "is on elsewhere, with a Ray that listens"
        with pytest.raises(FleetError, match=message):
            check_alive(place)
    with pytest.raises(FleetError, match=f"no Ray cluster answers at 127.0.0.1:{closed}"):
        check_alive(locate_run("night", f"127.0.0.1:{closed}"))


def test_without_a_name_the_newest_that_lives_is_found(
    tmp_path: Path, gone: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(FleetError, match="no run is active under runs or"):
        locate_run("", "")
    with pytest.raises(FleetError, match="there is no run 'night' under runs or"):
        locate_run("night", "")
    lives = write(tmp_path / "runs" / "lives")
    dead = write(tmp_path / "runs" / "dead", pid=gone)
    os.utime(lives / WHEREABOUTS, (1, 1))
    found = locate_run("", "").directory
    assert found is not None
    assert found.name == "lives"
    (lives / WHEREABOUTS).unlink()
    with pytest.raises(FleetError, match="it was killed"):
        locate_run("", "")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert locate_run("night", "") == Place("night", "10.0.0.1:6379", source="$RAY_ADDRESS")
    assert dead.is_dir()


def test_one_that_hangs_is_not_taken_for_killed(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        directory = write(tmp_path, address=f"127.0.0.1:{listener.getsockname()[1]}")
        place = locate_run(str(directory), "")
        with pytest.raises(FleetError, match="says nothing for 3 s"):
            check_alive(place)
    check_alive(Place("night", "auto"))


@pytest.mark.parametrize("command", [scale.main, status.main, stop.main])
def test_every_command_says_so_in_seconds(
    command, tmp_path: Path, gone: int, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, start = write(tmp_path / "night", pid=gone), time.monotonic()
    assert command(["--run", str(directory)]) == 1
    assert time.monotonic() - start < 10
    error = capsys.readouterr().err
    assert "error: the run in" in error
    assert f"--resume --run-dir {directory}" in error


def test_damaged_files_and_odd_names(tmp_path: Path) -> None:
    (tmp_path / WHEREABOUTS).write_text('{"run": 1')
    with pytest.raises(FleetError, match="cannot be read"):
        locate_run(str(tmp_path), "")
    with pytest.raises(FleetError, match=r"there is no directory \.\./other"):
        locate_run("../other", "")


def test_what_is_left(tmp_path: Path) -> None:
    assert left_behind(tmp_path)["checkpoint"] == ""
    for step in (2, 10):
        (tmp_path / "checkpoints" / f"step_{step:06d}").mkdir(parents=True)
    assert left_behind(tmp_path)["checkpoint"].endswith("step_000010")


def test_processes(gone: int) -> None:
    assert process_lives(os.getpid())
    assert not process_lives(gone)
    zombie = subprocess.Popen([sys.executable, "-c", ""])
    deadline = time.monotonic() + 30
    while process_lives(zombie.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not process_lives(zombie.pid)  # though nobody has waited for it
    zombie.wait()
