"""Signals that end a program, without Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.errors import LostWhileStoppingError
from cluster.program import signals
from cluster.program.signals import STOPPING, URGENT, StopFlag, deferred_signals, signal_handler
from cluster.scheduling.restarts import RestartBudget

LIMIT_S = 60.0


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in STOPPING}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    yield
    assert {number: signal.getsignal(number) for number in STOPPING} == handlers
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask


def until(condition: object) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", URGENT)
def test_the_first_signal_asks_and_the_second_interrupts(
    number: signal.Signals, logged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = StopFlag()
    stop.begin()
    with signal_handler(stop.handle):
        assert not stop()
        os.kill(os.getpid(), number)
        until(stop)
        assert len(logged) == 1
        assert "stopping at the next safe point; once more to stop at once" in logged[0]
        assert logged[0].startswith(number.name) == (number is not signal.SIGINT)
        monkeypatch.setattr(signals, "ONE_REQUEST_S", 0.0)
        with pytest.raises(KeyboardInterrupt):
            _kill_and_wait(number)
    assert len(logged) == 1


def _kill_and_wait(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    until(lambda: False)  # another thread may take the signal, which ends no long sleep of this one


@pytest.mark.parametrize("number", [each for each in STOPPING if each not in URGENT])
def test_a_warning_ends_nothing_at_once(
    number: signal.Signals, logged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGHUP of the kernel and of the shell; Slurm's SIGUSR1, then its SIGTERM; SIGXCPU comes every
    second."""
    monkeypatch.setattr(signals, "ONE_REQUEST_S", 0.0)
    stop = StopFlag()
    stop.begin()
    for _ in range(3):
        stop.handle(number, None)
        time.sleep(0.002)
    assert stop()
    assert logged == [f"{number.name}: stopping at the next safe point"]
    stop.handle(signal.SIGTERM, None)
    assert "SIGTERM: stopping at the next safe point; once more" in logged[1]
    time.sleep(0.002)
    stop.handle(number, None)
    with pytest.raises(KeyboardInterrupt):
        stop.handle(signal.SIGTERM, None)


def test_while_the_run_starts_a_signal_that_comes_twice_disturbs_no_tidying_up() -> None:
    stop = StopFlag()
    with pytest.raises(KeyboardInterrupt):
        stop.handle(signal.SIGTERM, None)
    for number in (signal.SIGTERM, signal.SIGHUP):
        stop.handle(number, None)


def test_a_signal_that_comes_twice_at_once_is_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "ONE_REQUEST_S", 30.0)
    stop = StopFlag()
    stop.begin()
    stop.handle(signal.SIGHUP, None)
    stop.handle(signal.SIGHUP, None)
    assert stop()
    assert stop.checkpoint


def test_while_the_run_starts_the_first_one_ends_it() -> None:
    stop = StopFlag()
    with pytest.raises(KeyboardInterrupt):
        stop.handle(signal.SIGTERM, None)
    assert stop()


def test_nohup_is_respected() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = StopFlag()
        for block in (signal_handler(stop.handle), deferred_signals()):
            with block:
                os.kill(os.getpid(), signal.SIGHUP)
                time.sleep(3 * signals.POLL_S)
        assert not stop()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


HELD = """
import os, signal, subprocess, sys, time
from cluster.program.signals import STOPPING, StopFlag, signal_handler, deferred_signals, interrupt
found = []
def until(count):
    deadline = time.monotonic() + 30
    while len(found) < count and time.monotonic() < deadline: time.sleep(0.01)
show = "import signal; print(*map(int, signal.pthread_sigmask(signal.SIG_BLOCK, [])))"
for number in STOPPING:
    with signal_handler(lambda number, frame: found.append(("ours", number))):
        with deferred_signals():
            signal.signal(number, lambda number, frame: found.append(("theirs", number)))
            os.kill(os.getpid(), number)
            until(1)
            blocked = subprocess.run([sys.executable, "-c", show], capture_output=True).stdout
        os.kill(os.getpid(), number)
        until(2)
    assert found == [("ours", number)] * 2, found
    assert set(map(int, blocked.split())) >= set(STOPPING), blocked
    found.clear()
try:
    with signal_handler(interrupt), deferred_signals():
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), number)
            time.sleep(0.02)
        for _ in range(3000): time.sleep(0.01)
except KeyboardInterrupt:
    stop = StopFlag()
    try:
        with signal_handler(stop.handle), deferred_signals():
            for number in (signal.SIGTERM, signal.SIGHUP):
                os.kill(os.getpid(), number)
                time.sleep(0.01)
            for _ in range(3000): time.sleep(0.01)
    except KeyboardInterrupt:
        print("there")
"""
SHIELDED = """
import multiprocessing, os, signal, subprocess, sys, time
from cluster.program.signals import STOPPING, ignoring_signals
class Role:
    def __init__(self, config, name): self.name = name
signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)  # as below a private Ray
role = ignoring_signals(Role)(None, name="sampler-0")
for number in STOPPING: os.kill(os.getpid(), number)
assert (role.name, type(role).__name__) == ("sampler-0", "Role")
started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
started.terminate()
assert started.wait(30) == -signal.SIGTERM
forked = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
forked.start()
forked.terminate()
forked.join(30)
assert forked.exitcode == -signal.SIGTERM
print("there")
"""


def test_handlers_that_a_block_installs_do_not_get_the_signals() -> None:
    """In a process without other threads: those that are there before the block may get them."""
    assert run_script(HELD) == "there\n"


def test_a_workers_process_ignores_them_and_those_that_it_starts_do_not() -> None:
    assert run_script(SHIELDED) == "there\n"


def run_script(script: str) -> str:
    line = [sys.executable, "-c", script]
    done = subprocess.run(line, capture_output=True, text=True, timeout=3 * LIMIT_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


WORK = "while True: time.sleep(0.05)"
"""Not one sleep: a signal between the interpreter's last look for signals and the system call would
be seen at its end."""
COMMAND = """
import sys, time
print("importing", flush=True)
{importing}
def main():
    try:
        print("working", flush=True)
        {working}
    except KeyboardInterrupt:
        print("tidied up", flush=True)
        return 130
"""


@pytest.mark.parametrize("number", STOPPING)
@pytest.mark.parametrize("phase", ["importing", "working"])
def test_a_command_ends_in_order_from_its_first_moment_on(
    phase: str, number: signal.Signals, tmp_path: Path
) -> None:
    slow = WORK if phase == "importing" else ""
    (tmp_path / "long_work.py").write_text(COMMAND.format(importing=slow, working=WORK))
    script = (
        "import sys; from cluster.program.start import run_command; "
        "sys.exit(run_command('long_work'))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    while phase not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(number)
    shown, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 130
    assert errors == ""
    assert ("tidied up" in shown) == (phase == "working")


def test_nobody_is_replaced_while_the_run_stops() -> None:
    stopping = False
    budget = RestartBudget(3, stopping=lambda: stopping)
    assert budget.spend("moments-server", "was lost", 0.0) == 0
    stopping = True
    with pytest.raises(LostWhileStoppingError, match="moments-server was lost while the run stop"):
        budget.spend("moments-server", "was lost", 1.0)
    assert budget.spent == 1
