"""A job on a private Ray: what can be seen of it from another shell, who can reach it, and how a
signal ends it. `test_ray_job.py` scales and stops a job by commands."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.io.run_layout import DISCOVERY_FILE
from cluster.ray_session.address import is_loopback
from cluster.ray_session.private import ask_gcs
from learner.run import INTERRUPTED, main
from tests.e2e.test_main_job import NOISE
from tests.small_run import flags

ROOT = Path(__file__).parents[2]
START_S = 300.0
STRANGER = """
import ray
ray.init(address={address!r}, logging_level="ERROR", _node_ip_address="127.0.0.1")
print("let in", len(ray.nodes()))
"""


class Program:
    """`learner.run` in a process, as a user types it who had no token yet.

    Attributes:
        family: every process that it was seen to start.
    """

    def __init__(self, folder: Path, *options: str) -> None:
        self.run, self.home, self._log = folder / "night", folder / "home", folder / "console"
        self.home.mkdir()
        self._environment = {
            **os.environ, "HOME": str(self.home), "RAY_TMPDIR": "/tmp", "PYTHONPATH": str(ROOT)
        }  # fmt: skip
        line = [sys.executable, "-m", "learner.run", *options, "--run-dir", str(self.run)]
        with self._log.open("w") as console:
            self.process = subprocess.Popen(
                line,
                stdout=console,
                stderr=console,
                env=self._environment,
                start_new_session=True,
            )
        self.family = {psutil.Process(self.process.pid)}

    def wait_for(self, there: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_S
        while not there():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            self.update_family()
            time.sleep(0.1)

    def update_family(self) -> None:
        if self.process.poll() is not None:
            return  # its number may be another process's by now
        with contextlib.suppress(psutil.NoSuchProcess):
            self.family.update(psutil.Process(self.process.pid).children(recursive=True))

    def command(self, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", name, *arguments],
            cwd=self.home,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=START_S,
        )

    def place(self) -> dict[str, Any]:
        return json.loads((self.run / DISCOVERY_FILE).read_text())

    def token(self) -> Path:
        return self.home / ".ray" / "auth_token"

    def said(self) -> str:
        return self._log.read_text()

    def signal_everybody(self, number: signal.Signals) -> None:
        """As a scheduler does: to every process of the job, whatever its group."""
        self.update_family()
        for process in self.family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def assert_ended(self, status: int) -> None:
        """Waits for the end, which leaves no process."""
        assert self.process.wait(START_S) == status, self.said()
        _, alive = psutil.wait_procs(self.family, timeout=60)
        assert not alive

    def end(self) -> None:
        self.update_family()
        for process in self.family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(60)
        psutil.wait_procs(self.family, timeout=60)


class Job(Program):
    """A run of 5,000 iterations, once it has done one.

    Attributes:
        early: what `cluster.status` said right after the start; None if Ray was there before it.
    """

    def __init__(self, folder: Path) -> None:
        options = [*flags(), "--iterations", "5000", "--evaluation.num-images", "0"]
        options += ["--output.checkpoint-every", "5000", "--output.gallery-every", "0"]
        options += ["--num-samplers", "1"]
        # It mostly waits, so that commands beside it are not slow.
        options += ["--rewards.extra", "tests.stand_ins:Brightness=0.1,seconds=0.3"]
        super().__init__(folder, *options)
        try:
            self.wait_for((self.run / DISCOVERY_FILE).is_file)
            early = self.command("cluster.status", "--run", "night")
            self.early = None if self.place()["address"] else early
            self.wait_for(lambda: self.done() > 0)
        except BaseException:
            self.end()
            raise

    def done(self) -> int:
        """Iterations that are recorded."""
        metrics = self.run / "metrics.jsonl"
        return metrics.read_text().count("\n") if metrics.is_file() else 0

    def assert_ends_with_a_checkpoint(self, number: signal.Signals) -> None:
        """After a signal to every process."""
        self.signal_everybody(number)
        self.assert_ended(INTERRUPTED)
        said, done = self.said(), self.done()
        assert "Traceback" not in said
        assert "replacement" not in said
        assert f"stopped after {done} of 5000 iterations; go on with" in said
        assert f"{number.name}: stopping at the next safe point" in said
        assert (self.run / "checkpoints" / f"step_{done:06d}" / "manifest.msgpack").is_file()
        assert '<span class="state stopped">' in (self.run / "report.html").read_text()


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    job = Job(tmp_path_factory.mktemp("stop"))
    yield job
    job.end()


def test_a_run_that_starts_has_a_status(job: Job) -> None:
    if job.early is None:
        pytest.skip("Ray was there before the first status")
    assert job.early.returncode == 0, job.early.stderr
    assert f"run night: starting  {job.run}" in job.early.stdout


def test_nothing_of_a_private_ray_can_be_reached_from_outside(job: Job) -> None:
    job.update_family()
    listening = set()
    for process in job.family:
        with contextlib.suppress(psutil.NoSuchProcess):
            for connection in process.net_connections(kind="inet"):
                if connection.status == psutil.CONN_LISTEN:
                    listening.add((process.name(), connection.laddr.ip))
    assert len(listening) > 3
    outside = {entry for entry in listening if not is_loopback(entry[1].removeprefix("::ffff:"))}
    assert outside == set()


def test_the_token_is_asked_for(job: Job) -> None:
    found = job.place()
    assert found["token_authentication"] is True
    for shown in ("", "wrong"):
        assert ask_gcs(found["address"], shown, START_S).code == "UNAUTHENTICATED"
    assert ask_gcs(found["address"], job.token().read_text().strip(), START_S).code == "OK"


@pytest.mark.slow  # the one before asks the same service as `ray.init`, without its retries
def test_nobody_gets_in_without_the_token(job: Job, tmp_path: Path) -> None:
    environment = {name: v for name, v in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": str(tmp_path), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    stranger = subprocess.run(
        [sys.executable, "-c", STRANGER.format(address=job.place()["address"])],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=START_S,
    )
    assert stranger.returncode != 0
    assert "let in" not in stranger.stdout
    assert "token" in stranger.stdout.lower()


def test_no_token_is_in_the_run_directory(job: Job) -> None:
    assert job.token().stat().st_mode & 0o077 == 0
    token = job.token().read_text().strip()
    assert len(token) > 20
    for file in job.run.rglob("*"):
        if file.is_file():
            assert token.encode() not in file.read_bytes(), file
    assert token not in job.said()


def test_status_of_a_running_job(job: Job) -> None:
    def status() -> dict[str, Any]:
        shown = job.command("cluster.status", "--run", str(job.run), "--json")
        assert shown.returncode == 0, shown.stderr
        return dict(json.loads(shown.stdout))

    deadline = time.monotonic() + START_S
    while not (found := status())["iteration"]:  # sent once a second: it may lag behind the rows
        assert time.monotonic() < deadline, found
    assert found["stage"] == "training"
    assert found["iterations"] == 5000
    assert 0 < found["iteration"] < 5000
    assert found["eta_s"] > 0
    assert found["said_s_ago"] < 60
    roles = {role["role"]: role for role in found["roles"]}
    assert set(roles) == {"learner", "moments-server", "sampler", "reward-server"}
    job.update_family()
    pids = {process.pid for process in job.family}
    lines = job.said().lower().splitlines()
    assert not [line for line in lines if any(word in line for word in NOISE)]
    for role in roles.values():
        assert role["serving"] == role["wanted"] == len(role["workers"])
        assert {worker["pid"] for worker in role["workers"]} <= pids


def test_a_signal_to_every_process_writes_a_checkpoint_and_leaves_no_process(
    job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    """As Slurm ends a job; --resume goes on, and what has ended is not scaled."""
    job.assert_ends_with_a_checkpoint(signal.SIGTERM)
    assert not (job.run / DISCOVERY_FILE).exists()
    (kept,) = (job.run / "checkpoints").iterdir()
    line = ["--resume", "--inline", "--run-dir", str(job.run), "--iterations"]
    assert main([*line, str(job.done() + 1)]) == 0
    assert f"resumed from {kept.name}" in capsys.readouterr().out
    left = f"it has ended, and left {job.run / 'report.html'}"  # it was resumed to its end
    for name, options in (("cluster.scale", ["--samplers", "1"]), ("cluster.stop", [])):
        ended = job.command(name, "--run", "night", *options)
        assert ended.returncode == 1
        assert f"no run is active in {job.run}: {left}" in ended.stderr


@pytest.mark.slow  # the one before, by another signal
def test_a_warning_to_every_process_does_the_same(tmp_path: Path) -> None:
    job = Job(tmp_path)
    try:
        job.assert_ends_with_a_checkpoint(signal.SIGUSR1)
    finally:
        job.end()


def test_a_signal_while_ray_starts_leaves_nothing(tmp_path: Path) -> None:
    program = Program(tmp_path, *flags())
    try:
        program.wait_for(lambda: len(program.family) > 2)
        program.signal_everybody(signal.SIGTERM)
        program.assert_ended(INTERRUPTED)
    finally:
        program.end()
    said = program.said().splitlines()
    assert said[1:] == ["SIGTERM: stopping", "stopped at once; nothing was kept"]
    assert not program.run.exists()
