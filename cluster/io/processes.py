"""What tells one process from every other one (its machine, its number, and when it began), and how
a lock names it."""

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

TOKEN = re.compile(r"[0-9a-f]{16}")  # becomes part of file names
LARGEST_PID = 1 << 30  # smaller ones than 1 are groups of processes
LATEST = 1e11  # seconds since 1970


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The process that a lock names."""

    token: str
    """Of this one acquisition."""
    host: str
    machine: str
    """Boot and process namespace: where process numbers mean the same."""
    pid: int
    started: str
    """When the process began, which tells it from a later one of the same number."""
    since: float
    """When it took the lock, seconds since 1970 by its own clock."""
    run: str = ""
    renewed: int = 0
    """How often, where the file has no modification time to tell
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
        """Whether this process can see that one, if it lives."""
        return self.machine == this_machine()

    @property
    def lives(self) -> bool:
        """Of one that is here."""
        if not process_lives(self.pid):
            return False
        now = process_start(self.pid)
        return not (now and self.started) or now == self.started

    def to_bytes(self) -> bytes:
        return (dumps(asdict(self)) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Self | None:
        """None if that is no lock's content."""
        try:
            found = json.loads(data)
            values = {f.name: found[f.name] for f in fields(cls)}
            return cls(**values) if _sound(dict(values)) else None
        except MALFORMED:
            return None


def _sound(values: dict[str, Any]) -> bool:
    """Whether a lock's fields are what they are read as, and shown as, by whoever finds it."""
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
    """While the block runs, the variable has this value, also for processes that it starts."""
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
    """Where process numbers mean the same as here: one boot of a kernel, one process namespace
    (containers that share a host name, or a process number, differ in it)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return f"host {socket.gethostname()}"


def process_start(pid: int) -> str:
    """When a process of this machine began, in its machine's own terms; empty if that cannot be
    known."""
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
    """Whether a process of this machine is there; one that ended and was not waited for is not."""
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
