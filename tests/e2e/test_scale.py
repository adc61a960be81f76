"""`python -m cluster.scale` beside a running job, as a user types it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cluster.io.run_layout import DISCOVERY_FILE
from tests.small_run import flags

ROOT = Path(__file__).parents[2]
START_S = 300.0
SLOW = "tests.stand_ins:Brightness=0.2,seconds=0.2"


def test_a_running_job_is_scaled_from_another_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its name, whatever the working directory is, by a user who had no token yet."""
    run, log, home = tmp_path / "night", tmp_path / "console", tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def command(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", f"cluster.{name}", *arguments]
        return subprocess.run(line, cwd=home, capture_output=True, text=True, timeout=START_S)

    def scale(*arguments: str) -> subprocess.CompletedProcess[str]:
        return command("scale", *arguments)

    options = [*flags(), "--iterations", "5000", "--evaluation.num-images", "0"]
    line = [sys.executable, "-m", "learner.run", *options, "--run-dir", str(run)]
    with log.open("w") as console:
        job = subprocess.Popen([*line, "--rewards.extra", SLOW], stdout=console, stderr=console)
    try:
        deadline = time.monotonic() + START_S
        while not (run / DISCOVERY_FILE).is_file():
            assert job.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        status = command("status", "--run", "night")
        if not json.loads((run / DISCOVERY_FILE).read_text())["address"]:  # it still is
            assert status.returncode == 0, status.stderr
            assert f"run night: starting  {run}" in status.stdout
        while not json.loads((run / DISCOVERY_FILE).read_text())["address"]:
            assert job.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        assert (home / ".ray" / "auth_token").stat().st_mode & 0o077 == 0
        grown = scale("--run", "night", "--reward-servers", "2", "--samplers", "3")
        assert grown.returncode == 0, grown.stderr + log.read_text()
        assert "sampler: 3 serving, 0 starting, 0 leaving" in grown.stdout
        assert "reward-server: 2 serving" in grown.stdout
        shown = scale("--run", str(run))
        assert "run night\nsampler: 3 serving" in shown.stdout
        unknown = scale("--run", str(run), "--pool", "other", "2")
        assert unknown.returncode == 1
        assert unknown.stderr == (
            "error: no role 'reward-other': there are sampler, reward-server\n"
        )
        job.send_signal(signal.SIGINT)
        assert job.wait(60) == 130
    finally:
        if job.poll() is None:
            for process in [*psutil.Process(job.pid).children(recursive=True), job]:
                process.kill()
    assert not (run / DISCOVERY_FILE).exists()
    assert "reward-server: 1 -> 2 workers, as asked for" in log.read_text()
    ended = scale("--run", "night", "--samplers", "1")
    assert ended.returncode == 1
    assert f"no run is active in {run}: it has ended; newest checkpoint: step_" in ended.stderr
    assert ended.stderr.endswith(f"python -m learner.run --resume --run-dir {run}\n")
