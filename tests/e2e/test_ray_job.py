"""The same run as a Ray job, on loopback, with Ray's token authentication on."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.small_run import flags, recorded

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Head:
    """A Ray head node of this test's own, and how to talk to it."""

    def __init__(self, folder: Path) -> None:
        self.ports = {name: free_port() for name in ("gcs", "dashboard", "client", "agent")}
        token = folder / "token"
        token.write_text(secrets.token_hex(32))
        self.environment = {
            **os.environ,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{self.ports['dashboard']}",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self.environment.pop("RAY_ADDRESS", None)

    def start(self) -> subprocess.Popen[str]:
        ports = self.ports
        return self.ray(
            "start", "--head", "--block", "--num-cpus=2", "--node-ip-address=127.0.0.1",
            f"--port={ports['gcs']}", "--dashboard-host=127.0.0.1",
            f"--dashboard-port={ports['dashboard']}",
            f"--dashboard-agent-listen-port={ports['agent']}",
            f"--ray-client-server-port={ports['client']}", "--disable-usage-stats",
        )  # fmt: skip

    def ray(self, *arguments: str, **changes: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(BIN / "ray"), *arguments],
            env={**self.environment, **changes},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    head = Head(tmp_path_factory.mktemp("head"))
    process = head.start()
    try:
        deadline = time.monotonic() + 120
        while True:
            listing = head.ray("job", "list")
            text, _ = listing.communicate(timeout=60)
            if listing.returncode == 0:
                break
            assert process.poll() is None, "".join(process.stdout or [])
            assert time.monotonic() < deadline, text
            time.sleep(1)
        yield head
    finally:
        family = [
            psutil.Process(process.pid),
            *psutil.Process(process.pid).children(recursive=True),
        ]
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.terminate()
        _, alive = psutil.wait_procs(family, timeout=10)
        for straggler in alive:
            straggler.kill()


def test_ray_job_submit(head: Head, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = head.ray(
        "job", "submit", "--working-dir", ".", "--", "python", "-m", "learner.run",
        "--num-samplers", "2", *flags(), "--run-dir", str(run),
    )  # fmt: skip
    text, _ = job.communicate(timeout=400)
    assert job.returncode == 0, text
    assert "succeeded" in text
    assert "Traceback" not in text
    assert len(recorded(run)) == 4


def test_without_the_token_nobody_gets_in(head: Head, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_text(secrets.token_hex(32))
    listing = head.ray("job", "list", RAY_AUTH_TOKEN_PATH=str(wrong))
    text, _ = listing.communicate(timeout=60)
    assert listing.returncode != 0
    assert "Invalid authentication token" in text


def actors_of(head: Head) -> list[dict[str, str]]:
    listing = head.ray("list", "actors", "--format=json")
    text, _ = listing.communicate(timeout=60)
    assert listing.returncode == 0, text
    return json.loads(text[text.index("[") :])


def test_a_private_ray_stays_private_beside_a_running_cluster(head: Head, tmp_path: Path) -> None:
    """A cluster that somebody else started on this machine is neither joined nor in the way."""
    before = actors_of(head)
    process = subprocess.run(
        [sys.executable, "-m", "learner.run", *flags(), "--run-dir", str(tmp_path / "run")],
        env={name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert actors_of(head) == before
