"""Runs that are not where their file says: named in seconds, with how to go on."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from cluster import scale, status, stop
from cluster.control.discovery import (
    LastRunError,
    RunLocation,
    check_alive,
    discovery_file,
    find_run,
    left_behind,
    not_on_cluster_error,
    resume_command,
)
from cluster.errors import FleetError
from cluster.io import user_files
from cluster.io.locks import locked
from cluster.io.processes import Holder, process_lives
from cluster.io.run_layout import DISCOVERY_FILE, OWNER
from cluster.ray_session import session


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a user without runs, on a machine without a cluster."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("RAY_TMPDIR", str(home))
    monkeypatch.setattr(session, "clusters_here", dict)  # other tests may have one
    monkeypatch.setattr(tempfile, "tempdir", str(home))  # notes of runs may be there, too
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    return home


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
    (directory / DISCOVERY_FILE).write_text(json.dumps({**found, **changes}))
    return directory


def test_a_run_says_where_it_is_while_it_runs(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    with discovery_file(tmp_path) as at:
        place = find_run(str(tmp_path), "")
        assert (place.address, place.pid) == ("", os.getpid())
        at("10.0.0.1:6379")
        place = find_run(str(tmp_path), "")
        assert place == RunLocation(
            tmp_path.name,
            "10.0.0.1:6379",
            tmp_path,
            socket.gethostname(),
            os.getpid(),
            str(tmp_path / DISCOVERY_FILE),
        )
    with pytest.raises(FleetError, match=f"no run is active in {tmp_path}: it has ended"):
        find_run(str(tmp_path), "")


def test_a_run_that_was_killed_is_known_by_its_process(tmp_path: Path, gone: int) -> None:
    directory = write(tmp_path / "night", pid=gone)
    with pytest.raises(
        FleetError, match=r"it was killed\. Go on with\n  python -m learner\.run"
    ) as e:
        check_alive(find_run(str(directory), ""))
    assert str(e.value).endswith(f"--resume --run-dir {directory}")


def test_an_evaluation_that_was_killed_says_how_to_continue_it(tmp_path: Path, gone: int) -> None:
    directory = write(tmp_path / "figures", pid=gone, again="python -m learner.evaluate a")
    with pytest.raises(FleetError, match=r"Go on with\n  python -m learner\.evaluate a$"):
        check_alive(find_run(str(directory), ""))


def test_or_by_its_cluster(tmp_path: Path, closed: int) -> None:
    """Its process number may belong to another program by now, or to another machine."""
    for changes in ({}, {"host": "elsewhere"}):
        directory = write(tmp_path / "night", address=f"127.0.0.1:{closed}", **changes)
        place = find_run(str(directory), "")
        message = "it was killed" if not changes else "is on elsewhere, with a Ray that listens"
        with pytest.raises(FleetError, match=message):
            check_alive(place)
    with pytest.raises(FleetError, match=f"no Ray cluster answers at 127.0.0.1:{closed}"):
        check_alive(find_run("night", f"127.0.0.1:{closed}"))


def test_without_a_name_the_newest_that_lives_is_found(
    tmp_path: Path, gone: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(FleetError, match="no run is active under runs or"):
        find_run("", "")
    with pytest.raises(FleetError, match="there is no run 'night' under runs or"):
        find_run("night", "")
    lives = write(tmp_path / "runs" / "lives")
    dead = write(tmp_path / "runs" / "dead", pid=gone)
    os.utime(lives / DISCOVERY_FILE, (1, 1))
    found = find_run("", "").directory
    assert found is not None
    assert found.name == "lives"
    (lives / DISCOVERY_FILE).unlink()
    with pytest.raises(FleetError, match="it was killed"):
        find_run("", "")
    write(tmp_path / "runs" / "one")
    write(tmp_path / "runs" / "two")
    with pytest.raises(FleetError, match=r"several runs are active: .*by its directory") as caught:
        find_run("", "")
    assert "--run runs/one" in str(caught.value)
    assert "--run runs/two" in str(caught.value)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert find_run("night", "") == RunLocation("night", "10.0.0.1:6379", source="$RAY_ADDRESS")
    assert dead.is_dir()


def test_an_unreadable_file_of_an_older_run_hides_no_newer_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    older = tmp_path / "runs" / "older"
    older.mkdir(parents=True)
    with locked(older, "the run directory"):  # its owner lives
        (older / DISCOVERY_FILE).write_text("{")
        for file in older.iterdir():
            os.utime(file, (1e9, 1e9))
        newer = active(tmp_path / "runs" / "newer")
        assert found("").name == newer.name
        with pytest.raises(FleetError, match="cannot be read"):
            find_run(str(older), "")


def test_one_that_hangs_is_not_taken_for_killed(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        directory = write(tmp_path, address=f"127.0.0.1:{listener.getsockname()[1]}")
        place = find_run(str(directory), "")
        with pytest.raises(FleetError, match="says nothing for 3 s"):
            check_alive(place)
    check_alive(RunLocation("night", "auto"))


@pytest.mark.parametrize("command", [scale.main, status.main, stop.main])
def test_every_command_says_so_in_seconds(
    command, tmp_path: Path, gone: int, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, start = write(tmp_path / "night", pid=gone), time.monotonic()
    asked = command is status.main  # how it is; the others cannot do what they are for
    assert command(["--run", str(directory)]) == (0 if asked else 1)
    assert time.monotonic() - start < 10
    told = capsys.readouterr()
    assert (
        told.out.startswith("last run: night, killed") if asked else "error: the run in" in told.err
    )
    assert f"--resume --run-dir {directory}" in told.out + told.err


def test_damaged_files_and_odd_names(tmp_path: Path) -> None:
    first = tmp_path / "runs" / "first"
    first.mkdir(parents=True)
    endless = '{"run": "a", "token_authentication": 0, "pid": 1e999}'
    for damage in ('{"run": 1', "", "[" * 100_000, endless):  # a power cut leaves an empty one
        (first / DISCOVERY_FILE).write_text(damage)
        with locked(first, "x"), pytest.raises(FleetError, match="cannot be read"):
            find_run(str(first), "")
        with pytest.raises(LastRunError, match="it has ended"):
            find_run(str(first), "")
    with pytest.raises(FleetError, match=r"there is no directory \.\./other"):
        find_run("../other", "")


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


def active(directory: Path, **changes: object) -> Path:
    """The directory of a run that this process drives."""
    write(directory, **changes)
    (directory / "config.yaml").touch()
    user_files.record_run(directory)
    return directory


def ended(directory: Path, *steps: int) -> Path:
    (active(directory) / DISCOVERY_FILE).unlink()
    for step in steps:
        (directory / "checkpoints" / f"step_{step:06d}").mkdir(parents=True)
    return directory


def found(run: str) -> Path:
    place = find_run(run, "")
    assert place.directory is not None
    return place.directory


def test_a_run_is_found_by_name_wherever_its_directory_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--run-dir /shared/runs/first`, then `cluster.scale --run first` from another shell."""
    with discovery_file(tmp_path / "shared" / "runs" / "first") as at:
        at("10.0.0.1:6379")
        elsewhere = tmp_path / "elsewhere"
        (elsewhere / "first").mkdir(parents=True)  # a folder of the name that holds no run
        monkeypatch.chdir(elsewhere)
        assert find_run("first", "").address == "10.0.0.1:6379"
        assert found("") == tmp_path / "shared" / "runs" / "first"


