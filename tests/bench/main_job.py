"""The main job as a newcomer runs it: wall time, peak memory of all its processes, console noise.

python -m tests.bench.main_job [-- options of learner.run]
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

NOISE = re.compile(r"warning|traceback|error", re.IGNORECASE)
POLL_S = 0.5


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        arguments = sys.argv[1:] or ["--num-samplers", "2"]
        command = [sys.executable, "-m", "learner.run", "--run-dir", f"{folder}/run", *arguments]
        log = Path(folder) / "console"
        start, peak = time.monotonic(), 0
        with log.open("w") as console:
            process = subprocess.Popen(command, stdout=console, stderr=subprocess.STDOUT)
            while process.poll() is None:
                peak = max(peak, memory_of_tree(process.pid))
                time.sleep(POLL_S)
        seconds = time.monotonic() - start
        text = log.read_text()
    noise = [line for line in text.splitlines() if NOISE.search(line)]
    print(text)
    print(f"RESULT main_job.exit_status={process.returncode}")
    print(f"RESULT main_job.seconds={seconds:.1f}")
    print(f"RESULT main_job.peak_memory_gb={peak / 2**30:.2f}")
    print(f"RESULT main_job.noisy_lines={len(noise)}")


def memory_of_tree(pid: int) -> int:
    """Proportional set size of a process and its descendants, bytes: shared pages count once."""
    try:
        tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    total = 0
    for process in tree:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):  # ended between listing and reading
            continue
    return total


if __name__ == "__main__":
    main()
