"""The study as users run it: killed at any point, the same command writes the same results."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

KILLED_AT = ("building networks", "training arms", "evaluating")


def command(out: Path) -> list[str]:
    return [
        sys.executable, "-u", "-m", "learner.miniature.arms", "--part", "ablations",
        "--out", str(out), "--seeds", "1", "2", "--arms", "instance + LOO-FID", "decay 0",
        "--iterations", "4", "--scale", "0.002", "--workers", "1",
    ]  # fmt: skip


def kill_at(out: Path, stage: str) -> None:
    """Kill -9 when the first job of a stage is done; its other processes end by themselves."""
    with subprocess.Popen(command(out), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(f"{stage}:"):
                break
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    end = time.monotonic() + 20
    while any(child.is_running() for child in children) and time.monotonic() < end:
        time.sleep(0.1)
    assert [child for child in children if child.is_running()] == []


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_part_that_is_killed_at_any_point_gives_the_same_results(tmp_path: Path) -> None:
    whole = subprocess.run(command(tmp_path / "a"), capture_output=True, text=True, check=True)
    assert "base, CFG 2" in whole.stdout  # the table
    for stage in KILLED_AT:
        kill_at(tmp_path / "b", stage)
        assert not (tmp_path / "b" / "ablations.csv").exists()
    again = subprocess.run(command(tmp_path / "b"), capture_output=True, text=True, check=True)
    assert again.returncode == 0
    first, second = ((tmp_path / name / "ablations.csv").read_bytes() for name in "ab")
    assert first == second
    assert len(first.splitlines()) > 2 * 4 * 15
    assert not list((tmp_path / "b").rglob("*.partial"))
