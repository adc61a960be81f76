"""The Slurm job's script, submitted to a real Slurm on three hosts; skipped where there is none."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from cluster.deploy.plan_document import read_plan
from cluster.deploy.slurm.files import BESIDE, SCRIPT, SlurmOptions, files
from learner.run import main
from tests.distributed.hosts.network import BIN, ROOT, Network
from tests.distributed.hosts.slurm import SlurmCluster, why_no_slurm
from tests.small_run import flags, recorded
from tests.unit.cluster.deploy.plans import cpus, text

ENVIRONMENT = (f"export PATH={shlex.quote(str(BIN))}:$PATH", f"export PYTHONPATH={ROOT}")


@pytest.fixture(scope="module")
def slurm(network: Network) -> Iterator[SlurmCluster]:
    if reason := why_no_slurm():
        pytest.skip(reason)
    with SlurmCluster(network) as slurm:
        yield slurm


class Job:
    """A script in a folder of its own on shared storage, submitted."""

    def __init__(
        self,
        slurm: SlurmCluster,
        name: str,
        arguments: Sequence[str] = (),
        *,
        setup: tuple[str, ...] = ENVIRONMENT,
        submit: tuple[str, ...] = (),
        **options: Any,
    ) -> None:
        self.slurm, self.folder = slurm, slurm.network.shared / name
        self.run = self.folder / "run"
        self.folder.mkdir()
        plan = read_plan(text(cpus() | {"arguments": list(arguments)}), "test")
        asked = SlurmOptions(
            preset=plan.preset,
            gpus=0,
            run_dir=str(self.run),
            cpus_per_node=4,
            setup=setup,
            time="20:00",
            **options,
        )
        for path, script in files(plan, asked).items():
            (self.folder / path).write_text(script)
            (self.folder / path).chmod(0o755)
        self.id = slurm.submit(self.folder / SCRIPT, *submit)

    @property
    def output(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob("*.out")))

    def wait_until(self, done: Callable[[], object], timeout: float = 200.0) -> None:
        deadline = time.monotonic() + timeout
        while not done():
            assert time.monotonic() < deadline, self.output
            time.sleep(0.1)

    def end(self, *states: str, timeout: float = 400.0) -> dict[str, str]:
        """Wait for its end, which must be one of these."""
        final = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        found = self.slurm.wait_for(self.id, *final, timeout=timeout)
        assert found["JobState"] in states, self.output
        return found

    def signal(self, name: str) -> None:
        """As Slurm sends it before the time limit."""
        self.slurm.command("scancel", "--batch", f"--signal={name}", self.id)


def left_behind(slurm: SlurmCluster) -> list[str]:
    """What ended jobs left: tokens, directories of Ray's, processes."""
    found = [str(path) for path in (slurm.home / ".tessera").glob("*")]
    for host in slurm.network.hosts:
        found += host.run(["sh", "-c", "ls -d /tmp/tessera-[0-9]*; pgrep -a raylet"]).stdout.split()
    return [each for each in found if not each.startswith(str(slurm.network.shared.parent))]


RAY = """#!/bin/bash
echo "$(hostname) $(stat -c %a "$RAY_AUTH_TOKEN_PATH") $RAY_AUTH_MODE $*" >>ray.log
if [[ "$*" == *--head* ]]; then echo "10.77.0.1:$port" >"$ray_dir/ray_current_cluster"; fi
[ "$(hostname)" != "$(cat absent 2>/dev/null)" ] || exit 1
touch "$job/joined-$(hostname)"
exec sleep 1234
"""
PYTHON = """#!/bin/bash
echo "$(hostname) $*" >>python.log
if [ "$2" = cluster.deploy.nodes ]; then
    for _ in $(seq 20); do
        [ "$(ls "$job"/joined-* | wc -l)" -lt "$6" ] || exit 0
        sleep 0.1
    done
    echo "error: too few nodes joined" >&2
    exit 1
fi
trap 'touch checkpoint; exit 130' USR1
trap 'exit 130' TERM
touch running
until [ -s status ] || [ -e checkpoint ]; do sleep 0.05; done
exit "$(cat status 2>/dev/null || echo 0)"
"""


def stand_in_job(slurm: SlurmCluster, name: str, **options: Any) -> Job:
    """A job whose `ray` and `python` are shell scripts, which note how they are called."""
    programs = slurm.network.shared / f"{name}-bin"
    programs.mkdir()
    for program, script in (("ray", RAY), ("python", PYTHON)):
        (programs / program).write_text(script)
        (programs / program).chmod(0o755)
    return Job(slurm, name, setup=(f"export PATH={programs}:$PATH",), **options)