def test_a_name_that_several_active_runs_have_is_not_guessed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: int
) -> None:
    monkeypatch.chdir(tmp_path)
    places = [active(tmp_path / folder / "first") for folder in ("my shared", "b")]
    active(tmp_path / "killed" / "first", pid=gone)
    with pytest.raises(FleetError, match="several runs named 'first' are active") as error:
        find_run("first", "")
    assert f"--run '{places[0]}'" in str(error.value)  # with a blank in it
    assert f"--run {places[1]}" in str(error.value)
    assert "killed" not in str(error.value)
    assert found(str(places[1])) == places[1]
    with pytest.raises(FleetError, match="several runs are active: choose one"):
        find_run("", "")
    here = active(tmp_path / "runs" / "here")
    assert found("").resolve() == here


def test_a_name_under_runs_and_remembered_is_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    directory = active(tmp_path / "runs" / "first")
    assert found("first").resolve() == directory


def test_after_an_end_the_last_run_is_named_with_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ended(tmp_path / "before")
    last = ended(tmp_path / "my last", 2, 10)
    os.utime(tmp_path / "before" / "config.yaml", (1, 1))
    for run in ("my last", str(last), ""):
        with pytest.raises(FleetError, match="has ended; newest checkpoint: step_000010") as error:
            find_run(run, "")
        assert str(error.value).endswith(f"--resume --run-dir '{last}'")
    with pytest.raises(FleetError, match="newest checkpoint: none yet"):
        find_run("before", "")
    (last / "report.html").touch()
    with pytest.raises(FleetError, match=r"has ended, and left .*report\.html"):
        find_run("my last", "")


