"""Two runs with `--reproducible` on a GPU. Not yet run on a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.small_run import flags, recorded

ON_GPU = [
    *("--sampler.num-gpus", "1", "--reward.num-gpus", "1", "--learner.num-gpus", "1"),
    *("--sampler.dtype", "bfloat16", "--learner.precision", "bf16"),
    *("--sampling.top-p", "0.95", "--loss.kl-coef", "0.01"),
]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param([], id="cpu", marks=pytest.mark.slow),
        pytest.param(ON_GPU, id="cuda", marks=pytest.mark.gpu),
    ],
)
def test_two_runs_record_the_same_numbers(options: list[str], tmp_path: Path) -> None:
    """Each in a process of its own, since cuBLAS reads its environment when CUDA starts."""
    names = ("first", "second")
    for name in names:
        command = [sys.executable, "-m", "learner.run", "--inline", "--reproducible", *flags()]
        where = ["--run-dir", str(tmp_path / name)]
        ended = subprocess.run([*command, *options, *where], capture_output=True, text=True)
        assert ended.returncode == 0, ended.stdout + ended.stderr
    first, second = (recorded(tmp_path / name) for name in names)
    assert first == second
    evaluations = [(tmp_path / name / "evaluation.json").read_text() for name in names]
    assert evaluations[0] == evaluations[1]
