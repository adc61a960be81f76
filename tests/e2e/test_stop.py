"""`python -m cluster.status` and `cluster.stop` beside a running job; and who else can reach it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster.io.run_layout import WHEREABOUTS
from cluster.ray_session.address import is_loopback
from tests.small_run import flags

START_S = 120.0
STRANGER = """
import ray
ray.init(address={address!r}, logging_level="ERROR", _node_ip_address="127.0.0.1")
print("let in", len(ray.nodes()))
"""


def command(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", name, *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=START_S)


class Job:
    """A run of 5,000 iterations, once it has done one."""

    def __init__(self, folder: Path) -> None:
        self.run, self._log = folder / "night", folder / "console"
        options = [*flags(), "--iterations", "5000", "--evaluation.num-images", "0"]
        options += ["--output.checkpoint-every", "5000", "--output.gallery-every", "0"]
        line = [sys.executable, "-m", "learner.run", *options, "--run-dir", str(self.run)]
        with self._log.open("w") as console:
            self.process = subprocess.Popen(line, stdout=console, stderr=console)
        deadline, metrics = time.monotonic() + START_S, self.run / "metrics.jsonl"
        while not (metrics.is_file() and metrics.stat().st_size):
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.2)

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
    found = json.loads((job.run / WHEREABOUTS).read_text())
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
    token = (Path.home() / ".ray" / "auth_token").read_text().strip()
    assert len(token) > 20
    for file in job.run.rglob("*"):
        if file.is_file():
            assert token.encode() not in file.read_bytes(), file
    assert token not in job.said()


def test_status_then_stop_then_resume(job: Job) -> None:
    shown = command("cluster.status", "--run", str(job.run), "--json")
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
    stopped = command("cluster.stop", "--run", str(job.run), "--checkpoint", "--timeout-s", "90")
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr + job.said()
    assert job.process.wait(30) == 130
    assert "asked to stop: stopping at the next safe point, with a checkpoint" in job.said()
    (kept,) = (job.run / "checkpoints").iterdir()
    assert f"newest checkpoint: {kept}" in stopped.stdout
    assert f"python -m learner.run --resume --run-dir {job.run}" in stopped.stdout
    done = int(kept.name.removeprefix("step_"))
    line = ["--resume", "--inline", "--run-dir", str(job.run), "--iterations", str(done + 1)]
    resumed = command("learner.run", *line)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert f"resumed from {kept.name}" in resumed.stdout
    again = command("cluster.stop", "--run", str(job.run))
    assert again.returncode == 1
    assert "no run is active" in again.stderr
