"""The roles with state, learner and moments server: started, called, restored after a loss.

The moments server is small and its calls are deterministic: a new one gets the last known state and
replays the calls since then (`scheduling/journal.py`). A learner's steps cannot be repeated without
their rollouts: `LearnerLostError` makes the main loop return to a checkpoint.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Any, cast

from ray.exceptions import RayActorError

from cluster import clock
from cluster.errors import LearnerLostError
from cluster.ray_backend.learner_group import LearnerGroup
from cluster.ray_session import backend
from cluster.ray_session.calls import LOST, RemoteRole, answer, why_lost
from cluster.roles import FleetPlan, LearnerRole, MomentsRole, Role
from cluster.scheduling.clock_offsets import ClockOffsets, OnThisClock
from cluster.scheduling.journal import Journal
from cluster.scheduling.listening import Listening
from cluster.scheduling.pool import State, Worker
from cluster.scheduling.restarts import RestartBudget

logger = logging.getLogger(__name__)

CAPTURE_EVERY = 10  # calls after which the moments server's state is requested
Launch = Callable[[Role, int, bool], Worker]
"""(role, index, late) -> worker."""


class StatefulRoles:
    """Starts learners and moments server, and replaces them.

    Args:
        wait: (reference, description, longest wait) -> value.
        attend: waits for some references, and serves the fleet meanwhile.
        listening: silence counts only while this process listened.
    """

    def __init__(
        self,
        plan: FleetPlan,
        launch: Launch,
        wait: Callable[[Any, str, float], Any],
        attend: Callable[[Sequence[Any], float], Sequence[Any]],
        budget: RestartBudget,
        listening: Listening,
    ) -> None:
        self._plan, self._launch, self._budget = plan, launch, budget
        self._wait, self._attend, self._listening = wait, attend, listening
        self.learners = [launch(plan.learner, i, False) for i in range(plan.learner.count)]
        count = plan.moments_server.count  # one, or none in an evaluation
        self._moments_workers = [launch(plan.moments_server, i, False) for i in range(count)]
        self._journal = Journal(
            lasting=["set_references"], beginning=["seed"], changing=["commit", "refresh"]
        )
        self._capture: tuple[Any, int] | None = None  # requested state, its position
        self._refreshing: Any = None  # `refresh` of the iteration before
        self._broadcasts = 0  # of these learners
        self._clocks = ClockOffsets()

    @property
    def workers(self) -> list[Worker]:
        return [*self.learners, *self._moments_workers]

    @property
    def moments_worker(self) -> Worker:
        self._plan.need(self._plan.moments_server)
        return self._moments_workers[0]

    @property
    def learner(self) -> LearnerRole:
        """All learners as one. Its calls raise LearnerLostError where one is gone.

        Raises:
            FleetError: the fleet has none.
        """
        self._plan.need(self._plan.learner)
        role: Any
        if len(self.learners) > 1:
            role = self._group()
        else:
            handle, name = self.learners[0].handle, self.learners[0].name
            role = RemoteRole(handle, name, self._plan.timeout_s, self._learner_answer)
        return cast(LearnerRole, OnThisClock(role, self._clocks))

    @property
    def moments(self) -> MomentsRole:
        """The moments server, whose process may be replaced between two calls.

        Raises:
            FleetError: the fleet has none.
        """
        self._plan.need(self._plan.moments_server)
        return cast(MomentsRole, OnThisClock(_Restorable(self._ask_moments), self._clocks))

    def started(self, worker: Worker) -> None:
        """Wait until one of them is ready.

        Raises:
            FleetError: it cannot start, or not in time.
        """
        answer(worker.ready, worker.name, self._plan.timeout_s)
        worker.state = State.SERVING

    def meet(self) -> None:
        """Connect several learners."""
        if len(self.learners) > 1:
            self._group().meet()

    def replace_learners(self, why: str) -> None:
        """Replace all learners, since they compute together; the new ones hold the base policy.

        Raises:
            FleetError: they were replaced too often, or cannot start.
        """
        name, count = self._plan.learner.name, range(self._plan.learner.count)
        while True:
            delay = self._budget.spend(name, "was lost", clock.monotonic())
            for worker in self.learners:
                backend.kill(worker.handle)
            logger.warning("%s: it is replaced, and the run returns to its last checkpoint", why)
            clock.sleep(delay)
            self.learners = [self._launch(self._plan.learner, i, True) for i in count]
            self._broadcasts = 0
            try:
                for worker in self.learners:
                    self.started(worker)
                self.meet()
            except (RayActorError, LearnerLostError):
                why = f"{name} was lost while it started"
            else:
                return

    def broadcast_made(self) -> None:
        """Count a broadcast: one at the start, then one after each step. A learner that has taken a
        step was started successfully."""
        self._broadcasts += 1
        if self._broadcasts > 1:
            self._budget.worked(self._plan.learner.name)

    def _ask_moments(self, method: str, *args: Any, **kwargs: Any) -> Any:
        while True:
            worker = self.moments_worker
            call = getattr(worker.handle, method)
            try:
                value = self._wait(
                    call.remote(*args, **kwargs), f"{worker.name}.{method}", self._plan.timeout_s
                )
            except LOST:
                self._restore_moments()
                continue
            self._budget.worked(worker.name)
            self._journal.record(method, args, kwargs)
            if method == "state":
                self._journal.covers(self._journal.position, value)
            return value

    def refresh_moments(self) -> None:
        """Have the moments server prepare for the next commit, without waiting; request its state,
        if it is due."""
        if self._refreshing is not None:  # long done: a commit came after it
            ref, self._refreshing = self._refreshing, None
            what = f"{self.moments_worker.name}.refresh"
            with contextlib.suppress(RayActorError):  # the next call notices
                self._wait(ref, what, self._plan.timeout_s)
        self._refreshing = self.moments_worker.handle.refresh.remote()
        self._journal.record("refresh", (), {})
        self._take_capture()
        if self._capture is None and self._journal.length >= CAPTURE_EVERY:
            self._capture = self.moments_worker.handle.state.remote(), self._journal.position

    def _take_capture(self) -> None:
        if self._capture is None:
            return
        ref, position = self._capture
        if backend.ready([ref])[0]:
            self._capture = None
            with contextlib.suppress(RayActorError):  # the next call notices
                self._journal.covers(position, backend.get(ref))

    def _restore_moments(self) -> None:
        """Start a new moments server and restore its state.

        Raises:
            FleetError: it was replaced too often, or cannot start.
        """
        while True:
            lost = self.moments_worker
            self._take_capture()
            self._capture = self._refreshing = None
            delay = self._budget.spend(lost.name, "was lost", clock.monotonic())
            backend.kill(lost.handle)
            logger.warning("%s was lost: a replacement starts, with the same moments", lost.name)
            clock.sleep(delay)
            worker = self._launch(self._plan.moments_server, 0, True)
            try:
                self.started(worker)
                for call in self._journal.replay():
                    again = getattr(worker.handle, call.method)
                    answer(
                        again.remote(*call.args, **dict(call.kwargs)),
                        f"{worker.name}.{call.method}",
                        self._plan.timeout_s,
                    )
            except RayActorError:
                self._moments_workers = [worker]
                continue
            self._moments_workers = [worker]
            return

    def _group(self) -> LearnerGroup:
        return LearnerGroup(
            [worker.handle for worker in self.learners],
            [worker.name for worker in self.learners],
            self._wait,
            self._plan.timeout_s,
            self._attend,
            self._listening,
        )

    def _learner_answer(self, ref: Any, what: str, timeout_s: float) -> Any:
        try:
            return self._wait(ref, what, timeout_s)
        except LOST as error:
            raise LearnerLostError(f"{self.learners[0].name} {why_lost(error)}") from error


class _Restorable:
    """A role whose process may be replaced between two calls."""

    def __init__(self, ask: Callable[..., Any]) -> None:
        self._ask = ask

    def __getattr__(self, method: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            return self._ask(method, *args, **kwargs)

        return call
