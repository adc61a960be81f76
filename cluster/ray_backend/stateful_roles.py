"""The roles that keep what a run has reached: learner and moments server. They outlive their
processes, each in its way.

The moments server is small and its calls are deterministic: a new one is brought to where the lost
one was by its last known state and the calls since then. A learner's steps cannot be made again
without their rollouts: `LearnerLostError` tells whoever runs the loop to go back to a checkpoint.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import ray
from ray.exceptions import RayActorError

from cluster.errors import LearnerLostError
from cluster.ray_backend.learner_group import LearnerGroup
from cluster.ray_session.calls import LOST, RemoteRole, answer, why_lost
from cluster.roles import FleetPlan, LearnerRole, MomentsRole, Role
from cluster.scheduling.journal import Journal
from cluster.scheduling.listening import Listening
from cluster.scheduling.pool import State, Worker
from cluster.scheduling.restarts import RestartBudget

logger = logging.getLogger(__name__)

CAPTURE_EVERY = 10  # calls after which the moments server's state is asked for
Launch = Callable[[Role, int, bool], Worker]
"""(role, index, late) -> worker."""


class StatefulRoles:
    """Starts learners and moments server, and replaces them.

    Args:
        wait: how an answer is waited for: (reference, what it is of, longest wait) -> value.
        attend: waits for some references, and keeps the fleet moving meanwhile.
        listening: when this process did.
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
        self.moments_worker = launch(plan.moments_server, 0, False)
        self._journal = Journal(
            lasting=["set_reference"], beginning=["seed"], changing=["commit", "refresh"]
        )
        self._capture: tuple[Any, int] | None = None  # state that was asked for, its position
        self._refreshing: Any = None  # work of the iteration before
        self._broadcasts = 0  # of these learners

    @property
    def workers(self) -> list[Worker]:
        return [*self.learners, self.moments_worker]

    @property
    def learner(self) -> LearnerRole:
        """All learners as one. Its calls raise LearnerLostError where one is gone."""
        if len(self.learners) > 1:
            return self._group()
        worker = self.learners[0]
        return cast(
            LearnerRole,
            RemoteRole(worker.handle, worker.name, self._plan.timeout_s, self._learner_answer),
        )

    @property
    def moments(self) -> MomentsRole:
        """The moments server, whichever process it is in just now."""
        return cast(MomentsRole, _Lasting(self._ask_moments))

    def started(self, worker: Worker) -> None:
        """Wait until one of them is there.

        Raises:
            FleetError: it cannot start, or not in time.
        """
        answer(worker.ready, worker.name, self._plan.timeout_s)
        worker.state = State.SERVING

    def meet(self) -> None:
        """Have several learners find each other."""
        if len(self.learners) > 1:
            self._group().meet()

    def replace_learners(self, why: str) -> None:
        """New learners in the place of all, since they compute together; they hold the base policy.

        Raises:
            FleetError: they were replaced too often, or cannot start.
        """
        name, count = self._plan.learner.name, range(self._plan.learner.count)
        while True:
            delay = self._budget.spend(name, "was lost", time.monotonic())
            for worker in self.learners:
                ray.kill(worker.handle)
            logger.warning("%s: another takes its place, and goes on from the last checkpoint", why)
            time.sleep(delay)
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
        """The learner's weights were published: the first time where it begins, then after each
        step. One that has made a step is not lost for the old reason."""
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
                self._revive_moments()
                continue
            self._budget.worked(worker.name)
            self._journal.record(method, args, kwargs)
            if method == "state":
                self._journal.covers(self._journal.position, value)
            return value

    def refresh_moments(self) -> None:
        """Have the moments server prepare for the next commit, without waiting for it; and tell its
        state, if it is time to."""
        if self._refreshing is not None:  # long done: a commit came after it
            ref, self._refreshing = self._refreshing, None
            what = f"{self.moments_worker.name}.refresh"
            with contextlib.suppress(RayActorError):  # whoever asks it next gets to know
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
        if ray.wait([ref], timeout=0)[0]:
            self._capture = None
            with contextlib.suppress(RayActorError):  # whoever asks it next gets to know
                self._journal.covers(position, ray.get(ref))

    def _revive_moments(self) -> None:
        """A new moments server, where the lost one was.

        Raises:
            FleetError: it was replaced too often, or cannot start.
        """
        while True:
            lost = self.moments_worker
            self._take_capture()
            self._capture = self._refreshing = None
            delay = self._budget.spend(lost.name, "was lost", time.monotonic())
            ray.kill(lost.handle)
            logger.warning("%s was lost: another takes its place, with the same moments", lost.name)
            time.sleep(delay)
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
                self.moments_worker = worker
                continue
            self.moments_worker = worker
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


class _Lasting:
    """A role whose process may change between two calls."""

    def __init__(self, ask: Callable[..., Any]) -> None:
        self._ask = ask

    def __getattr__(self, method: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            return self._ask(method, *args, **kwargs)

        return call
