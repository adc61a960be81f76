"""Object store, its disk, and memory full, on a Ray of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FULL = {
    "store and disk": (
        {"RAY_local_fs_capacity_threshold": "0.000001"},  # Ray takes any disk for a full one
        (
            "StoreFullError: sampler: no room for it in the object store, nor on the disk",
            "The store has 80 MB; the run needs 2 groups in flight, (S + 1) P, with 0.12 GB",
        ),
    ),
    "memory": (
        {"RAY_memory_usage_threshold": "0.001", "RAY_memory_monitor_refresh_ms": "100"},
        ("ran out of memory",),
    ),
    "store alone": ({}, ("no error",)),  # Ray writes to disk what does not fit
}


SLOW = ("store alone",)


@pytest.mark.parametrize(
    "what", [pytest.param(w, marks=pytest.mark.slow) if w in SLOW else w for w in FULL]
)
def test_what_is_full_is_said(what: str) -> None:
    changes, expected = FULL[what]
    done = subprocess.run(
        [sys.executable, "-m", "tests.distributed.failures.full_store"],
        env={k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | changes,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for text in expected:
        assert text in done.stdout
