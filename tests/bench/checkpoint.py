"""How long a checkpoint blocks the main loop, with and without a background thread.

    python -m tests.bench.checkpoint [--parameters 40000000] [--mib-per-s 100]

A learner's files (policy and two averages, fp32) go to a disk that takes so many MiB a second: the
real write, then a pause for the rest of the time. Meanwhile the loop takes steps of fixed length.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from cluster.io.background import Background
from cluster.io.files import MIB
from learner.grpo.entropy import EntropyState
from learner.training.state_files import LearnerFiles, LearnerState, TensorFile

STEP_S = 0.1
STEPS = 80


def files_of(parameters: int) -> LearnerFiles:
    side = 1 << 20
    count = max(parameters // side, 1)
    parts = {
        name: TensorFile({f"{name}{i}": torch.randn(side) for i in range(count)})
        for name in ("policy", "exp_avg", "exp_avg_sq")
    }
    return LearnerFiles(parts, LearnerState(0, EntropyState(0.0), None))


def slow(content: LearnerFiles, folder: Path, mib_per_s: float) -> None:
    start = time.monotonic()
    content.write(folder)
    size = sum(file.stat().st_size for file in folder.iterdir()) / MIB
    time.sleep(max(size / mib_per_s - (time.monotonic() - start), 0.0))


def loop(save: Callable[[], None], done: Callable[[], bool]) -> tuple[float, float]:
    """Seconds that `save` blocks the loop, and the longest step during the write."""
    start = time.monotonic()
    save()
    held, longest = time.monotonic() - start, 0.0
    for _ in range(STEPS):
        begun = time.monotonic()
        while time.monotonic() - begun < STEP_S:
            torch.zeros(1000).add_(1)
        longest = max(longest, time.monotonic() - begun)
        if done():
            break
    return held, longest


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parameters", type=int, default=40_000_000)
    parser.add_argument("--mib-per-s", type=float, default=100.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    content = files_of(options.parameters)
    with tempfile.TemporaryDirectory() as folder:
        held, _ = loop(lambda: slow(content, Path(folder), options.mib_per_s), lambda: True)
    with tempfile.TemporaryDirectory() as folder:
        tasks: list[Background] = []

        def save() -> None:
            copy = content.copied()
            tasks.append(Background("write", lambda: slow(copy, Path(folder), options.mib_per_s)))

        background, longest = loop(save, lambda: tasks[0].done())
        tasks[0].done(600)
    size = 12 * options.parameters / MIB
    print(f"{size:.0f} MiB to a disk of {options.mib_per_s:g} MiB/s")
    print(f"  without background: the loop stands still for {held:.2f} s")
    print(
        f"  with background:    {background:.2f} s; its longest step of {STEP_S} s: {longest:.2f} s"
    )
    print(f"RESULT checkpoint.held_s={held:.3f}")
    print(f"RESULT checkpoint.held_background_s={background:.3f}")
    print(f"RESULT checkpoint.held_ratio={held / background:.1f}")
    print(f"RESULT checkpoint.longest_step_s={longest:.3f}")


if __name__ == "__main__":
    main()
