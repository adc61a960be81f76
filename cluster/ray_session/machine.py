"""Checks of this machine before a private Ray starts (addresses, open files, directory of sockets
and logs), since Ray's own errors rarely name the cause.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import tempfile
from pathlib import Path

from cluster.errors import FleetError
from cluster.io.files import MIB, advice
from cluster.ray_session import private
from cluster.ray_session.address import temp_root

LEAST_FILES = 256  # raylet: 55, and 3 to 4 for every worker
LEAST_FREE = 16 * MIB  # Ray's sockets and logs
LONGEST_SOCKET = 107  # bytes of the path of a Unix socket
SOCKET = "session_2000-01-01_00-00-00_000000_1234567/sockets/plasma_store"
SHARED_MEMORY = "/dev/shm"
TEMP_OPTION = "--ray.temp-dir"
BUSY = ("timed out", "overloaded", "timeout")


def check_machine(temp_dir: str) -> None:
    """Check that a private Ray can start here.

    Args:
        temp_dir: for its sockets and logs; empty: Ray's choice.

    Raises:
        FleetError: it cannot; says why, and what to do.
    """
    check_loopback(private.loopback_address())
    check_open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    check_temp_root(temp_root(temp_dir), _chosen_by(temp_dir))


def shared_memory() -> int:
    """Free bytes of shared memory, where Ray keeps its object store."""
    try:
        there = os.statvfs(SHARED_MEMORY)
    except OSError:
        return 0
    return there.f_bavail * there.f_frsize


def check_loopback(address: str) -> None:
    """Refuse the loopback address on which Ray's agent cannot listen (2.60: its Prometheus exporter
    opens IPv4 sockets only).

    Raises:
        FleetError: it is IPv6.
    """
    if ":" in address:
        raise FleetError(
            "this machine has IPv6 addresses alone, and a private Ray does not start on "
            f"{address}: give the machine any IPv4 address (`ip address add 192.0.2.1/32 dev lo`), "
            "start a cluster on its own address (`ray start --head --node-ip-address=...`) and "
            "name it by --ray.address, or run in one process, --inline"
        )


def check_open_files(limit: int) -> None:
    """Refuse a limit on open files with which Ray's processes would crash.

    Raises:
        FleetError: it is too low.
    """
    if limit != resource.RLIM_INFINITY and limit < LEAST_FILES:
        raise FleetError(
            f"this process may open at most {limit} files (`ulimit -n`), and a private Ray needs "
            f"{LEAST_FILES}, and 4 more for every worker: raise the limit (`ulimit -n 4096`; where "
            "that is refused, in limits.conf or by the container's --ulimit nofile), or run in one "
            "process, --inline"
        )


def check_temp_root(root: Path, source: str) -> None:
    """Check that Ray can keep sockets and logs in a directory.

    Args:
        source: option or variable that names it, for messages.

    Raises:
        FleetError: it cannot.
    """
    if not root.is_absolute():
        raise FleetError(
            f"Ray's sockets and logs would be in {root} ({source}), which is no absolute path: "
            "Ray's processes have other working directories. Write it in full, from /"
        )
    length = len(os.fsencode(root / SOCKET))
    if length > LONGEST_SOCKET:
        raise FleetError(
            f"Ray's sockets would be in {root} ({source}), with paths of {length} bytes, and the "
            f"system takes {LONGEST_SOCKET}: name a shorter directory, as in {TEMP_OPTION} /tmp/ray"
        )
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=root) as file:
            file.write(b"0" * 4096)
            file.flush()
        free = shutil.disk_usage(root).free
    except OSError as error:
        raise FleetError(
            f"a private Ray cannot keep its sockets and logs in {root} ({source}): "
            f"{error.strerror or error}. {advice(error.errno)}, or name another directory by "
            f"{TEMP_OPTION}"
        ) from error
    if free < LEAST_FREE:
        raise FleetError(
            f"a private Ray keeps its sockets and logs in {root} ({source}), where only "
            f"{free / MIB:.1f} MiB are free: make room, or name another directory by {TEMP_OPTION}"
        )


def _chosen_by(temp_dir: str) -> str:
    if temp_dir:
        return TEMP_OPTION
    names = [f"${name}" for name in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(name)]
    return names[0] if names else "Ray's default"


def why_not_started(error: BaseException, root: Path) -> str:
    """Message for an error of `ray.init` for a private Ray, with what to do where that is known.

    Args:
        root: directory of its logs.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    start = f"cannot start a private Ray: {text.rstrip('.')}"
    if isinstance(error, OSError) and error.errno is not None and error.errno != errno.ETIMEDOUT:
        return f"{start}. {advice(error.errno)}"
    if "/dev/shm" in text:
        return f"{start}. A smaller one is set by --ray.object-store-memory (in GB)"
    if isinstance(error, TimeoutError) or any(word in text.lower() for word in BUSY):
        return f"{start}. On a machine that is very busy it helps to try again"
    return f"{start}. Its logs are in {root / 'session_latest' / 'logs'}"
