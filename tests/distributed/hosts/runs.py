"""Jobs of the miniature on a cluster of several hosts: options, where they are, what they wrote."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import msgpack
import psutil
import pyarrow.parquet as pq

from cluster.io.checksum import verify_checksum
from cluster.model_files.tensors import read_tensors
from learner.monitoring.metrics import read_metrics, repeatable
from rewards.servers.moments_server import SPACES
from tests.distributed.hosts.cluster import HostCluster
from tests.distributed.hosts.network import Host
from tests.small_run import flags

ITERATIONS = 6
LIMIT_S = 240.0
COMMAND = ["python", "-m", "learner.run"]
OPTIONS = [
    *flags(),
    *("--iterations", str(ITERATIONS), "--evaluation.num-images", "0"),
    *("--output.gallery-every", "0", "--output.checkpoint-every", "1"),
    *("--learner.schedule", "constant", "--heartbeat-s", "20", "--max-restarts", "20"),
]
WORKERS = ["--num-samplers", "2", "--num-reward-servers", "2"]
ROLES = ("Sampler", "RewardServer", "Learner", "MomentsServer")


def job(run: Path, *options: str) -> list[str]:
    """The command of a small run, which waits while `hold_file(run)` is there."""
    reward = ["--rewards.extra", f"tests.stand_ins:HeldBrightness=0.1,hold={hold_file(run)}"]
    return [*COMMAND, "--run-dir", str(run), *OPTIONS, *WORKERS, *reward, *options]


def hold_file(run: Path) -> Path:
    return run.with_name(f"{run.name}.hold")


@contextmanager
def held(run: Path) -> Iterator[None]:
    """A run whose rewards wait, so that there is time to break something."""
    hold_file(run).touch()
    try:
        yield
    finally:
        hold_file(run).unlink()


def roles_on(host: Host) -> list[str]:
    """The roles whose processes are on a host, each as often as it is there."""
    found = []
    for process in host.processes():
        try:
            title = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if title.startswith("ray::"):
            role = title.removeprefix("ray::").partition(".")[0].split()[0]
            found += [role] if role in ROLES else []
    return sorted(found)


def until(happened: Callable[[], Any], what: str, limit_s: float = LIMIT_S) -> Any:
    """Wait for something; returns it.

    Raises:
        AssertionError: it did not happen in time.
    """
    deadline = time.monotonic() + limit_s
    while not (found := happened()):
        assert time.monotonic() < deadline, what
        time.sleep(0.1)
    return found


def rows(run: Path) -> int:
    """Iterations that a run has recorded."""
    return len(read_metrics(run / "metrics.jsonl"))


def in_log(run: Path, *texts: str) -> bool:
    file = run / "run.log"
    log = file.read_text() if file.is_file() else ""
    return all(text in log for text in texts)


def start(cluster: HostCluster, command: Sequence[str], options: Sequence[str] = ()) -> None:
    """Submit without waiting for the job's end."""
    done = cluster.submit(command, options=["--no-wait", *options])
    assert done.returncode == 0, done.stdout


@dataclass(frozen=True)
class CalmRun:
    """A run without failures: where its workers were, and what it computed."""

    roles: dict[str, list[str]]
    """By host."""
    result: dict[str, Any]

    @classmethod
    def of(cls, cluster: HostCluster) -> Self:
        run = cluster.network.shared / "calm"
        start(cluster, job(run))
        until(lambda: rows(run) >= 2, "the calm run's iterations")
        with held(run):
            roles = {host.name: roles_on(host) for host in cluster.network.hosts}
        until_finished(run)
        return cls(roles, result(run))


def until_finished(run: Path) -> None:
    until(lambda: (run / "report.html").is_file(), f"{run.name} comes to its end")


def result(run: Path) -> dict[str, Any]:
    """What equal runs have in common, bit for bit: all columns of the rollouts, metrics without
    times of every iteration; policy, optimizer and moments of the newest checkpoint."""
    folder = max((run / "checkpoints").glob("step_*"))
    found: dict[str, Any] = {"newest": folder.name}
    found["metrics"] = [repeatable(row) for row in read_metrics(run / "metrics.jsonl")]
    for file in sorted((run / "rollouts").glob("*.parquet")):
        table = pq.read_table(file)
        found |= {
            f"{file.name} {name}": repr(table[name].to_pylist()) for name in table.schema.names
        }
    for file in sorted(folder.glob("*.safetensors")):
        found |= {f"{file.name} {name}": t.tolist() for name, t in read_tensors(file).items()}
    stored = _unpacked((folder / "moments.msgpack").read_bytes())
    for space, state in stored[SPACES].items():
        moments = _unpacked(state)
        del moments["run"]  # whose last commit it was, by name
        found |= {f"moments of {space} {name}": value for name, value in moments.items()}
    return found


def _unpacked(state: bytes) -> dict[str, Any]:
    return msgpack.unpackb(verify_checksum(state), strict_map_key=False)


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names under which two results differ."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
