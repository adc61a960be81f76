"""A Ray cluster on the hosts of a network, with token authentication, as users start one."""

from __future__ import annotations

import contextlib
import json
import secrets
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Self

import psutil

from tests.distributed.hosts.network import BIN, Host, Network, Program

PORT, DASHBOARD = 6379, 8265
START_S = 240.0
STORE_BYTES = 200_000_000

# How soon Ray takes a node for lost. One that is gone refuses each check at once; one that is
# merely slow has time to answer.
QUICK = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "4000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "10",  # after which nodes of a lost head end
    "RAY_raylet_start_wait_time_s": "120",  # machines of tests are busy
}

ASK = """
import os, sys, time, urllib.request
token = open(os.environ["RAY_AUTH_TOKEN_PATH"]).read()
asked = urllib.request.Request(sys.argv[1], headers={"Authorization": f"Bearer {token}"})
deadline = time.monotonic() + float(sys.argv[2])
while True:
    try:
        urllib.request.urlopen(asked, timeout=5).read()
        break
    except OSError as error:
        assert time.monotonic() < deadline, error
        time.sleep(0.2)
"""


class HostCluster:
    """A context manager, too: what it started is killed at its end.

    Args:
        cpus: CPUs of each node, or of each by its place among the hosts.
        head: place of the head's host.
    """

    def __init__(self, network: Network, *, cpus: float | Sequence[float] = 2, head: int = 0):
        self.network = network
        self.head = network.hosts[head]
        self.cpus = cpus
        self.word = secrets.token_hex(4)
        token = network.shared / f"token-{self.word}"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        self.environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        """What a shell needs to talk to it."""
        written = f"[{self.head.address}]" if ":" in self.head.address else self.head.address
        self.address = f"{written}:{PORT}"
        self.dashboard = f"http://{written}:{DASHBOARD}"
        self.members: list[Host] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def start(self, **ray_options: Any) -> Self:
        """Start a head and a node on every other host."""
        self.start_head(**ray_options)
        self.join(*(host for host in self.network.hosts if host is not self.head), **ray_options)
        return self

    def start_head(self, **ray_options: Any) -> None:
        """`ray start --head`; returns when jobs can be submitted.

        Args:
            ray_options: of `ray start`, with underscores; True: a flag without a value. `env`: more
                environment variables.
        """
        options = {"port": PORT, "dashboard_host": self.head.address, "dashboard_port": DASHBOARD}
        self._done(self._start(self.head, ["--head"], options | ray_options))
        if ray_options.get("include_dashboard", True):
            self._until_it_takes_jobs()

    def join(self, *hosts: Host, **ray_options: Any) -> None:
        """`ray start --address` on hosts, at the same time; options as those of the head."""
        line = [f"--address={self.address}"]
        for started in [self._start(host, line, dict(ray_options)) for host in hosts]:
            self._done(started)

    def submit(
        self,
        command: Sequence[str],
        *,
        options: Sequence[str] = (),
        from_host: Host | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = 300.0,
    ) -> subprocess.CompletedProcess[str]:
        """`ray job submit` from outside; its output and errors are in `stdout`.

        Args:
            options: of `ray job submit`.
            env: of the shell; the token's variables if None is given.
        """
        line = self.submission(command, options)
        host, merged = from_host or self.network.outside, {"stderr": subprocess.STDOUT}
        return host.run(line, env=self._shell(env), timeout=timeout, **merged)

    def submission(self, command: Sequence[str], options: Sequence[str] = ()) -> list[str]:
        """The command line of a submission."""
        return ["ray", "job", "submit", f"--address={self.dashboard}", *options, "--", *command]

    def nodes(self) -> dict[str, str]:
        """State of each node (`ALIVE`, `DEAD`) by its address, of several the newest."""
        program = (
            "import json, ray; from ray.util.state import list_nodes;"
            f"print(json.dumps([[n.node_ip, n.state] for n in list_nodes('{self.dashboard}')]))"
        )
        done = self.network.outside.run([str(BIN / "python"), "-c", program], self.environment)
        found: dict[str, str] = {}
        for address, state in json.loads(done.stdout):
            if found.get(address) != "ALIVE":
                found[address] = state
        return found

    def end(self) -> None:
        """Kill what it started, and what that started."""
        for _ in range(3):  # some start others while they are ended
            mine = [each for host in self.members for each in host.processes() if self._mine(each)]
            programs = {child for each in mine for child in _with_children(each)}
            for program in programs:
                with contextlib.suppress(psutil.NoSuchProcess):
                    program.kill()
            psutil.wait_procs(programs, timeout=10)
        self.members.clear()

    def _mine(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get("TESSERA_CLUSTER") == self.word
        except psutil.Error:
            return False

    def _shell(self, env: Mapping[str, str] | None) -> Mapping[str, str]:
        return self.environment if env is None else env

    def _start(self, host: Host, line: Sequence[str], options: dict[str, Any]) -> Program:
        env = {**QUICK, **self.environment, "TESSERA_CLUSTER": self.word, **options.pop("env", {})}
        cpus = self.cpus
        if not isinstance(cpus, (int, float)):
            cpus = cpus[self.network.hosts.index(host)]
        defaults = {
            "node_ip_address": host.address,
            "num_cpus": cpus,
            "num_gpus": 0,
            "resources": json.dumps({host.name: 1}),
            "object_store_memory": STORE_BYTES,
        }
        flags = []
        for name, value in (defaults | options).items():
            flag = "--" + name.replace("_", "-")
            flags += [flag] if value is True else [f"{flag}={value}"]
        self.members += [host] if host not in self.members else []
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return host.popen(["ray", "start", *line, *flags], env, **pipes)

    def _done(self, started: Program) -> None:
        try:
            said, _ = started.communicate(timeout=START_S)
        except subprocess.TimeoutExpired:
            started.kill()
            raise
        assert started.returncode == 0, said

    def _until_it_takes_jobs(self) -> None:
        line = [sys.executable, "-c", ASK, f"{self.dashboard}/api/jobs/", str(START_S)]
        done = self.head.run(line, self.environment, timeout=2 * START_S)
        assert done.returncode == 0, done.stderr


def _with_children(process: psutil.Process) -> list[psutil.Process]:
    """Some of Ray's processes write their name over their environment."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return [process, *process.children(recursive=True)]
    return []
