"""One owner at a time: of a live, dead, far or suspended process; and takeovers by many at once."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from cluster.errors import LockHeldError, LockLostError
from cluster.io import locks
from cluster.io.locks import LockState, acquire, lock_verdict, locked, owner_of, read_lock
from cluster.io.processes import Holder, process_start, this_machine
from cluster.io.run_layout import OWNER

WAIT_S = 60.0
OWNING = """
import sys, time
from pathlib import Path
from cluster.errors import LockHeldError
from cluster.io.locks import OWNER, acquire
while not Path(sys.argv[2]).exists():
    time.sleep(0.001)
try:
    lock = acquire(Path(sys.argv[1]) / OWNER, "it", run="A")
except LockHeldError as error:
    print("refused", error, flush=True)
else:
    print("owns", flush=True)
    sys.stdin.readline()
    lock.release()
"""


def contents(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def start(directory: Path, go: Path) -> subprocess.Popen[str]:
    line = [sys.executable, "-c", OWNING, str(directory), str(go)]
    return subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """A directory that another process owns."""
    directory, go = tmp_path / "run", tmp_path / "go"
    directory.mkdir()
    go.touch()
    process = start(directory, go)
    assert process.stdout is not None
    assert process.stdout.readline() == "owns\n"
    yield directory, process
    process.kill()
    process.wait(WAIT_S)


def far(path: Path, age_s: float, **changes: object) -> Holder:
    """A lock of a process on another machine, not renewed for so long."""
    holder = replace(Holder.this_process(), host="node7", machine="other", pid=1, **changes)
    path.write_bytes(holder.to_bytes())
    then = time.time() - age_s
    os.utime(path, (then, then))
    return holder


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "BEAT_S", 0.05)
    monkeypatch.setattr(locks, "WATCH_S", 0.3)
    monkeypatch.setattr(locks, "STALE_S", 1.0)
    monkeypatch.setattr(locks, "POLL_S", 0.02)


def test_a_live_owner_is_named_and_nothing_is_touched(owner: tuple) -> None:
    directory, process = owner
    before = contents(directory), (directory / OWNER).read_bytes()
    with pytest.raises(LockHeldError) as caught:
        acquire(directory / OWNER, "the run directory A", "python -m cluster.stop --run A")
    said = str(caught.value)
    assert f"in use by process {process.pid} on {socket.gethostname()} (run A), since 20" in said
    assert "last heartbeat 0 s ago" in said
    assert f"Stop it with `python -m cluster.stop --run A` or `kill {process.pid}`" in said
    assert (contents(directory), (directory / OWNER).read_bytes()) == before
    assert f"process {process.pid}" in owner_of(directory)


def test_one_that_was_killed_is_taken_over_at_once(
    owner: tuple, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "WATCH_S", 30.0)
    directory, process = owner
    process.send_signal(signal.SIGKILL)
    process.wait(WAIT_S)
    assert owner_of(directory) == ""
    start = time.monotonic()
    with acquire(directory / OWNER, "A") as lock:
        assert time.monotonic() - start < locks.WATCH_S
        lock.check()
        assert contents(directory) == [OWNER]
    assert f"took over A from process {process.pid}" in caplog.text
    assert contents(directory) == []


def test_a_process_that_has_the_number_of_a_dead_one_is_another(tmp_path: Path) -> None:
    mine = Holder.this_process()
    assert mine.lives
    assert not replace(mine, started="1").lives
    (tmp_path / OWNER).write_bytes(replace(mine, started="1").to_bytes())
    acquire(tmp_path / OWNER, "A").release()


def test_a_suspended_owner_on_this_machine_keeps_it(owner: tuple, quick: None) -> None:
    directory, process = owner
    process.send_signal(signal.SIGSTOP)
    then = time.time() - 3600
    os.utime(directory / OWNER, (then, then))
    said = "it is not renewed: is it suspended.*In a copy.*remove .*owner.lock"
    with pytest.raises(LockHeldError, match=said):
        acquire(directory / OWNER, "A")


@pytest.mark.parametrize(
    ("age_s", "watched_s", "verdict"),
    [
        (0, 0, "watch"),
        (1e6, 0, "watch"),  # their clock may be behind
        (1e6, locks.WATCH_S, "stale"),
        (locks.STALE_S / 2, locks.WATCH_S, "watch"),
        (locks.SKEW_S, locks.STALE_S - 1, "watch"),  # may be the difference of two hosts' clocks
        (locks.SKEW_S, locks.STALE_S, "stale"),
        (0, locks.STALE_S - 1, "watch"),
        (0, locks.STALE_S, "stale"),
    ],
)
def test_a_lock_of_another_machine_is_watched(age_s: float, watched_s: float, verdict: str) -> None:
    theirs = replace(Holder.this_process(), machine="other")
    assert lock_verdict(LockState("t", 0, theirs), age_s, watched_s) == verdict
    assert lock_verdict(LockState("t", 0, None), age_s, watched_s) == verdict  # damaged or partial


def test_same_host_name_and_number_in_another_container_is_another_machine(quick: None) -> None:
    mine = Holder.this_process()
    assert mine.machine == this_machine()
    twin = replace(mine, machine="other boot", token="0" * 16)
    assert not twin.here
    assert lock_verdict(LockState("t", 0, twin), 0.0, 0.0) == "watch"


def test_a_far_owner_that_renews_is_refused_at_the_next_renewal(
    tmp_path: Path, quick: None
) -> None:
    """Though its clock is far behind."""
    import threading

    path = tmp_path / OWNER
    holder, ended = far(path, age_s=600), threading.Event()

    def renew() -> None:
        stamp = time.time() - 600
        while not ended.wait(0.05):
            stamp += 0.05
            os.utime(path, (stamp, stamp))

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(LockHeldError, match=r"process 1 on node7.*`kill 1` on node7"):
            acquire(path, "A")
    finally:
        ended.set()
        thread.join()
    assert read_lock(path).token == holder.token
    assert contents(tmp_path) == [OWNER]


def test_a_far_owner_whose_clock_is_behind_lives(tmp_path: Path, quick: None) -> None:
    """A filesystem that writes the hosts' own times: each renewal is five minutes old."""
    path, beats = tmp_path / OWNER, threading.Event()
    far(path, 300.0)

    def renew() -> None:
        while not beats.wait(locks.BEAT_S):
            then = time.time() - 300.0
            os.utime(path, (then, then))

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        assert "node7" in owner_of(tmp_path)
        with pytest.raises(LockHeldError, match="node7"):
            acquire(path, "it")
    finally:
        beats.set()
        thread.join()
    assert owner_of(tmp_path) == ""  # not renewed any more


