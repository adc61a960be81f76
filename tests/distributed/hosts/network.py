"""Hosts on one machine, each with its own address, processes, host name, /tmp and /dev/shm.

A host is a set of Linux namespaces (network, mounts, processes, host name) that one process holds;
a switch is a network namespace with a bridge, to which every host has a cable (a veth pair). None
of them has a name on the machine: they end with the process that holds them, and that ends with the
test's, however that ends. So networks do not meet: each has the addresses 10.77.0.0/24.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import psutil

ROOT = Path(__file__).parents[3]
BIN = Path(sys.executable).parent
TOOLS = ("ip", "tc", "unshare", "nsenter", "mount")
START_S = 30.0
MTU = 1500

HOLD = "echo up; until cat >/dev/null; do :; done; exit"
"""Holds a namespace until its input ends, also if `cat` is killed with all others. Orphans of which
it becomes the parent are reaped: a shell that waits for one child takes the end of any (`exec cat`
would leave them as zombies)."""

SWITCH = f"""set -e
ip link set lo up
ip link add switch type bridge forward_delay 0
ip link set switch up
{HOLD.removesuffix("; exit")}
rm -rf "$1"
"""

HOST = f"""set -e
name=$1 shm=$2 work=$3; shift 3
echo "$name" >/proc/sys/kernel/hostname
mount --bind "$work/hosts" /etc/hosts
mount -t tmpfs -o mode=1777 "$name" "$work/stage"
for path in "$@"; do
    mkdir -p "$work/stage/${{path#/tmp/}}"
    mount --rbind "$path" "$work/stage/${{path#/tmp/}}"
done
mkdir -p "$work/stage/home"
cat /proc/sys/kernel/random/uuid >"$work/stage/.boot"
mount --move "$work/stage" /tmp
mount -t tmpfs -o "mode=1777,size=$shm" "$name" /dev/shm
mount --bind /tmp/.boot /proc/sys/kernel/random/boot_id
{HOLD}"""


@dataclass(frozen=True)
class Traffic:
    """Bytes that went over a host's cable since it was laid."""

    sent: int
    received: int

    def __sub__(self, before: Traffic) -> Traffic:
        return Traffic(self.sent - before.sent, self.received - before.received)


class Program(subprocess.Popen[str]):
    """A program on a host: signals reach it, not the one that entered the host's namespaces."""

    def send_signal(self, sig: int) -> None:
        deadline = time.monotonic() + 5
        while self.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                for program in psutil.Process(self.pid).children():
                    return program.send_signal(sig)
            if time.monotonic() > deadline:  # it does not even enter
                return super().send_signal(sig)
            time.sleep(0.01)


@dataclass
class Holder:
    """The process in whose namespaces others run."""

    process: subprocess.Popen[str]
    """`unshare`, which ends its child when it ends."""
    pid: int

    @classmethod
    def start(cls, flags: Sequence[str], script: str, *arguments: str) -> Self:
        line = ["unshare", *flags, "--fork", "--kill-child", "sh", "-c", script, "sh", *arguments]
        pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        process = subprocess.Popen(line, text=True, start_new_session=True, **pipes)
        if process.stdout.readline() != "up\n":
            process.kill()
            raise OSError(f"namespaces refused: {process.communicate()[1].strip()}")
        (child,) = psutil.Process(process.pid).children()
        return cls(process, child.pid)

    def enter(self, *flags: str) -> list[str]:
        return ["nsenter", f"--target={self.pid}", *flags, "--"]

    def do(self, command: str) -> None:
        """Run a command of iproute2 in its network.

        Raises:
            OSError: with what the command said.
        """
        line = [*self.enter("--net"), *command.split()]
        done = subprocess.run(line, capture_output=True, text=True, timeout=START_S)
        if done.returncode:
            raise OSError(f"{command}: {done.stderr.strip()}")

    def end(self) -> None:
        if self.process.poll() is None:  # so its child, whose number is not another's
            with contextlib.suppress(OSError):
                os.kill(self.pid, signal.SIGKILL)  # and with it all processes of its namespace
        self.process.kill()
        self.process.communicate(timeout=START_S)


