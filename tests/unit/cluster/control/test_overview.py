"""All runs on a cluster, from what their control actors say; Ray is replaced."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from cluster import scale, status, stop
from cluster.control import control_actor, overview
from cluster.control.control_actor import (
    ControlActor,
    Driver,
    FleetStatus,
    PoolStatus,
    Progress,
    RunConnection,
    WorkerStatus,
)
from cluster.control.discovery import RunLocation
from cluster.errors import FleetError
from cluster.ray_session.address import user_name
from cluster.roles import QuotaConfig
from cluster.scheduling.quota import Share


def pool(role: str, serving: int, starting: int = 0) -> PoolStatus:
    return PoolStatus(
        role=role, serving=serving, starting=starting, draining=0, queued=0, wanted=serving
    )


NIGHT = FleetStatus(
    pools=(pool("sampler", 3, 1), pool("reward-server", 2)),
    singles=tuple(
        WorkerStatus(name=name, state="serving", actor=name)
        for name in ("learner-0", "learner-1", "moments-server")
    ),
    progress=Progress(
        stage="training", directory="/runs/night", done=50, iterations=200, seconds=2
    ),
    age_s=0.5,
    driver=Driver(user="ann", host="host-1", pid=41),
    reserved=Share(9.0, 4.5),
    quota=QuotaConfig(gpus=5),
    held_back=("reward-server: 9 workers would be started",),
)
EVENING = FleetStatus(driver=Driver(user="bob", host="host-2", pid=7))
RUNS: dict[str, FleetStatus | None] = {"night": NIGHT, "evening": EVENING, "stuck": None}
FOUND = {
    "cluster": "10.0.0.4:6379",
    "nodes": 2,
    "cpus": 32,
    "cpus_free": 23,
    "gpus": 8,
    "gpus_free": 3.5,
    "runs": [overview.run_as_dict(name, each) for name, each in RUNS.items()],
}


def test_a_run_as_json_has_it() -> None:
    night, evening, stuck = json.loads(json.dumps(FOUND["runs"]))
    assert night == {
        "run": "night", "user": "ann", "host": "host-1", "pid": 41, "stage": "training",
        "directory": "/runs/night", "unit": "iteration", "iteration": 50, "iterations": 200,
        "eta_s": 300, "said_s_ago": 0.5,
        "workers": {"sampler": 4, "reward-server": 2, "learner": 2, "moments-server": 1},
        "cpus": 9, "gpus": 4.5, "quota_cpus": None, "quota_gpus": 5,
        "held_back": ["reward-server: 9 workers would be started"],
    }  # fmt: skip
    assert (evening["stage"], evening["user"], evening["workers"]) == ("starting", "bob", {})
    assert stuck.keys() == night.keys()
    assert {key: value for key, value in stuck.items() if value is not None} == {
        "run": "stuck",
        "stage": "no answer",
    }


def text(found: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(overview.overview(found))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_for_people() -> None:
    shown = text(FOUND)
    assert "cluster 10.0.0.4:6379: 2 nodes, 23 of 32 CPUs and 3.5 of 8 GPUs are free" in shown
    (night,) = (line for line in shown.splitlines() if line.strip().startswith("night  "))
    for part in ("ann", "host-1 41", "training", "iteration 50 of 200, 0:05:00 left", "4.5 of 5"):
        assert part in night
    assert "4 sampler, 2 reward-server, 2 learner, 1 moments-server" in shown
    assert "night: reward-server: 9 workers would be started" in shown
    assert "no answer" in shown
    assert "no run is active on it" in text(FOUND | {"runs": []})


class FakeRay:
    """`ray.wait` and `ray.get` on answers that are there already; "late" ones never come."""

    class EndedError(Exception):
        pass

    @staticmethod
    def nodes() -> list[dict[str, bool]]:
        return [{"Alive": True}, {"Alive": False}, {"Alive": True}]

    @staticmethod
    def cluster_resources() -> dict[str, float]:
        return {"CPU": 32.0, "GPU": 8.0}

    @staticmethod
    def available_resources() -> dict[str, float]:
        return {"CPU": 23.0}  # Ray leaves out what is used up

    @staticmethod
    def wait(refs: list[str], *, num_returns: int, timeout: float) -> tuple[list[str], list[str]]:
        return [ref for ref in refs if RUNS.get(ref, 1)], [
            ref for ref in refs if not RUNS.get(ref, 1)
        ]

    @staticmethod
    def get(ref: str) -> FleetStatus:
        if ref == "killed":
            raise FakeRay.EndedError
        found = RUNS[ref]
        assert found is not None
        return found


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster with the runs, one that was killed, and one that ended between the two looks."""

    class Session:
        address = "10.0.0.4:6379"

    @contextmanager
    def session(*_: object) -> Iterator[Session]:
        yield Session()

    def actor(name: str) -> Any:
        if name == "gone":
            raise ValueError
        return SimpleNamespace(status=SimpleNamespace(remote=lambda: name))

    monkeypatch.setattr(overview, "find_cluster", lambda config, source: None)
    monkeypatch.setattr(overview, "RaySession", session)
    monkeypatch.setattr(overview, "active_runs", lambda: [*RUNS, "killed", "gone"])
    monkeypatch.setattr(overview, "control_actor", actor)
    monkeypatch.setitem(sys.modules, "ray", FakeRay)  # type: ignore[arg-type]
    exceptions = SimpleNamespace(RayActorError=FakeRay.EndedError)
    monkeypatch.setitem(sys.modules, "ray.exceptions", exceptions)  # type: ignore[arg-type]


