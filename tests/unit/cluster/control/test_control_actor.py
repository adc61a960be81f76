"""What commands ask of the control actor, in this process: a fake driver serves the requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.control import control_actor
from cluster.control.control_actor import (
    ControlActor,
    FleetStatus,
    PoolStatus,
    Progress,
    RunConnection,
    ScaleRequest,
    StopRequest,
)
from cluster.control.discovery import RunLocation
from cluster.errors import FleetError
from cluster.scale import scale
from cluster.stop import stop


class Driver:
    """The control actor as a handle; before it answers, the driver exchanges status with it."""

    def __init__(self, *, deaf: bool = False, directory: str = "") -> None:
        self.actor, self.deaf, self.directory = ControlActor(), deaf, directory
        self.workers, self.answered = 1, 0
        self.taken: list[ScaleRequest | StopRequest] = []
        self.refusals: list[tuple[int, str]] = []

    def __getattr__(self, method: str) -> Any:
        class Method:
            @staticmethod
            def remote(*arguments: Any) -> Any:
                if method == "status" and not self.deaf:
                    self.take()
                return getattr(self.actor, method)(*arguments)

        return Method

    def take(self) -> None:
        for request in self.actor.exchange(self.current()):
            self.taken.append(request)
            self.answered = request.number
            if isinstance(request, ScaleRequest) and request.role == "sampler":
                self.workers = request.count
            elif isinstance(request, ScaleRequest):
                self.refusals.append((request.number, f"no role {request.role!r}"))

    def current(self) -> FleetStatus:
        pool = PoolStatus(
            role="sampler",
            serving=self.workers,
            starting=0,
            draining=0,
            queued=0,
            wanted=self.workers,
        )
        return FleetStatus(
            pools=(pool,),
            progress=Progress(directory=self.directory),
            answered=self.answered,
            refusals=tuple(self.refusals),
        )

    def connection(self) -> RunConnection:
        return RunConnection("night", self, RunLocation("night", "auto"))


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.ray_session.calls.answer", lambda value, what, timeout_s: value)
    monkeypatch.setattr(control_actor, "POLL_S", 0.01)


def test_a_role_is_scaled_when_the_driver_has_done_it() -> None:
    driver = Driver()
    status = scale(driver.connection(), {"sampler": 3}, 5)
    assert status.pools == driver.current().pools
    assert driver.taken == [ScaleRequest(number=1, role="sampler", count=3)]


def test_a_refusal_is_an_error() -> None:
    with pytest.raises(FleetError, match="no role 'other'"):
        scale(Driver().connection(), {"other": 2}, 5)


def test_a_driver_that_does_not_answer_is_an_error() -> None:
    with pytest.raises(FleetError, match=r"within 0\.05 s: the run did not answer"):
        scale(Driver(deaf=True).connection(), {"sampler": 2}, 0.05)
    with pytest.raises(FleetError, match=r"did not answer within 0\.05 s"):
        stop(Driver(deaf=True).connection(), False, 0.05)


def test_stop_returns_the_directory_that_the_driver_reports(tmp_path: Path) -> None:
    driver = Driver(directory=str(tmp_path))
    assert stop(driver.connection(), True, 5) == tmp_path
    assert driver.taken == [StopRequest(number=1, checkpoint=True)]
    assert stop(Driver(directory="/nowhere/of/another/host").connection(), True, 5) is None


def test_the_control_actor_passes_requests_once() -> None:
    control = ControlActor()
    assert [control.scale("sampler", 2), control.scale("reward-server", 4)] == [1, 2]
    requests = control.exchange(FleetStatus(restarts=3))
    assert [(request.role, request.count) for request in requests] == [
        ("sampler", 2),
        ("reward-server", 4),
    ]
    assert control.exchange(FleetStatus()) == []