def test_a_cluster_without_the_run_is_reported_with_what_ended(tmp_path: Path) -> None:
    """The cluster outlives its runs; a run that lives, on another one, is no end."""
    error = FleetError("no run named 'first' on this cluster: no run is active there")
    assert not_on_cluster_error("first", error) is error
    directory = ended(tmp_path / "first", 4)
    assert str(not_on_cluster_error("first", error)).startswith(
        f"{error}; no run is active in {directory}"
    )
    assert "newest checkpoint: step_000004" in str(not_on_cluster_error("", error))
    assert not_on_cluster_error("second", error) is error
    active(directory)
    assert not_on_cluster_error("first", error) is error


def test_a_run_in_one_process_has_no_fleet(tmp_path: Path) -> None:
    ended(tmp_path / "first")
    with (
        locked(tmp_path / "first", "the run directory"),
        pytest.raises(FleetError, match=rf"one process \(--inline\).*process {os.getpid()} on"),
    ):
        find_run("first", "")


def test_a_directory_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(FleetError, match="holds no run"):
        find_run(str(tmp_path / "home"), "")


def test_a_process_number_that_went_to_another_program(tmp_path: Path) -> None:
    """Killed, though a process of that number lives: the lock says when its owner began."""
    directory = active(tmp_path / "first")
    mine = Holder.this_process()
    earlier = Holder(**{**asdict(mine), "started": "1"})
    (directory / OWNER).write_bytes(earlier.to_bytes())
    with pytest.raises(FleetError, match="it was killed"):
        check_alive(find_run(str(directory), ""))
    (directory / OWNER).write_bytes(mine.to_bytes())
    with pytest.raises(FleetError, match="it was killed"):
        check_alive(find_run(str(directory), ""))  # its port is closed


@pytest.mark.parametrize("command", [scale.main, status.main, stop.main])
def test_no_ray_is_started_to_look_for_a_run(
    command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--address local` started a Ray of the command's own, and asked that for the run."""
    monkeypatch.chdir(tmp_path)
    start = time.monotonic()
    for run in ("", "first"):
        assert command(["--address", "local", "--run", run]) == 1
        assert "--address is 'local', which no other command can reach" in capsys.readouterr().err
        assert command(["--address", " ", "--run", run]) == 1  # as if it were left out
        assert "under runs or" in capsys.readouterr().err
    assert command(["--address", "auto"]) == 1
    assert "leave out --address to have the run looked for" in capsys.readouterr().err
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("name", ["my run", "it's", "-x", "$(rm x)", "a;b", "[bold]x", "Ünï"])
def test_commands_to_go_on_are_quoted_for_a_shell(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = shlex.split(resume_command(tmp_path / name))
    assert words[-2:] == ["--run-dir", str(tmp_path / name)]
    assert shlex.split(resume_command(Path(name))) == words  # it works from anywhere


def test_a_run_that_starts_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = active(tmp_path / "[bold]first", address="")
    assert status.main(["--run", str(directory)]) == 0
    shown = capsys.readouterr().out
    assert f"run [bold]first: starting  {directory}" in shown.splitlines()
    assert "its workers are not there yet" in shown
    assert status.main(["--run", "[bold]first", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["stage"], found["run"]) == ("starting", "[bold]first")
    assert found["directory"] == str(directory)
    for command in (scale, stop):
        assert command.main(["--run", str(directory)]) == 1
        assert f"is starting (process {os.getpid()}" in capsys.readouterr().err


def test_watching_a_start_ends_with_the_run(
    tmp_path: Path, gone: int, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = active(tmp_path / "first", address="")
    timer = threading.Timer(0.5, lambda: write(directory, address="", pid=gone))
    timer.start()
    assert status.main(["--run", str(directory), "--watch", "0.1", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {line["stage"] for line in lines[:-1]} == {"starting"}
    assert lines[-1]["stage"] == "killed"
    assert lines[-1]["resume"] == resume_command(directory)


def test_runs_are_remembered_where_the_user_may_write(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setenv("HOME", "/proc/nowhere")
    directory = active(tmp_path / "first")
    assert user_files.recorded_runs() == [directory]
    (private,) = temporary.iterdir()
    assert private.stat().st_mode & 0o777 == 0o700
    private.chmod(0o777)  # anybody could have put something there
    assert user_files.recorded_runs() == []


def test_no_place_to_remember_a_run_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/proc/nowhere")
    monkeypatch.setenv("HOME", "/proc/nowhere")
    user_files.record_run(tmp_path)
    assert "found by its directory, but not by its name" in caplog.text


def test_only_the_newest_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user_files, "MAX_RECORDS", 3)
    for number in range(5):
        user_files.record_run(active(tmp_path / f"run{number}"))
        time.sleep(0.02)
    names = [path.name for path in user_files.recorded_runs()]
    assert names == ["run4", "run3", "run2"]
    (tmp_path / "run3").rename(tmp_path / "moved")
    assert [path.name for path in user_files.recorded_runs()] == ["run4", "run2"]
