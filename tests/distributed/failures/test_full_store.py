"""Object store, its disk, and memory full, and a small /dev/shm, each on a Ray of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.distributed.failures.full_store import BYTES

ROOT = Path(__file__).parents[3]
PROGRAM = [sys.executable, "-m", "tests.distributed.failures.full_store"]
DISK = {"RAY_local_fs_capacity_threshold": "0.000001"}  # Ray takes any disk for a full one
MEMORY = {"RAY_memory_usage_threshold": "0.001", "RAY_memory_monitor_refresh_ms": "100"}
LIMIT_S = 300.0


def printed(changes: dict[str, str], command: Sequence[str] = PROGRAM) -> str:
    done = subprocess.run(
        command,
        env={k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | changes,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


SMALL_SHM = "mount -t tmpfs -o size=64m tmpfs /dev/shm"  # as containers have it by default


@pytest.fixture(scope="module")
def small_shm() -> bool:
    """Whether this user may mount one, in a namespace of the command's own."""
    tried = subprocess.run(["unshare", "--mount", "sh", "-c", SMALL_SHM], capture_output=True)
    return tried.returncode == 0


@pytest.fixture(scope="module")
def full(small_shm: bool) -> str:
    """What is printed with store and disk full; with a small /dev/shm, if that can be had."""
    command = [*PROGRAM, "sum"]
    if small_shm:
        command = ["unshare", "--mount", "sh", "-c", f"{SMALL_SHM} && exec {' '.join(command)}"]
    return printed(DISK, command)


def test_a_full_store_and_a_full_disk_are_said(full: str) -> None:
    said = "StoreFullError: sampler: no room for it in the object store, nor on the disk"
    assert said in full
    needs = "The store has 80 MB; the run needs 2 groups in flight, (S + 1) P, with 0.12 GB"
    assert needs in full


def test_with_a_small_shm_the_store_is_on_disk_and_the_run_says_so(
    full: str, small_shm: bool
) -> None:
    if not small_shm:
        pytest.skip("this user may not mount a small /dev/shm")
    assert f"sum {BYTES}\n" in full
    assert "/dev/shm has room for 67.1 MB, less than Ray's object store" in full
    assert "--shm-size" in full


def test_full_memory_is_said() -> None:
    assert "ran out of memory" in printed(MEMORY)


@pytest.mark.slow  # Ray's own: it writes to disk what does not fit
def test_a_full_store_alone_is_no_error() -> None:
    assert "no error" in printed({})
