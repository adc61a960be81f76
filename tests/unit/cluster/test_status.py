"""What `python -m cluster.status` makes of what a fleet says; figures by hand."""

from __future__ import annotations

import io
import json
import os
import shlex
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from rich.console import Console

from cluster.control.control_actor import (
    ControlActor,
    FleetStatus,
    PoolStatus,
    Progress,
    ScaleRequest,
    StopRequest,
    WorkerStatus,
)
from cluster.io.processes import Holder
from cluster.io.run_layout import OWNER
from cluster.placement.nodes import Node
from cluster.status import as_dict, figures, headlines, main, table

WAITS = "no node has room for sampler-1 (1 CPU, 1 GPU)\n  10.0.0.2 (3 CPUs, 0 GPUs): too small"
NODES = [
    Node("10.0.0.1", 1.5),
    Node("10.0.0.2", 3, 0.5, {"tessera-role": "sampler", "ray.io/node-id": "ab"}, "H100", "ab"),
]
STATUS = FleetStatus(
    pools=(
        PoolStatus(
            role="sampler",
            serving=1,
            starting=1,
            draining=0,
            queued=3,
            wanted=2,
            wait_s=0.25,
            workers=(
                WorkerStatus(
                    name="sampler-0", state="serving", actor="a", weight_version=7, busy=2
                ),
                WorkerStatus(
                    name="sampler-1", state="starting", actor="b", weight_version=5, waits_for=WAITS
                ),
            ),
        ),
    ),
    singles=tuple(
        WorkerStatus(name=name, state="serving", actor=name)
        for name in ("learner-0", "learner-1", "moments-server")
    ),
    restarts=2,
    weight_version=7,
    progress=Progress(
        stage="training",
        directory="/runs/night",
        done=50,
        iterations=200,
        seconds=2.0,
        metrics={"fid/ema": 3.25, "policy/entropy": 2.5, "time/images_per_s": 80.0},
        free_bytes=5_000_000_000,
    ),
    age_s=0.5,
)
ACTORS = {"a": {"node": "10.0.0.2", "pid": 41}}


def test_everything_is_in_the_object() -> None:
    found = json.loads(json.dumps(as_dict("night", STATUS, ACTORS)))
    assert found["iterations_per_h"] == 1800
    assert found["eta_s"] == 300  # 150 iterations of 2 s
    assert (found["iteration"], found["restarts"], found["weight_version"]) == (50, 2, 7)
    learner, moments, sampler = found["roles"]
    assert (learner["role"], learner["serving"], len(learner["workers"])) == ("learner", 2, 2)
    assert moments["role"] == "moments-server"
    assert (sampler["starting"], sampler["queued"], sampler["queue_wait_s"]) == (1, 3, 0.25)
    assert sampler["workers"] == [
        {
            "name": "sampler-0", "state": "serving", "node": "10.0.0.2", "pid": 41,
            "weight_version": 7, "edition": 7, "behind": 0, "in_hand": 2,
            "waits_for": None,
        },
        {
            "name": "sampler-1", "state": "starting", "node": None, "pid": None,
            "weight_version": 5, "edition": 5, "behind": 2, "in_hand": 0,
            "waits_for": WAITS,
        },
    ]  # fmt: skip


def test_nodes_are_shown_with_what_is_free() -> None:
    found = json.loads(json.dumps(as_dict("night", STATUS, ACTORS, NODES)))
    assert found["nodes"] == [
        {"node": "10.0.0.1", "free_cpus": 1.5, "free_gpus": 0, "accelerator_type": "",
         "labels": {}},
        {"node": "10.0.0.2", "free_cpus": 3, "free_gpus": 0.5, "accelerator_type": "H100",
         "labels": {"tessera-role": "sampler"}},
    ]  # fmt: skip
    console = Console(width=110, record=True, file=io.StringIO())
    console.print(table(found), highlight=False)
    text = console.export_text()
    assert "sampler-1 waits for room: no node has room for sampler-1 (1 CPU, 1 GPU)" in text
    assert "free of 10.0.0.1: 1.5 CPUs, 0 GPUs\n" in text.replace(" \n", "\n")
    assert "free of 10.0.0.2: 3 CPUs, 0.5 GPUs, H100, tessera-role=sampler" in text


