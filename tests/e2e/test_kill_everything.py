"""kill -9 of the driver, Ray and every worker; then --resume: as if nothing had been.

The run is resumed inline; with --slow, `tests/distributed/failures/test_resume.py` resumes on Ray.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from learner import report
from learner.monitoring.metrics import read_metrics
from learner.run import main
from tests.small_run import flags, recorded

EVERY, ENOUGH_ROWS = 2, 3
LIMIT_S = 300.0
OPTIONS = [
    *flags(),
    *("--learner.schedule", "constant", "--output.checkpoint-every", str(EVERY)),
    *("--output.gallery-every", "0", "--evaluation.num-images", "0"),
    *("--entropy.controller", "target", "--num-samplers", "1"),
]
"""With a constant schedule, an iteration does not depend on how many are planned."""


def kill_all(driver: subprocess.Popen[bytes]) -> int:
    """The process and all that it started, by their own ids; returns how many."""
    processes = [*psutil.Process(driver.pid).children(recursive=True), psutil.Process(driver.pid)]
    for process in processes:
        try:
            os.kill(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue  # it went with another one
    driver.wait()
    return len(processes)


def newest(run: Path) -> bytes:
    """Weights and optimizer of the last checkpoint, and its name."""
    folder = max((run / "checkpoints").glob("step_*"))
    files = sorted(folder.glob("*.safetensors"))
    assert files
    return folder.name.encode() + b"".join(file.read_bytes() for file in files)


@pytest.mark.parametrize("staleness", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_kill_nine_of_everything_and_resume(
    tmp_path: Path, staleness: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Far from the end, however late the kill comes: the rest is then planned to be short."""
    options = [*OPTIONS, "--max-staleness", str(staleness)]
    calm, hit, log = tmp_path / "calm", tmp_path / "hit", tmp_path / "log"
    command = [sys.executable, "-m", "learner.run", "--run-dir", str(hit), *options]
    with log.open("wb") as console:
        driver = subprocess.Popen(
            [*command, "--iterations", "5000"], stdout=console, stderr=subprocess.STDOUT
        )
    killed, deadline = 0, time.monotonic() + LIMIT_S
    first = hit / "checkpoints" / f"step_{EVERY:06d}"
    try:
        while not first.is_dir() or len(read_metrics(hit / "metrics.jsonl")) < ENOUGH_ROWS:
            assert driver.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
    finally:
        if driver.poll() is None:
            killed = kill_all(driver)
    assert killed > 5

    assert report.main([str(hit)]) == 0
    assert '<span class="state killed">' in (hit / "report.html").read_text()

    iterations = ["--iterations", str(len(read_metrics(hit / "metrics.jsonl")) + 1)]
    assert main(["--resume", "--inline", "--run-dir", str(hit), *iterations]) == 0
    assert "resumed from step_" in capsys.readouterr().out
    assert main(["--inline", "--run-dir", str(calm), *options, *iterations]) == 0
    assert newest(hit) == newest(calm)
    assert recorded(hit) == recorded(calm)
