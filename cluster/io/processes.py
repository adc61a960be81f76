"""Identity of processes (machine, pid, start time), and the content of lock files."""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from cluster.io.strict_json import MALFORMED, dumps

TOKEN = re.compile(r"[0-9a-f]{16}")  # part of file names
LARGEST_PID = 1 << 30  # below 1: groups of processes
LATEST = 1e11  # seconds since 1970


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The process that holds a lock."""

    token: str
    """Of this acquisition."""
    host: str
    machine: str
    """Boot id and pid namespace, within which pids are comparable."""
    pid: int
    started: str
    """Start time of the process, since pids are reused."""
    since: float
    """When it took the lock, seconds since 1970 by its clock."""
    run: str = ""
    renewed: int = 0
    """Number of renewals, for storage without modification times
    (`learner.checkpoints.remote_owner`)."""

    @classmethod
    def this_process(cls, run: str = "") -> Self:
        pid = os.getpid()
        return cls(
            token=secrets.token_hex(8),
            host=socket.gethostname(),
            machine=this_machine(),
            pid=pid,
            started=process_start(pid),
            since=time.time(),
            run=run,
        )

    @property
    def here(self) -> bool:
        """Whether it runs, or ran, on this machine."""
        return self.machine == this_machine()

    @property
    def lives(self) -> bool:
        """Whether it is alive; only for one on this machine."""
        if not process_lives(self.pid):
            return False
        now = process_start(self.pid)
        return not (now and self.started) or now == self.started

    def to_bytes(self) -> bytes:
        return (dumps(asdict(self)) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Self | None:
        """None if the data is not the content of a lock."""
        try:
            found = json.loads(data)
            values = {f.name: found[f.name] for f in fields(cls)}
            return cls(**values) if _sound(dict(values)) else None
        except MALFORMED:
            return None


def _sound(values: dict[str, Any]) -> bool:
    """Whether the fields of a lock have valid types and values."""
    pid, since, renewed = (values.pop(name) for name in ("pid", "since", "renewed"))
    if not (type(pid) is int and 0 < pid <= LARGEST_PID and type(renewed) is int):
        return False
    if type(since) not in (int, float) or not 0 <= since < LATEST:
        return False
    texts = values.values()
    return all(isinstance(text, str) and text.isprintable() for text in texts) and bool(
        TOKEN.fullmatch(values["token"])
    )


@contextmanager
def in_environment(name: str, value: str) -> Iterator[None]:
    """Set an environment variable while the block runs."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def this_machine() -> str:
    """Boot id and pid namespace; containers with the same host name differ in it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return f"host {socket.gethostname()}"


def process_start(pid: int) -> str:
    """Start time of a process on this machine, as the system writes it; empty: not known."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
        return text.rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        if Path("/proc/self/stat").exists():
            return ""
    line = ["ps", "-o", "lstart=", "-p", str(pid)]
    try:
        return subprocess.run(line, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def process_lives(pid: int) -> bool:
    """Whether a process of this machine is alive; zombies are not."""
    if not 0 < pid <= LARGEST_PID:  # of a damaged file
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    status = Path(f"/proc/{pid}/stat")
    return not (status.is_file() and status.read_text().rpartition(")")[2].split()[0] == "Z")