def test_for_people() -> None:
    found = as_dict("night", STATUS, ACTORS)
    console = Console(width=110, record=True, file=io.StringIO())
    console.print(table(found), highlight=False)
    text = console.export_text()
    assert "run night: training  /runs/night" in text
    assert (
        "iteration 50 of 200, 1800 an hour, 0:05:00 left, 80 images/s, 2 workers replaced" in text
    )
    assert "5 GB free" in text
    assert "5 (-2)" in text
    assert "1 serving, 1 starting, 3 in queue (0.25 s)" in text
    assert "10.0.0.2" in text
    assert "fid: ema 3.25" in text
    assert figures({"time/learn": 1.0, "reward/clip": 0.5}) == ["reward: clip 0.5"]


def test_an_evaluation_counts_images() -> None:
    said = Progress(
        stage="sampling base",
        done=500,
        iterations=2000,
        unit="image",
        seconds=0.01,
        metrics={"time/images_per_s": 100.0},
    )
    found = as_dict("night", replace(STATUS, progress=said), ACTORS)
    assert (
        headlines(found)[1] == "image 500 of 2000, 0:00:15 left, 100 images/s, 2 workers replaced"
    )


@pytest.mark.parametrize(
    ("age", "said"), [(0.5, ""), (12.4, "what it said 12 s ago"), (None, "has not said anything")]
)
def test_how_old_it_is(age: float | None, said: str) -> None:
    lines = headlines({**as_dict("night", STATUS, {}), "said_s_ago": age})
    assert len(lines) == (3 if said else 2)
    assert said in lines[-1]


def test_before_the_first_iteration_nothing_is_made_up() -> None:
    found = as_dict("night", FleetStatus(), {})
    assert (found["iterations_per_h"], found["eta_s"], found["images_per_s"]) == (None, None, None)
    headlines(found)


def test_the_actor_answers_by_itself_and_says_how_old_its_news_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr("cluster.control.control_actor.time.monotonic", lambda: now)
    control = ControlActor()
    assert control.status().age_s is None
    assert control.scale("sampler", 3) == 1
    assert control.stop(True) == 2
    wishes = control.exchange(STATUS)
    assert wishes == [
        ScaleRequest(number=1, role="sampler", count=3),
        StopRequest(number=2, checkpoint=True),
    ]
    assert control.exchange(STATUS) == []
    now = 107.0
    assert control.status().age_s == 7


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a run that was stopped."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    directory = tmp_path / "runs" / "my [bold]run"
    (directory / "checkpoints" / "step_000010").mkdir(parents=True)
    (directory / "config.yaml").touch()
    return directory


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 0
    lines = capsys.readouterr()
    assert not lines.err
    return lines.out


@pytest.mark.parametrize("which", ["", "my [bold]run", "runs/my [bold]run/"])
def test_a_run_that_has_ended(
    which: str, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No error: how it ended, what it left, and how to go on."""
    lines = shown(capsys, "--run", which).splitlines()
    assert lines[0].startswith("last run: my [bold]run, ended  ")
    assert lines[1].endswith("checkpoints/step_000010")
    assert lines[2] == "resume with"
    assert shlex.split(lines[3])[-2:] == ["--run-dir", str(directory)]
    found = json.loads(shown(capsys, "--run", which, "--json"))
    assert found.keys() - as_dict("", STATUS, {}).keys() == {"checkpoint", "report", "resume"}
    assert (found["stage"], found["roles"], found["iteration"]) == ("ended", [], None)
    assert shlex.split(found["resume"]) == shlex.split(lines[3])
    assert found["report"] is None
    assert json.loads(shown(capsys, "--run", which, "--json", "--watch", "9")) == found


def test_how_a_run_ended(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def stage() -> str:
        return str(json.loads(shown(capsys, "--json"))["stage"])

    (directory / "report.html").touch()
    assert stage() == "finished"
    lines = shown(capsys)
    assert f"report: runs/{directory.name}/report.html" in lines
    assert "resume" not in lines
    os.utime(directory / "report.html", (1, 1))  # it went on after that, and was stopped
    assert stage() == "ended"
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait(30)
    killed = Holder(**{**asdict(Holder.this_process()), "pid": process.pid, "started": "1"})
    (directory / OWNER).write_bytes(killed.to_bytes())
    assert stage() == "killed"
    assert "last run: my [bold]run, killed" in shown(capsys)


def test_no_run_at_all_is_an_error(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for other in ("my-bold-run", "runs/other", str(directory / "checkpoints")):
        assert main(["--run", other]) == 1
        assert capsys.readouterr().err.startswith("error: ")
    assert main(["--run", "my [bold]rum"]) == 1
    assert "did you mean 'my [bold]run'?" in capsys.readouterr().err