@pytest.mark.parametrize("content", [b"", b"{}", b"\x00junk", b'{"pid": "x"}', None])
def test_an_abandoned_far_or_damaged_lock_is_taken_over(
    tmp_path: Path, quick: None, content: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "WRITTEN_S", 0.05)
    path = tmp_path / OWNER
    far(path, age_s=5)
    if content is not None:
        path.write_bytes(content)
    start = time.monotonic()
    with acquire(path, "A"):
        assert time.monotonic() - start >= 0.3
        assert contents(tmp_path) == [OWNER]


def test_a_token_that_leads_elsewhere_as_a_path_is_no_lock(tmp_path: Path) -> None:
    found = {**asdict(Holder.this_process()), "token": "../../x"}
    assert Holder.from_bytes(json.dumps(found).encode()) is None


@pytest.mark.parametrize(
    "change",
    [
        {"pid": 0}, {"pid": -1}, {"pid": True}, {"pid": 10**30}, {"pid": 1.0},
        {"since": 1e30}, {"since": True}, {"since": -1}, {"since": None},
        {"renewed": "1"}, {"run": "A\nB"}, {"host": "\x1b[31m"}, {"run": None},
    ],
    ids=str,
)  # fmt: skip
def test_what_no_process_writes_is_no_lock(change: dict[str, object]) -> None:
    """It would be shown, or advised to be killed, or fail where it is used."""
    found = asdict(Holder.this_process("A"))
    assert Holder.from_bytes(json.dumps(found).encode()) is not None
    assert Holder.from_bytes(json.dumps(found | change).encode()) is None


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b'{"pid":' * 50_000, b"NaN", b"\xff\xfe" * 9, b"\x00" * 99]
)
def test_any_content_is_read(content: bytes) -> None:
    assert Holder.from_bytes(content) is None


