"""What tells one process from every other one: its machine, its number, and when it began."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path


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
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    status = Path(f"/proc/{pid}/stat")
    return not (status.is_file() and status.read_text().rpartition(")")[2].split()[0] == "Z")
