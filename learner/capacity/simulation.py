"""A run in virtual time: the real main loop, pipeline and fleet; workers that take their service
times. Seconds of CPU for hours of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cluster.errors import ConfigError, LearnerLostError, did_you_mean
from cluster.messages import MAIN_SPACE
from cluster.roles import FleetPlan, Role
from cluster.simulation.actors import Work, instant
from cluster.simulation.behaviours import Draws, SimulatedRewardServer, SimulatedSampler, Worker
from cluster.simulation.fleet import SimulatedFleet, simulated_fleet
from cluster.simulation.specification import Failure, SimulatedCluster
from cluster.spans import Span
from learner.capacity.service_times import ServiceTimes
from learner.config import RunConfig
from learner.fleet_plan import fleet_plan
from learner.loop import Iteration, train
from learner.rollouts.feature_space import RewardSpace
from learner.training.batch import StepReport, TrainingBatch
from rewards.distribution.distribution_reward import DistributionReward


class SimulatedMoments(Worker):
    """A moments server: commits in order."""

    times: ServiceTimes

    def __init__(self, role: Role, name: str, times: ServiceTimes, draws: Draws) -> None:
        super().__init__(role, name, times, draws)
        self._done = 0

    def commit(
        self, iteration: int, features: Mapping[str, np.ndarray], valid: np.ndarray, **_: object
    ) -> Work:
        def answer(begin: float, end: float) -> list[tuple[Any, float]]:
            self._done = iteration + 1
            found = DistributionReward(
                iteration=iteration,
                rewards=np.arange(len(valid), dtype=np.float64),
                fid=0.0,
                batch_fid=0.0,
                effective_size=1.0,
                version=iteration,
                spans=(Span(self.name, "moments", begin, end),),
            )
            alike = {space: replace(found, spans=()) for space in features}
            return [(alike | {MAIN_SPACE: found}, float(len(alike) * found.rewards.nbytes))]

        return self.working(self.takes("commit", self.times.commit, iteration), answer)

    def refresh(self) -> Work:
        return instant()

    def state(self) -> Work:
        return instant(b"%d" % self._done)

    def restore(self, state: bytes) -> Work:
        self._done = int(state)
        return instant()


class SimulatedLearner(Worker):
    """A learner: steps and snapshots in order."""

    times: ServiceTimes

    def __init__(self, role: Role, name: str, times: ServiceTimes, draws: Draws) -> None:
        super().__init__(role, name, times, draws)
        self._version, self._packed = 0, list[Span]()

    def step(self, batch: TrainingBatch) -> Work:
        def answer(begin: float, end: float) -> list[tuple[Any, float]]:
            self._version = batch.iteration + 1
            spans = (*self._packed, Span(self.name, "learn", begin, end))
            self._packed.clear()
            return [(StepReport(version=self._version, metrics={}, spans=spans), 0.0)]

        return self.working(self.takes("learn", self.times.learn, batch.iteration), answer)

    def snapshot(self) -> Work:
        def answer(begin: float, end: float) -> list[tuple[Any, float]]:
            self._packed.append(Span(self.name, "pack", begin, end))
            return [(self._version, self.times.snapshot_bytes)]

        return self.working(self.takes("publish", self.times.publish, self._version), answer)

    base_snapshot = adapter_snapshot = snapshot

    def restore(self, directory: Path) -> Work:
        self._version = int(directory.name)
        return instant(self._version)

    def open_rendezvous(self, host: str, size: int) -> Work:
        return instant(f"{host}:0")

    def join(self, rank: int, size: int, address: str) -> Work:
        return instant()


@dataclass(frozen=True, kw_only=True)
class SimulatedRun:
    """What a simulated run took."""

    seconds: tuple[float, ...]
    """Of each iteration, from the end of the one before."""
    images: int
    """Of an iteration."""
    phases: Mapping[str, float]
    """Phase -> seconds an iteration, summed over workers; those of the driver, too."""
    utilisation: Mapping[str, float]
    """Role -> share of the time in which its workers worked, [0, 1]."""
    driver_s: float
    """CPU seconds of the driver, in all."""
    groups: int
    """Groups that were learned from, in all."""
    sent: tuple[float, ...]
    """Bytes that each host sent to others, and ..."""
    received: tuple[float, ...]
    """... received."""
    stored: tuple[float, ...]
    """Most bytes in the object store of each host."""
    restarts: int
    events: int
    """Of the simulation."""

    def iteration_s(self, warm: int = 2) -> float:
        """Mean seconds of the iterations after the first ones, which fill the pipeline."""
        later = self.seconds[min(warm, len(self.seconds) - 1) :]
        return sum(later) / len(later)

    def images_per_s(self, warm: int = 2) -> float:
        return self.images / self.iteration_s(warm)

    @property
    def driver_ms_per_group(self) -> float:
        return 1e3 * self.driver_s / self.groups


def simulate(
    config: RunConfig,
    times: ServiceTimes,
    cluster: SimulatedCluster,
    *,
    iterations: int,
    failures: Sequence[Failure] = (),
    seed: int = 0,
) -> SimulatedRun:
    """Simulate a run from its first iteration, without evaluations and galleries. A lost learner
    sends it back to the last checkpoint (`output.checkpoint_every`), whose writing takes no time.

    Args:
        seed: of the variation of seconds; equal seeds give equal runs, unless the driver's CPU time
            is measured (`cluster.driver`).

    Raises:
        ConfigError: the fleet does not fit the hosts.
        FleetError: as in a run.
    """
    config = replace(config, iterations=iterations)
    with simulated_run_fleet(config, times, cluster, failures=failures, seed=seed) as simulated:
        found = _Recorded(simulated, times)
        _train(config, simulated, found)
        return found.run(config)


@contextmanager
def simulated_run_fleet(
    config: RunConfig,
    times: ServiceTimes,
    cluster: SimulatedCluster,
    *,
    failures: Sequence[Failure] = (),
    seed: int = 0,
) -> Iterator[SimulatedFleet]:
    """The fleet of a run, simulated; see `simulate`."""
    plan, draws = fleet_plan(config), Draws(seed)
    for failure in failures:
        _check_worker(failure, plan)
    if not cluster.driver.measured:
        cluster = replace(cluster, driver=replace(cluster.driver, group_s=times.driver))

    def factory(kind: Callable[..., Worker]) -> Callable[[Role, str], Worker]:
        return partial(kind, times=times, draws=draws)

    factories = {
        plan.sampler.name: factory(SimulatedSampler),
        plan.moments_server.name: factory(SimulatedMoments),
        plan.learner.name: factory(SimulatedLearner),
        **{role.name: factory(SimulatedRewardServer) for role in plan.servers},
    }
    with simulated_fleet(plan, cluster, factories, failures=tuple(failures)) as simulated:
        yield simulated


def _check_worker(failure: Failure, plan: FleetPlan) -> None:
    """
    Raises:
        ConfigError: there is no such worker.
    """
    names = [role.worker_name(i) for role in plan.roles for i in range(role.max_count)]
    if failure.worker and failure.worker not in names:
        raise ConfigError(
            f"a failure names the worker {failure.worker!r}: "
            f"{did_you_mean(failure.worker, names)}the last of each role are "
            + ", ".join(role.worker_name(role.max_count - 1) for role in plan.roles)
        )


class _Recorded:
    """What the iterations took."""

    def __init__(self, simulated: SimulatedFleet, times: ServiceTimes) -> None:
        self._simulated, self._times = simulated, times
        self._driver_s = simulated.backend.driver_s
        self.ends = [simulated.backend.engine.now]
        self.phases: dict[str, float] = {}

    def add(self, done: Iteration) -> None:
        """Take an iteration that is done; recording it takes the driver its time."""
        self._simulated.compute(self._times.record)
        self.ends.append(self._simulated.backend.engine.now)
        for span in done.spans:
            self.phases[span.phase] = self.phases.get(span.phase, 0.0) + span.seconds

    def run(self, config: RunConfig) -> SimulatedRun:
        backend, done = self._simulated.backend, len(self.ends) - 1
        return SimulatedRun(
            seconds=tuple(after - before for before, after in zip(self.ends, self.ends[1:])),
            images=config.groups_per_iteration * config.rollouts_per_group,
            phases={phase: seconds / done for phase, seconds in self.phases.items()},
            utilisation=self._simulated.utilisation(),
            driver_s=backend.driver_s - self._driver_s,
            groups=done * config.groups_per_iteration,
            sent=tuple(backend.links.sent),
            received=tuple(backend.links.received),
            stored=tuple(backend.store.peak),
            restarts=self._simulated.fleet.restarts,
            events=backend.engine.happened,
        )


def _train(config: RunConfig, simulated: SimulatedFleet, found: _Recorded) -> None:
    """The main loop, from the last checkpoint after a loss of the learner."""
    fleet, first = simulated.fleet, 0
    spaces = {space: RewardSpace() for space in config.rewards.spaces()}
    saved: list[int] = [0]

    def after(done: Iteration) -> None:
        found.add(done)
        if done.metrics["iteration"] % config.output.checkpoint_every == 0:
            saved.append(done.metrics["iteration"])

    while True:
        try:
            fleet.broadcast(first)
            train(config, fleet, spaces, first, after, lambda: False)
            return
        except LearnerLostError as error:
            fleet.recover_learner(error)
            first = saved[-1]
            fleet.learner.restore(Path(str(first)))
            fleet.moments.restore(b"%d" % first)