@pytest.mark.parametrize("columns", ["80", "120"])
def test_the_command_lists_all_that_have_not_ended(
    columns: str,
    cluster: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert status.main(["--all", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {run["run"] for run in found["runs"]} == {"night", "evening", "stuck"}
    assert (found["nodes"], found["cpus"], found["cpus_free"]) == (2, 32, 23)
    assert (found["gpus"], found["gpus_free"]) == (8, 0)
    assert status.main(["--all"]) == 0
    shown = capsys.readouterr().out
    assert "ann" in shown
    assert "night" in shown.partition("night: ")[0]


def test_a_run_of_another_version_hides_no_other_run(
    cluster: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    older: Any = object.__new__(FleetStatus)  # as pickle makes it
    older.__setstate__([getattr(FleetStatus(), each.name) for each in fields(FleetStatus)[:-4]])
    monkeypatch.setitem(RUNS, "older", older)
    assert status.main(["--all", "--json"]) == 0
    runs = {run["run"]: run for run in json.loads(capsys.readouterr().out)["runs"]}
    assert (runs["night"]["user"], runs["older"]["user"]) == ("ann", None)
    assert runs["older"]["stage"] == "another version of Tessera"
    assert status.main(["--all"]) == 0
    assert "another version" in capsys.readouterr().out


def test_all_and_one_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        status.main(["--all", "--run", "night"])
    assert "leave out --run night" in capsys.readouterr().err


def test_the_control_actor_knows_whose_it_is_before_the_driver_speaks() -> None:
    actor = ControlActor(Driver.this_process())
    assert actor.status().driver == Driver(
        user=user_name(os.getuid()), host=os.uname().nodename, pid=os.getpid()
    )
    actor.exchange(FleetStatus(restarts=2))
    assert (actor.status().restarts, actor.status().driver.pid) == (2, os.getpid())


@pytest.mark.parametrize("command", [status.main, stop.main, scale.main])
def test_of_several_runs_on_a_cluster_none_is_guessed(
    command: Any,
    cluster: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """Nor is a run shown that this user had before."""
    (tmp_path / "runs" / "ended").mkdir(parents=True)
    (tmp_path / "runs" / "ended" / "config.yaml").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(control_actor, "check_alive", lambda location: None)
    monkeypatch.setattr(control_actor, "find_cluster", lambda config, source: None)
    monkeypatch.setattr(control_actor, "RaySession", overview.RaySession)
    monkeypatch.setattr(control_actor, "active_runs", lambda: ["evening", "night"])
    wanted = ["--samplers", "3"] if command is scale.main else []
    assert command([*wanted, "--address", "10.0.0.4:6379"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == ("error: several runs are active: choose one with --run (evening, night)\n")


def connection(user: str, directory: Path | None) -> RunConnection:
    actor = ControlActor(Driver(user=user, host="host-2", pid=7))
    location = RunLocation("", "10.0.0.4:6379", directory)
    return RunConnection("night", actor, location)


@pytest.mark.parametrize("command", [stop.main, scale.main])
def test_the_run_of_another_user_is_changed_by_its_name_alone(
    command: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    changed: list[RunConnection] = []

    def change(run: RunConnection, *_: object) -> Any:
        changed.append(run)
        raise FleetError("reached")

    @contextmanager
    def connect(_: object) -> Iterator[RunConnection]:
        yield found

    monkeypatch.setattr(control_actor.RunSelection, "connect", connect)
    monkeypatch.setattr(RunConnection, "call", lambda run, method: getattr(run.control, method)())
    monkeypatch.setattr(stop, "stop", change)
    monkeypatch.setattr(scale, "scale", change)
    wanted = ["--samplers", "3"] if command is scale.main else []
    found = connection("bob", None)
    assert command(wanted) == 1
    assert "the only run on this cluster is night, of bob on host-2" in capsys.readouterr().err
    assert not changed
    for found, named in (
        (connection("bob", None), ["--run", "night"]),
        (connection(user_name(os.getuid()), None), []),
        (connection("bob", tmp_path), []),  # whoever sees the directory of the run has named it
    ):
        assert command([*wanted, *named]) == 1
        assert "reached" in capsys.readouterr().err
        assert changed.pop() is found