def test_the_heartbeat_renews(tmp_path: Path, quick: None) -> None:
    with acquire(tmp_path / OWNER, "A") as lock:
        first = read_lock(lock.path).renewed_ns
        deadline = time.monotonic() + WAIT_S
        while read_lock(lock.path).renewed_ns == first:
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.mark.parametrize("how", ["taken over", "removed"])
def test_an_owner_notices_that_it_is_none_any_more(tmp_path: Path, quick: None, how: str) -> None:
    lock = acquire(tmp_path / OWNER, "A")
    lock.check()
    if how == "removed":
        lock.path.unlink()
    else:
        theirs = far(lock.path, age_s=0)
    with pytest.raises(LockLostError, match="does not belong to this process") as caught:
        lock.check()
    assert ("process 1 on node7" in str(caught.value)) == (how == "taken over")
    lock.release()
    if how == "taken over":  # and leaves the other's lock alone
        assert read_lock(lock.path).token == theirs.token
        assert contents(tmp_path) == [OWNER]


def race(directory: Path, go: Path, count: int = 8) -> None:
    """So many processes at once: exactly one owns the directory."""
    processes = [start(directory, go) for _ in range(count)]
    try:
        time.sleep(1.0)
        go.touch()
        said = [process.stdout.readline().split(" ")[0].strip() for process in processes]
        assert sorted(said) == ["owns", *["refused"] * (count - 1)]
        assert contents(directory) == [OWNER]
        winner = processes[said.index("owns")]
        assert read_lock(directory / OWNER).holder.pid == winner.pid
    finally:
        for process in processes:
            process.communicate("\n", timeout=WAIT_S)
    assert contents(directory) == []


def test_of_many_that_start_at_once_one_wins(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    race(tmp_path / "run", tmp_path / "go")


@pytest.mark.parametrize("guard", ["", "abandoned"])
def test_of_many_that_take_over_at_once_one_wins(tmp_path: Path, guard: str) -> None:
    """Also where one was killed in the middle of taking over."""
    directory = tmp_path / "run"
    directory.mkdir()
    dead = replace(Holder.this_process(), started="1")
    (directory / OWNER).write_bytes(dead.to_bytes())
    if guard:
        other = replace(dead, token="ab" * 8)
        (directory / f".{OWNER}.{dead.token}").write_bytes(other.to_bytes())
    race(directory, tmp_path / "go")


def test_a_directory_of_a_command_is_made_and_owned(tmp_path: Path) -> None:
    with locked(tmp_path / "new" / "out", "--out new/out") as lock:
        lock.check()
        with (
            pytest.raises(LockHeldError, match="--out new/out is in use"),
            locked(tmp_path / "new" / "out", "--out new/out"),
        ):
            pass
    assert contents(tmp_path / "new" / "out") == []


def test_a_start_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS: from ps."""
    real: Callable[..., str] = Path.read_text

    def absent(path: Path, *given: object) -> str:
        if str(path).startswith("/proc"):
            raise FileNotFoundError(path)
        return real(path, *given)

    monkeypatch.setattr(Path, "read_text", absent)
    monkeypatch.setattr(Path, "exists", lambda path: not str(path).startswith("/proc"))
    assert this_machine() == f"host {socket.gethostname()}"
    assert process_start(os.getpid()) == process_start(os.getpid())
