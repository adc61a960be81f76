"""`cluster.status`, `cluster.scale` and `cluster.stop` beside a running job, as a user types them
who had no token yet, in a directory of their own; and who else can reach the job."""

from __future__ import annotations

import json
import os
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
from tests.small_run import flags

ROOT = Path(__file__).parents[2]
START_S = 300.0
STRANGER = """
import ray
ray.init(address={address!r}, logging_level="ERROR", _node_ip_address="127.0.0.1")
print("let in", len(ray.nodes()))
"""


class Job:
    """A run of 5,000 iterations, once it has done one.

    Attributes:
        early: what `cluster.status` said right after the start; None if Ray was there before it.
    """

    def __init__(self, folder: Path) -> None:
        self.run, self.home, self._log = folder / "night", folder / "home", folder / "console"
        self.home.mkdir()
        self._environment = {
            **os.environ, "HOME": str(self.home), "RAY_TMPDIR": "/tmp", "PYTHONPATH": str(ROOT)
        }  # fmt: skip
        options = [*flags(), "--iterations", "5000", "--evaluation.num-images", "0"]
        options += ["--output.checkpoint-every", "5000", "--output.gallery-every", "0"]
        options += ["--reward.every-s", "3600"]  # nobody but the test scales it
        line = [sys.executable, "-m", "learner.run", *options, "--run-dir", str(self.run)]
        with self._log.open("w") as console:
            self.process = subprocess.Popen(
                line, stdout=console, stderr=console, env=self._environment
            )
        self._wait_for((self.run / DISCOVERY_FILE).is_file)
        early = self.command("cluster.status", "--run", "night")
        self.early = None if self.place()["address"] else early
        metrics = self.run / "metrics.jsonl"
        self._wait_for(lambda: metrics.is_file() and metrics.stat().st_size > 0)

    def _wait_for(self, there: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_S
        while not there():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.1)

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

    def family(self) -> list[psutil.Process]:
        me = psutil.Process(self.process.pid)
        return [me, *me.children(recursive=True)]

    def end(self) -> None:
        if self.process.poll() is None:
            for process in reversed(self.family()):
                process.kill()


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


def test_a_running_job_is_scaled_from_another_shell(job: Job) -> None:
    """By its name, whatever the working directory is."""
    grown = job.command(
        "cluster.scale", "--run", "night", "--reward-servers", "2", "--samplers", "3"
    )
    assert grown.returncode == 0, grown.stderr + job.said()
    assert "sampler: 3 serving, 0 starting, 0 leaving" in grown.stdout
    assert "reward-server: 2 serving" in grown.stdout
    shown = job.command("cluster.scale", "--run", str(job.run))
    assert "run night\nsampler: 3 serving" in shown.stdout
    unknown = job.command("cluster.scale", "--run", str(job.run), "--pool", "other", "2")
    assert unknown.returncode == 1
    assert unknown.stderr == "error: no role 'reward-other': there are sampler, reward-server\n"
    assert "reward-server: 1 -> 2 workers, as asked for" in job.said()


def test_nothing_of_a_private_ray_can_be_reached_from_outside(job: Job) -> None:
    listening = {
        (process.name(), connection.laddr.ip)
        for process in job.family()
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert len(listening) > 3
    outside = {entry for entry in listening if not is_loopback(entry[1].removeprefix("::ffff:"))}
    assert outside == set()


def test_nobody_gets_in_without_the_token(job: Job, tmp_path: Path) -> None:
    found = job.place()
    assert found["token_authentication"] is True
    environment = {name: v for name, v in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": str(tmp_path), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    stranger = subprocess.Popen(
        [sys.executable, "-c", STRANGER.format(address=found["address"])],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        text, _ = stranger.communicate(timeout=60)
    finally:
        stranger.kill()
    assert stranger.returncode != 0
    assert "let in" not in text
    assert "token" in text.lower()


def test_no_token_is_in_the_run_directory(job: Job) -> None:
    assert job.token().stat().st_mode & 0o077 == 0
    token = job.token().read_text().strip()
    assert len(token) > 20
    for file in job.run.rglob("*"):
        if file.is_file():
            assert token.encode() not in file.read_bytes(), file
    assert token not in job.said()


def test_status_then_stop_then_resume(job: Job) -> None:
    shown = job.command("cluster.status", "--run", str(job.run), "--json")
    assert shown.returncode == 0, shown.stderr
    found = json.loads(shown.stdout)
    assert found["stage"] == "training"
    assert found["iterations"] == 5000
    assert 0 < found["iteration"] < 5000
    assert found["eta_s"] > 0
    assert found["said_s_ago"] < 60
    roles = {role["role"]: role for role in found["roles"]}
    assert set(roles) == {"learner", "moments-server", "sampler", "reward-server"}
    pids = {process.pid for process in job.family()}
    for role in roles.values():
        assert role["serving"] == role["wanted"] == len(role["workers"])
        assert {worker["pid"] for worker in role["workers"]} <= pids
    stopped = job.command(
        "cluster.stop", "--run", str(job.run), "--checkpoint", "--timeout-s", "90"
    )
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr + job.said()
    assert job.process.wait(30) == 130
    assert "asked to stop: stopping at the next safe point, with a checkpoint" in job.said()
    (kept,) = (job.run / "checkpoints").iterdir()
    assert f"newest checkpoint: {kept}" in stopped.stdout
    assert f"python -m learner.run --resume --run-dir {job.run}" in stopped.stdout
    done = int(kept.name.removeprefix("step_"))
    line = ["--resume", "--inline", "--run-dir", str(job.run), "--iterations", str(done + 1)]
    resumed = job.command("learner.run", *line)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert f"resumed from {kept.name}" in resumed.stdout
    again = job.command("cluster.stop", "--run", str(job.run))
    assert again.returncode == 1
    assert "no run is active" in again.stderr
    assert not (job.run / DISCOVERY_FILE).exists()
    ended = job.command("cluster.scale", "--run", "night", "--samplers", "1")
    assert ended.returncode == 1
    left = f"it has ended, and left {job.run / 'report.html'}"  # it was resumed to its end
    assert f"no run is active in {job.run}: {left}" in ended.stderr
