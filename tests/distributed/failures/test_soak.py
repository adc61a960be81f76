"""A long run in which somebody is killed every few seconds: nothing is lost, doubled or leaked."""

from __future__ import annotations

import os
import random
import signal
import threading
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray

from cluster.fleet import InlineFleet
from cluster.ray_backend.fleet import RayFleet
from cluster.ray_session.session import RaySession
from learner.config import RunConfig
from learner.experiment import Experiment
from learner.fleet_plan import fleet_plan
from learner.monitoring.console import RunConsole
from learner.monitoring.metrics import read_metrics
from learner.runs.run_dir import RunDirectory
from tests.distributed.failures.kills import pid_of
from tests.distributed.failures.test_lost_workers import OPTIONS
from tests.small_run import recorded, small_config

EVERY_S = (1.0, 4.0)
MEMORY_MIB = 60.0
"""Growth of the driver that is allowed over the second half."""


class Chaos(threading.Thread):
    """Kills one worker after the other, whichever the seed says, until told to end."""

    def __init__(self, fleet: RayFleet, seed: int) -> None:
        super().__init__(daemon=True)
        self._fleet, self._random, self._over = fleet, random.Random(seed), threading.Event()
        self.killed: list[str] = []

    def run(self) -> None:
        while not self._over.wait(self._random.uniform(*EVERY_S)):
            worker = self._random.choice(list(self._fleet._all()))
            try:
                pid = pid_of(worker)
            except ray.exceptions.RayError:
                continue  # it has not started yet, or is gone
            os.kill(pid, signal.SIGKILL)
            self.killed.append(worker.name)

    def end(self) -> None:
        self._over.set()
        self.join()


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def soak(config: RunConfig, session: RaySession, path: Path) -> tuple[Chaos, list[float]]:
    """A whole run with kills; who they hit, and the driver's memory after each iteration."""
    run = RunDirectory.create(str(path), config)
    memory: list[float] = []

    class Watched(RunConsole):
        def update(self, row: Any) -> None:
            super().update(row)
            memory.append(resident_mib())

    with (
        RayFleet(fleet_plan(config), session) as fleet,
        Watched(config.iterations) as console,
    ):
        chaos = Chaos(fleet, seed=8)
        chaos.start()
        try:
            assert Experiment(config, run, fleet, console, lambda: False).run()
        finally:
            chaos.end()
    return chaos, memory


ITERATIONS = 200


@pytest.mark.slow  # test_lost_workers.py loses each role once
def test_nothing_is_lost_or_doubled(ray_session: RaySession, tmp_path: Path) -> None:
    iterations = ITERATIONS
    output = {"gallery_every": 0, "checkpoint_every": 8}
    options = {**OPTIONS, "output": output, "iterations": iterations, "max_restarts": 10_000}
    config = small_config(**options)
    chaos, memory = soak(config, ray_session, tmp_path / "run")
    print(
        f"killed {len(chaos.killed)}: {chaos.killed}; driver MiB {memory[0]:.0f}..{memory[-1]:.0f}"
    )
    assert chaos.killed

    # every iteration once, with every group and rollout once, judged by all iterations before it
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["iteration"] for row in rows] == list(range(1, iterations + 1))
    for before in range(iterations):
        table = pq.read_table(tmp_path / f"run/rollouts/iteration_{before + 1:06d}.parquet")
        found = list(zip(*(table[name].to_pylist() for name in ("group", "rollout"))))
        groups, rollouts = config.groups_per_iteration, config.rollouts_per_group
        assert found == [(g, k) for g in range(groups) for k in range(rollouts)]
        assert set(table["moments_version"].to_pylist()) == {before}
    assert memory[-1] - memory[len(memory) // 2] < MEMORY_MIB

    with InlineFleet(fleet_plan(config)) as fleet, RunConsole(iterations) as console:
        calm = RunDirectory.create(str(tmp_path / "calm"), config)
        assert Experiment(config, calm, fleet, console, lambda: False).run()
    assert recorded(tmp_path / "run") == recorded(tmp_path / "calm")
