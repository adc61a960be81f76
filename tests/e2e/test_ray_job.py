"""A run as a Ray job, by README's commands as they are written, with Ray's token authentication."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster.own_packages import NAMES
from learner.monitoring.metrics import read_metrics
from learner.run import main
from tests.small_run import flags, recorded

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def readme_block() -> list[str]:
    """The commands of README's section on clusters, in order, without comments and breaks."""
    section = (ROOT / "README.md").read_text().partition("\n## On a cluster\n")[2]
    block = section.partition("```\n")[2].partition("```")[0]
    lines = block.replace("\\\n", " ").splitlines()
    return [line.partition("  #")[0].strip() for line in lines]


def small(command: str, *changes: tuple[str, str]) -> str:
    """A command with what this machine has not got taken out. Every change must find its place."""
    for old, new in changes:
        command, count = re.subn(old, new, command)
        assert count, f"README has no {old!r} any more"
    return command


class Head:
    """A Ray head node of this test's own, started as README says by a user who has no token, and
    how to talk to it."""

    def __init__(self, folder: Path) -> None:
        self.ports = {name: free_port() for name in ("gcs", "dashboard", "client", "agent")}
        self.mark = secrets.token_hex(8)
        home = folder / "home"
        home.mkdir()
        # Ray's sockets need a short path, and its note of the newest cluster a place of its own
        self.temporary = tempfile.mkdtemp(prefix="tessera", dir="/tmp")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "XDG_"))}
        self.other_shell = {
            **kept,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(home),
            "RAY_TMPDIR": self.temporary,
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{self.ports['dashboard']}",
            "RAY_USAGE_STATS_ENABLED": "0",
            "TESSERA_TEST": self.mark,
        }
        export, self.make_token, self.start_head, self.submit = readme_block()
        assert export == "export RAY_AUTH_MODE=token"
        self.environment = {**self.other_shell, "RAY_AUTH_MODE": "token"}

    def start(self) -> subprocess.CompletedProcess[str]:
        """Ray's processes go on by themselves."""
        ports = self.ports
        options = (
            f" --num-cpus=4 --port={ports['gcs']} --dashboard-port={ports['dashboard']}"
            f" --dashboard-agent-listen-port={ports['agent']}"
            f" --ray-client-server-port={ports['client']} --object-store-memory=200000000"
        )
        return self.shell(f"{self.make_token}\n{self.start_head}{options}")

    def shell(self, script: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-ec", script],
            env=self.environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )

    def job(self, run: Path, *options: str) -> str:
        """README's job, small enough for this machine."""
        line = small(
            self.submit,
            (r"--num-samplers 8", "--num-samplers 1"),
            (r"--num-reward-servers 4", "--num-reward-servers 1"),
            (r" --(sampler|reward|learner)\.num-gpus \S+", ""),
            (r"/shared/runs/first", shlex.quote(str(run))),
        )
        return shlex.join([*shlex.split(line), *options])

    def command(self, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A command of ours in another shell, which exports nothing, from another directory."""
        return subprocess.run(
            [sys.executable, "-m", name, *arguments],
            env={**self.other_shell, "PYTHONPATH": str(ROOT)},
            cwd=self.temporary,
            capture_output=True,
            text=True,
            timeout=400,
        )

    def processes(self) -> list[psutil.Process]:
        """Those that this test started, by their environment."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("TESSERA_TEST") == self.mark:
                    found.append(process)
        return found

    def end(self) -> None:
        for _ in range(3):  # some start others while they are ended
            members = self.processes()
            for member in members:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
            psutil.wait_procs(members, timeout=10)
        shutil.rmtree(self.temporary, ignore_errors=True)

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
    try:
        started = head.start()
        assert started.returncode == 0, started.stdout
        deadline = time.monotonic() + 120
        while True:
            listing = head.ray("job", "list")
            text, _ = listing.communicate(timeout=60)
            if listing.returncode == 0:
                break
            assert time.monotonic() < deadline, text
            time.sleep(1)
        yield head
    finally:
        head.end()


@pytest.mark.slow  # the next one submits the same job, and stops it
def test_readmes_commands_run_a_job(head: Head, tmp_path: Path) -> None:
    run = tmp_path / "first"
    done = head.shell(head.job(run, *flags()))
    assert done.returncode == 0, done.stdout
    assert "succeeded" in done.stdout
    assert "Traceback" not in done.stdout
    assert "asks for no token" not in done.stdout
    assert len(recorded(run)) == 4


def test_readmes_commands_beside_a_job(
    head: Head, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--run first`, from a shell with neither an address nor a token; then --resume."""
    run = tmp_path / "shared" / "first"
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert "`python -m cluster.scale --run first --reward-servers 6 --samplers 12`" in readme
    options = [*flags(), "--iterations", "5000", "--evaluation.num-images", "0"]
    options += ["--output.checkpoint-every", "5000", "--output.gallery-every", "0"]
    # It mostly waits, so that commands beside it are not slow.
    options += ["--rewards.extra", "tests.stand_ins:Brightness=0.1,seconds=0.3"]
    submit = head.shell(head.job(run, *options).replace("job submit", "job submit --no-wait", 1))
    assert submit.returncode == 0, submit.stdout
    deadline = time.monotonic() + 400
    while not (run / "metrics.jsonl").is_file():
        assert time.monotonic() < deadline, submit.stdout
        time.sleep(0.5)
    scaled = head.command(
        "cluster.scale", "--run", "first", "--reward-servers", "2", "--samplers", "2"
    )
    assert scaled.returncode == 0, scaled.stderr
    assert "run first\n" in scaled.stdout
    assert "sampler: 2 serving, 0 starting, 0 leaving" in scaled.stdout
    assert "reward-server: 2 serving, 0 starting, 0 leaving" in scaled.stdout
    unknown = head.command("cluster.scale", "--run", str(run), "--pool", "other", "2")
    assert unknown.returncode == 1
    assert unknown.stderr == "error: no role 'reward-other': there are sampler, reward-server\n"
    shown = head.command("cluster.status", "--json")
    assert json.loads(shown.stdout)["directory"] == str(run), shown.stderr
    stopped = head.command("cluster.stop", "--run", "first", "--checkpoint")
    assert stopped.returncode == 0, stopped.stderr
    (kept,) = (run / "checkpoints").iterdir()
    assert f"newest checkpoint: {kept}" in stopped.stdout
    assert f"python -m learner.run --resume --run-dir {run}" in stopped.stdout
    log = (run / "run.log").read_text()
    for role in ("sampler", "reward-server"):
        assert f"{role}: 1 -> 2 workers, as asked for" in log
    assert "asked to stop: stopping at the next safe point, with a checkpoint" in log
    after = head.command("cluster.status", "--run", "first")
    assert after.returncode == 0, after.stderr
    assert f"last run: first, ended  {run}\nnewest checkpoint: {run}" in after.stdout
    line = ["--resume", "--inline", "--run-dir", str(run), "--iterations"]
    assert main([*line, str(int(kept.name.removeprefix("step_")) + 1)]) == 0
    assert f"resumed from {kept.name}" in capsys.readouterr().out


def test_an_address_without_its_token(head: Head, tmp_path: Path) -> None:
    """Refused within seconds, before anything is made, and told where the token is read from."""
    start, run = time.monotonic(), tmp_path / "run"
    refused = head.command(
        "learner.run", "--ray.address", f"127.0.0.1:{head.ports['gcs']}", "--run-dir", str(run)
    )
    assert time.monotonic() - start < 60
    assert refused.returncode == 2
    token = Path(head.environment["HOME"]) / ".ray" / "auth_token"
    assert (
        "asks for a token, and this program shows none: set RAY_AUTH_MODE=token" in refused.stderr
    )
    assert f"it is then read from {token}" in refused.stderr
    assert not run.exists()


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


@pytest.mark.slow  # test_own_packages.py shows it without a job
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


@pytest.mark.slow  # test_stop.py looks at every socket of a private Ray
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
