"""How a command's process ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

LONG_WORK = """
import threading, time
def main():
    threading.Thread(target=time.sleep, args=({thread},), name="theirs").start()
    print("worked")
    {end}
"""
SCRIPT = """
import sys
from cluster.program import start
start.LINGER_S = {linger}
sys.exit(start.run_command("long_work"))
"""


def run(work: str, linger: float, directory: Path) -> subprocess.CompletedProcess[str]:
    (directory / "long_work.py").write_text(work)
    script = f"import sys; sys.path.insert(0, {str(directory)!r})" + SCRIPT.format(linger=linger)
    line = [sys.executable, "-c", script]
    return subprocess.run(line, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(("end", "status"), [("return 3", 3), ("raise KeyError('odd')", 1)])
def test_a_thread_that_never_ends_does_not_keep_the_process(
    end: str, status: int, tmp_path: Path
) -> None:
    """As one that a reward starts where it is built, in the inline fleet."""
    done = run(LONG_WORK.format(thread=600, end=end), 0.2, tmp_path)
    assert done.stdout == "worked\n"
    assert done.stderr.endswith("note: ended while threads are running: theirs\n")
    assert ("KeyError: 'odd'" in done.stderr) == (status == 1)
    assert done.returncode == status


def test_a_thread_that_ends_soon_is_waited_for(tmp_path: Path) -> None:
    done = run(LONG_WORK.format(thread=0.3, end="return 3"), 60.0, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (3, "worked\n", "")
