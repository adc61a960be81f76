"""A second start beside a run; a run whose directory was taken over; a requeue by the same line."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.io.locks import read_lock
from cluster.io.processes import Holder
from cluster.io.run_layout import LOG, OWNER
from learner.monitoring.metrics import read_metrics
from learner.run import REFUSED, main
from tests.small_run import flags

LIMIT_S = 300.0
OPTIONS = [
    *flags(),
    *("--output.checkpoint-every", "2", "--output.gallery-every", "0"),
    *("--evaluation.num-images", "0", "--inline"),
]


def written(run: Path) -> dict[str, tuple[int, int]]:
    """Every file with its size and time; but the log, which says what happened, and the events,
    which are each process's own."""
    files = [path for path in run.rglob("*") if path.is_file() and path.name != LOG]
    files = [path for path in files if path.parent.name != "tensorboard"]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def test_a_run_and_who_else_wants_its_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, log = tmp_path / "A", tmp_path / "console"
    line = [*OPTIONS, "--auto-resume", "--run-dir", str(run)]
    with log.open("w") as console:
        command = [sys.executable, "-m", "learner.run", *line, "--iterations", "100000"]
        process = subprocess.Popen(command, stdout=console, stderr=console)
    try:
        deadline = time.monotonic() + LIMIT_S
        while not (run / "checkpoints" / "step_000002").is_dir():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        for extra in (["--resume"], ["--resume", "--from-step", "999"], ["--auto-resume"]):
            assert main(["--inline", "--run-dir", str(run), *extra]) == REFUSED
            assert f"in use by process {process.pid}" in capsys.readouterr().err
        rows = len(read_metrics(run / "metrics.jsonl"))
        while len(read_metrics(run / "metrics.jsonl")) < rows + 3:  # as if nothing had been
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)

        process.send_signal(signal.SIGSTOP)  # a machine that sleeps, while another one takes over
        found = read_lock(run / OWNER)
        assert found is not None
        assert found.holder is not None
        assert found.holder.pid == process.pid
        other = replace(Holder.this_process("A"), host="node7", machine="other", pid=1)
        (run / OWNER).write_bytes(other.to_bytes())
        before = written(run)
        process.send_signal(signal.SIGCONT)
        assert process.wait(LIMIT_S) == 1, log.read_text()
        assert "does not belong to this process" in log.read_text()
        assert "process 1 on node7 (run A)" in " ".join(log.read_text().split())
        partial = [name for name in before if "/checkpoints/." in name]  # its own, which may go
        after = written(run)
        assert {k: v for k, v in before.items() if k not in partial} == {
            k: v for k, v in after.items() if k not in partial
        }
    finally:
        process.kill()
        process.wait(LIMIT_S)

    dead = replace(Holder.this_process("A"), started="1")  # as after kill -9
    (run / OWNER).write_bytes(dead.to_bytes())
    steps = sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step_*"))
    last = steps[-1] + 1
    assert main([*line, "--iterations", str(last)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "took over the run directory" in said
    assert f"resumed from step_{steps[-1]:06d}" in said
    numbers = [row["iteration"] for row in read_metrics(run / "metrics.jsonl")]
    assert numbers == list(range(numbers[0], numbers[0] + last))
    assert not (run / OWNER).exists()
