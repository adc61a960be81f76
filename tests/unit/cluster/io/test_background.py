"""A checkpoint is written and checked beside a worker's other threads, which answer heartbeats:
what takes long there must not keep Python's lock."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cluster.model_files.tensors import write_tensors
from learner.checkpoints.manifest import FileDigest

TENSORS = {f"{number}": torch.zeros(1 << 23) for number in range(10)}  # 336 MB
ATTEMPTS = 5
MOST = 0.2  # of its duration, for which a call may stop all other threads


def longest_stop(call: Callable[[], object]) -> tuple[float, float]:
    """How long another thread stood still during a call, and how long that took; seconds."""
    stops, ended = [0.0], threading.Event()

    def tick() -> None:
        last = time.perf_counter()
        while not ended.is_set():
            time.sleep(0.001)
            now = time.perf_counter()
            stops.append(now - last)
            last = now

    thread = threading.Thread(target=tick)
    thread.start()
    start = time.perf_counter()
    try:
        call()
    finally:
        seconds = time.perf_counter() - start
        ended.set()
        thread.join()
    return max(stops), seconds


@pytest.mark.parametrize("what", ["write", "checksum", "copy"])
def test_other_threads_go_on(tmp_path: Path, what: str) -> None:
    file, other = tmp_path / "policy.safetensors", tmp_path / "other.safetensors"
    write_tensors(file, TENSORS, {})
    calls: dict[str, Callable[[], object]] = {
        "write": lambda: write_tensors(other, TENSORS, {}),
        "checksum": lambda: FileDigest.of(file),
        "copy": lambda: shutil.copyfile(file, other),
    }
    measured = []
    for _ in range(ATTEMPTS):  # on a busy machine a thread may stand still for other reasons
        other.unlink(missing_ok=True)
        stop, seconds = longest_stop(calls[what])
        measured.append(f"{stop:.3f} of {seconds:.3f} s")
        if stop < MOST * seconds:
            return
    pytest.fail(f"another thread stood still for {', '.join(measured)}")