def test_a_job_on_three_hosts_is_requeued_with_what_it_needs(slurm: SlurmCluster) -> None:
    job = stand_in_job(slurm, "requeued", nodes=3)
    job.wait_until(lambda: (job.folder / "running").exists())
    (job.folder / "running").unlink()
    job.signal("USR1")
    assert job.end("COMPLETED")["Restarts"] == "1", job.output
    assert "requeued; it goes on from its newest checkpoint" in job.output
    rays = [line.split() for line in (job.folder / "ray.log").read_text().splitlines()]
    assert [line[0] for line in rays].count("host-1") == 2, "a head for each start"
    assert sorted({line[0] for line in rays}) == ["host-1", "host-2", "host-3"]
    assert {tuple(line[1:3]) for line in rays} == {("600", "token")}
    port = 20000 + int(job.id) % 3000 * 3
    assert f"--port={port}" in rays[0]
    assert f"--temp-dir=/tmp/tessera-{job.id}" in rays[0]
    assert "--num-cpus=4" in rays[0]
    assert all("--address=10.77.0.1:" in " ".join(line) for line in rays if line[0] != "host-1")
    runs = [
        line for line in (job.folder / "python.log").read_text().splitlines() if "learner" in line
    ]
    assert runs[0] == runs[1] != ""
    assert f"--run-dir {job.run} --auto-resume --ray.address 10.77.0.1:{port}" in runs[0]
    assert left_behind(slurm) == []


@pytest.mark.parametrize(("asked", "status"), [("", 3), ("USR2", 130)])
def test_the_exit_status_of_the_run_is_the_jobs(
    slurm: SlurmCluster, asked: str, status: int
) -> None:
    job = stand_in_job(slurm, f"status-{status}")
    job.wait_until(lambda: (job.folder / "running").exists())
    if asked:
        job.signal(asked)
    else:
        (job.folder / "status").write_text(str(status))
    found = job.end("FAILED")
    assert (found["ExitCode"], found["Restarts"]) == (f"{status}:0", "0"), job.output
    assert left_behind(slurm) == []


def test_a_node_that_does_not_join_ends_the_job(slurm: SlurmCluster) -> None:
    job = stand_in_job(slurm, "absent", nodes=3, submit=("--hold",))
    (job.folder / "absent").write_text("host-3")
    slurm.command("scontrol", "release", job.id)
    assert job.end("FAILED")["ExitCode"] == "1:0", job.output
    assert "error: too few nodes joined" in job.output
    assert "error: not all nodes joined" in job.output
    assert not (job.folder / "running").exists()
    logs = f"/tmp/tessera-{job.id}"
    assert f"error: Ray ended on host-3; its logs: {logs}/session_latest/logs" in job.output
    assert left_behind(slurm) == [logs]  # on that host alone
    slurm.network.hosts[2].run(["rm", "-r", logs])


def test_a_cancelled_job_leaves_nothing(slurm: SlurmCluster) -> None:
    job = stand_in_job(slurm, "cancelled", nodes=3)
    job.wait_until(lambda: (job.folder / "running").exists())
    slurm.command("scancel", job.id)
    job.end("CANCELLED")
    job.wait_until(lambda: not left_behind(slurm), timeout=30)


def test_an_array_is_one_run_a_seed_on_ports_of_its_own(slurm: SlurmCluster) -> None:
    job = stand_in_job(slurm, "array", submit=("--array=3,7",))
    log = job.folder / "python.log"
    job.wait_until(lambda: log.is_file() and log.read_text().count("learner.run") == 2)
    (job.folder / "checkpoint").touch()
    job.end("COMPLETED")
    runs = [line.split() for line in log.read_text().splitlines()]
    of = {line[line.index("--seed") + 1]: line[line.index("--run-dir") + 1] for line in runs}
    assert of == {seed: str(job.run / f"seed-{seed}") for seed in ("3", "7")}
    assert len({line[line.index("--ray.temp-dir") + 1] for line in runs}) == 2


@pytest.mark.slow  # a minute or two: the runs are real
@pytest.mark.parametrize("nodes", [1, 3])
def test_a_requeued_job_gives_the_numbers_of_a_calm_run(
    slurm: SlurmCluster, tmp_path: Path, nodes: int
) -> None:
    options = [*flags(), "--iterations", "6", "--evaluation.num-images", "0"]
    options += ["--output.gallery-every", "0"]
    slow = ["--rewards.extra", "tests.stand_ins:Brightness=0.1,seconds=0.5"]
    job = Job(slurm, f"real-{nodes}", [*options, *slow], nodes=nodes)
    metrics = job.run / "metrics.jsonl"
    job.wait_until(lambda: metrics.is_file() and metrics.stat().st_size)  # an iteration to keep
    status = slurm.network.outside.run(
        [str(job.folder / BESIDE), job.id, "python", "-m", "cluster.status", "--run", str(job.run)],
        slurm.environment,
    )
    assert status.returncode == 0, status.stderr + job.output
    assert "sampler" in status.stdout
    job.signal("USR1")
    assert job.end("COMPLETED")["Restarts"] == "1"
    assert "requeued; it goes on from its newest checkpoint" in job.output
    assert "resumed from step_" in job.output
    assert left_behind(slurm) == [], job.output
    calm = tmp_path / "calm"
    assert (
        main([*options, *slow[:1], slow[1].replace("0.5", "0"), "--inline", "--run-dir", str(calm)])
        == 0
    )
    assert recorded(job.run) == recorded(calm)
