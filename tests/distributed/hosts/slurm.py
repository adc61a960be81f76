"""A real Slurm on the hosts of a network: a controller outside, a node daemon on each host."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from tests.distributed.hosts.network import Network

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
START_S = 30.0
# cred_expire: by default a requeued job waits for two minutes
CONFIGURATION = """\
ClusterName=tessera
SlurmctldHost=outside({controller})
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={work}/munge/socket,cred_expire=6
StateSaveLocation={work}/state
SlurmdSpoolDir={work}/spool-%n
SlurmctldPidFile={work}/slurmctld.pid
SlurmdPidFile={work}/slurmd-%n.pid
SlurmctldLogFile={work}/slurmctld.log
SlurmdLogFile={work}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
ReturnToService=2
MpiDefault=none
KillWait=5
SchedulerParameters=sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_no_slurm() -> str:
    """Why there is none; empty: there is one."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"Slurm's {', '.join(missing)} not installed" if missing else ""


class SlurmCluster:
    """A context manager. Jobs are submitted from the host outside, with a home on shared storage.

    Args:
        cpus: that Slurm gives to jobs, of each host.
    """

    def __init__(self, network: Network, *, cpus: int = 4, memory_mb: int = 64_000) -> None:
        self.network, self.cpus, self.memory_mb = network, cpus, memory_mb
        self.work = network.shared / "slurm"
        self.home = network.shared / "home"

    def __enter__(self) -> Self:
        for folder in (self.work, self.work / "munge", self.home):
            folder.mkdir(mode=0o755)
        nodes = "\n".join(
            f"NodeName={host.name} NodeAddr={host.address} CPUs={self.cpus} State=UNKNOWN "
            f"RealMemory={self.memory_mb}"
            for host in self.network.hosts
        )
        text = CONFIGURATION.format(
            controller=self.network.outside.address, work=self.work, nodes=nodes
        )
        (self.work / "slurm.conf").write_text(text)
        with ExitStack() as stack:
            self._start(stack)
            self._end = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.close()

    @property
    def environment(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.work / "slurm.conf"), "HOME": str(self.home)}

    def command(self, *line: str, timeout: float = 60.0) -> str:
        """What a command of Slurm prints, run outside; it must succeed."""
        done = self.network.outside.run(line, self.environment, timeout=timeout)
        assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, script: Path, *options: str) -> str:
        """Submit a script from its folder; returns the job's id."""
        done = self.network.outside.run(
            ["sbatch", "--parsable", *options, script.name], self.environment, cwd=script.parent
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def about(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        words = self.command("scontrol", "show", "job", job, "--oneliner").split()
        return dict(word.partition("=")[::2] for word in words)

    def wait_for(self, job: str, *states: str, timeout: float = 300.0) -> dict[str, str]:
        """What is said of a job once it is in one of these states."""
        deadline = time.monotonic() + timeout
        while (found := self.about(job))["JobState"] not in states:
            assert time.monotonic() < deadline, found
            time.sleep(0.3)
        return found

    def _start(self, stack: ExitStack) -> None:
        work = self.work
        key = work / "munge" / "key"
        key.write_bytes(b"of this test alone" * 8)
        key.chmod(0o600)
        names = ("key-file", "socket", "pid-file", "log-file", "seed-file")
        options = [f"--{name}={work}/munge/{name.removesuffix('-file')}" for name in names]
        self._daemon(stack, self.network.outside, ["munged", "--foreground", "--force", *options])
        self._until(lambda: (work / "munge" / "socket").exists())
        self._daemon(stack, self.network.outside, ["slurmctld", "-D"])
        for host in self.network.hosts:
            self._daemon(stack, host, ["slurmd", "-D"])
        self._until(lambda: self._idle() == len(self.network.hosts))

    def _idle(self) -> int:
        line = ["sinfo", "--noheader", "--Node", "--format=%T"]
        done = self.network.outside.run(line, self.environment)
        return done.stdout.split().count("idle")

    def _until(self, done: Any) -> None:
        deadline = time.monotonic() + START_S
        while not done():
            logs = "".join(path.read_text()[-2000:] for path in self.work.glob("*.log"))
            assert time.monotonic() < deadline, logs
            time.sleep(0.1)

    def _daemon(self, stack: ExitStack, host: Any, line: Sequence[str]) -> None:
        output = stack.enter_context((self.work / f"{line[0]}-{host.name}.out").open("w"))
        process = host.popen(line, self.environment, stdout=output, stderr=subprocess.STDOUT)
        stack.callback(process.wait, 10)
        stack.callback(process.terminate)