@dataclass
class Host:
    """A host of a network."""

    name: str
    address: str
    holder: Holder = field(repr=False)
    switch: Holder = field(repr=False)

    def popen(
        self, command: Sequence[str], env: Mapping[str, str] | None = None, **options: Any
    ) -> Program:
        """Start a program here; by default in the checkout, with text pipes if any.

        Args:
            env: added to this process's environment, from which what points to a Ray, a proxy or
                the user's own folders is taken out.
            options: of `subprocess.Popen`.
        """
        options = {"text": True, "start_new_session": True, "stdin": subprocess.DEVNULL} | options
        folder = os.fspath(options.pop("cwd", ROOT))
        enter = self.holder.enter("--net", "--mount", "--uts", "--ipc", "--pid")
        line = [*enter, "env", f"--chdir={folder}", *map(str, command)]
        return Program(line, env=environment() | dict(env or {}), **options)

    def run(
        self,
        command: Sequence[str],
        env: Mapping[str, str] | None = None,
        timeout: float = 120.0,
        **options: Any,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program here to its end; its output is captured.

        Raises:
            subprocess.TimeoutExpired: it is killed first.
        """
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        with self.popen(command, env, **pipes) as program:
            try:
                out, err = program.communicate(timeout=timeout)
            except BaseException:
                program.kill()
                raise
        return subprocess.CompletedProcess(list(command), program.returncode, out, err)

    def traffic(self) -> Traffic:
        """Bytes over its cable, with the headers of Ethernet."""
        for line in Path(f"/proc/{self.holder.pid}/net/dev").read_text().splitlines():
            name, _, counters = line.partition(":")
            if name.strip() == "eth0":
                values = [int(value) for value in counters.split()]
                return Traffic(sent=values[8], received=values[0])
        raise OSError(f"{self.name} has no cable any more")

    def limit(self, bits_per_second: float | None) -> None:
        """Limit its cable, each direction by itself; None: as fast as the machine is."""
        for side, device in ((self.holder, "eth0"), (self.switch, self.name)):
            if bits_per_second is None:
                with contextlib.suppress(OSError):  # it has none
                    side.do(f"tc qdisc del dev {device} root")
                continue
            rate, burst = int(bits_per_second), max(64 << 10, int(bits_per_second / 8 * 2e-3))
            tbf = f"tbf rate {rate}bit burst {burst} latency 50ms"
            side.do(f"tc qdisc replace dev {device} root {tbf}")

    def cut(self) -> None:
        """Pull the cable out at the switch: its programs go on, and nothing of them gets out."""
        self.switch.do(f"ip link set {self.name} down")

    def mend(self) -> None:
        """Put the cable back."""
        self.switch.do(f"ip link set {self.name} up")

    def processes(self) -> list[psutil.Process]:
        """Its programs."""
        mine = os.stat(f"/proc/{self.holder.pid}/ns/pid").st_ino
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.Error):
                inside = os.stat(f"/proc/{process.pid}/ns/pid").st_ino == mine
                if inside and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return [process for process in found if not self._holds(process)]

    def _holds(self, process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.Error):
            waits = process.ppid() == self.holder.pid and process.cmdline() == ["cat"]
            return waits or process.pid == self.holder.pid
        return True  # it has ended

    def kill(self) -> None:
        """End all its programs at once, as a loss of power does; new ones may be started then, and
        find its /tmp as it was."""
        all_that_it_sees = ["sh", "-c", "kill -9 -1"]  # itself and the holder left out
        deadline = time.monotonic() + START_S
        while self.processes():
            subprocess.run([*self.holder.enter("--pid", "--mount"), *all_that_it_sees])
            if time.monotonic() > deadline:
                raise OSError(f"{self.name} goes on: {self.processes()}")
            time.sleep(0.02)


class Network:
    """A context manager: hosts `host-1`, `host-2`, ... and a client `outside` on one switch.

    Args:
        count: of the hosts, without the client.
        shm_mb: size of each /dev/shm in MB (64 in a Docker container); None: half the memory.
        ipv6: addresses of IPv6 instead of IPv4 (loopback has both).
    """

    def __init__(self, count: int = 3, *, shm_mb: int | None = None, ipv6: bool = False) -> None:
        self.count, self.shm_mb, self.ipv6 = count, shm_mb, ipv6
        self.word = secrets.token_hex(4)
        self.hosts: list[Host] = []
        self.outside: Host
        self.shared: Path
        """A directory that all hosts and this process see at one path."""

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._work = Path(tempfile.mkdtemp(prefix=f"tessera-{self.word}-")).resolve()
            stack.callback(shutil.rmtree, self._work, ignore_errors=True)
            self.shared = self._work / "shared"
            for folder in ("shared", "stage"):
                (self._work / folder).mkdir()
            names = [f"host-{number}" for number in range(1, self.count + 1)] + ["outside"]
            addresses = [self._address(number) for number in range(1, len(names) + 1)]
            lines = [f"{address} {name}\n" for name, address in zip(names, addresses)]
            known = "127.0.0.1 localhost\n::1 localhost\n" + "".join(lines)
            (self._work / "hosts").write_text(known)
            self._switch = Holder.start(["--net"], SWITCH, str(self._work))
            stack.callback(self._switch.end)
            for name, address in zip(names, addresses):
                self.hosts.append(self._host(stack, name, address))
            self.outside = self.hosts.pop()
            self._ended = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.close()
        self.hosts.clear()

    def _address(self, number: int) -> str:
        return f"fd77::{number:x}" if self.ipv6 else f"10.77.0.{number}"

    def _host(self, stack: ExitStack, name: str, address: str) -> Host:
        flags = ["--net", "--mount", "--uts", "--ipc", "--pid", "--mount-proc"]
        size = "50%" if self.shm_mb is None else f"{self.shm_mb}m"
        arguments = (name, size, str(self._work), *map(str, needed(self._work)))
        holder = Holder.start(flags, HOST, *arguments)
        stack.callback(holder.end)
        end = f"mtu {MTU} type veth peer name eth0 mtu {MTU} netns {holder.pid}"
        self._switch.do(f"ip link add {name} {end}")
        self._switch.do(f"ip link set {name} master switch up")
        holder.do("ip link set lo up")
        length = "64 nodad" if self.ipv6 else "24"  # nodad: to be used at once
        holder.do(f"ip address add dev eth0 {address}/{length}")
        holder.do("ip link set eth0 up")
        return Host(name, address, holder, self._switch)


def needed(work: Path) -> list[Path]:
    """What programs need of the machine's /tmp, which is hidden on hosts."""
    wanted = [ROOT, Path(sys.prefix), Path(sys.base_prefix), *map(Path, sys.path), work / "shared"]
    folders = {path.resolve() for path in wanted if path.is_dir()}
    return sorted(path for path in folders if path.is_relative_to("/tmp") and path != Path("/tmp"))


def environment() -> dict[str, str]:
    """This process's, without what points to a Ray, a proxy or the user's own folders."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("RAY_", "XDG_")) and not name.lower().endswith("_proxy")
        and name not in ("TMPDIR", "PYTEST_CURRENT_TEST")
    }  # fmt: skip
    path = f"{BIN}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    return {**kept, "HOME": "/tmp/home", "PATH": path, "RAY_USAGE_STATS_ENABLED": "0"}


@functools.cache
def why_not() -> str:
    """Why this machine does not permit such networks; empty: it does."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if sys.platform != "linux" or missing:
        return f"hosts need Linux with {', '.join(TOOLS)}; not here: {', '.join(missing)}"
    if os.geteuid():
        return "hosts are made by root alone"
    try:
        with Network(1) as network:
            network.outside.limit(1e9)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        return f"this machine permits no hosts: {error}"
    return ""
