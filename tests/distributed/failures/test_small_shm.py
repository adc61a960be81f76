"""The default of Docker: /dev/shm with 64 MB."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.failures.small_shm import BYTES

ROOT = Path(__file__).parents[3]
MOUNT = "mount -t tmpfs -o size=64m tmpfs /dev/shm"


def test_the_store_goes_to_disk_and_the_run_says_so() -> None:
    apart = ["unshare", "--mount", "sh", "-c"]
    tried = subprocess.run([*apart, MOUNT], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"this user may not mount a small /dev/shm: {tried.stderr.strip()}")
    command = f"{MOUNT} && exec {sys.executable} -m tests.distributed.failures.small_shm"
    found = subprocess.run([*apart, command], cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert found.returncode == 0, found.stdout + found.stderr
    assert f"sum {BYTES}\n" in found.stdout
    assert "/dev/shm has room for 67.1 MB, less than Ray's object store" in found.stdout
    assert "--shm-size" in found.stdout
