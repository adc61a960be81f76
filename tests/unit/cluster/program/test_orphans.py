"""A worker whose parent is killed ends; one whose parent lives does not."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[4]
WORKER = """
import time
from cluster.program.orphans import ending_with_parent
class Role:
    def __init__(self, config, name): self.name = name
made = ending_with_parent(Role)
assert made.__name__ == "Role" and made(None, name="sampler-0").name == "sampler-0"
print("up", flush=True)
time.sleep(60)
"""
PARENT = """
import subprocess, sys
worker = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, text=True)
worker.stdout.readline()
print(worker.pid, flush=True)
worker.wait()
"""


def test_a_worker_ends_with_its_parent() -> None:
    line = [sys.executable, "-c", PARENT, WORKER]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, cwd=ROOT) as parent:
        assert parent.stdout is not None
        worker = psutil.Process(int(parent.stdout.readline()))
        time.sleep(2.5)
        assert worker.is_running()
        parent.kill()
    _, alive = psutil.wait_procs([worker], timeout=20)
    assert not alive
