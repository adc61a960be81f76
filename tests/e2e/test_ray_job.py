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

from cluster.own_packages import NAMES
from learner.metrics import read_metrics
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


OF_THE_USER = {
    "my_rewards.py": """
class Dark:
    def __init__(self, device): pass
    def __call__(self, images, conditions):
        return -images.mean(axis=(1, 2, 3)).astype("float32")
""",
    **{f"{name}.py": f"raise SystemExit('{name}.py is the user's')" for name in NAMES},
}
ONE_ITERATION = [
    *flags(), "--iterations", "1", "--evaluation.num-images", "0", "--output.gallery-every", "0",
    "--rewards.extra", "my_rewards:Dark=0.5",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's working directory: a reward of his own, and files of our packages' names."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for name, text in OF_THE_USER.items():
        (folder / name).write_text(text)
    return folder


def test_in_a_job_the_command_minds_no_files_of_our_names(head: Head, folder: Path) -> None:
    """Ray puts the job's working directory first, by PYTHONPATH, for driver and workers alike."""
    run = folder.parent / "run"
    job = head.ray(
        "job", "submit", "--working-dir", str(folder), "--",
        "tessera", "run", *ONE_ITERATION, "--run-dir", str(run),
    )  # fmt: skip
    text, _ = job.communicate(timeout=400)
    assert job.returncode == 0, text
    (row,) = read_metrics(run / "metrics.jsonl")
    assert row["reward/dark"] < 0


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


def test_a_private_ray_stays_private_beside_a_running_cluster(head: Head, folder: Path) -> None:
    """A cluster that somebody else started on this machine is neither joined nor in the way; nor
    are the user's files, which Ray has workers search before all others."""
    before = actors_of(head)
    run, tessera = folder.parent / "run", str(BIN / "tessera")
    (folder / "torch.py").write_text("raise SystemExit('torch.py is the user's')")
    process = subprocess.run(
        [tessera, "run", *ONE_ITERATION, "--run-dir", str(run)],
        env={name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    (row,) = read_metrics(run / "metrics.jsonl")
    assert row["reward/dark"] < 0
    assert actors_of(head) == before
