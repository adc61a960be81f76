"""The main job as a user runs it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from actors.models.taming import TamingConfig, TamingGPT
from cluster.control.discovery import resume_command
from cluster.errors import LearnerLostError
from cluster.fleet import InlineFleet
from cluster.io.starts import read_events
from cluster.model_files.tensors import read_tensors, write_tensors
from learner import replay
from learner.experiment import Experiment
from learner.fleet_plan import fleet_plan
from learner.monitoring.console import COLUMNS, RunConsole
from learner.run import REFUSED, main
from learner.runs.run_dir import RunDirectory
from tests.small_run import default_config, flags, recorded, small_config

NOISE = ("warning", "traceback", "error")
FEW = {"num_images": 20}
OPTIONS = [*flags(), "--evaluation.num-images", "20"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four iterations, inline."""
    run = tmp_path_factory.mktemp("e2e") / "run"
    assert main([*OPTIONS, "--inline", "--run-dir", str(run)]) == 0
    return run


def test_the_run_directory_has_everything(finished: Path) -> None:
    assert yaml.safe_load((finished / "config.yaml").read_text())["iterations"] == 4
    assert len(recorded(finished)) == 4
    checkpoints = sorted(path.name for path in (finished / "checkpoints").iterdir())
    assert checkpoints == ["step_000002", "step_000004"]
    sheets = ("base", "step_000002", "step_000004", "tuned")
    galleries = {path.name for path in (finished / "gallery").iterdir()}
    assert galleries == {
        "before_after.png", "nearest.png", "nearest.json",
        *(f"{sheet}.{kind}" for sheet in sheets for kind in ("png", "json")),
    }  # fmt: skip
    assert Image.open(finished / "gallery" / "before_after.png").width > 200
    sheet = json.loads((finished / "gallery" / "step_000002.json").read_text())
    assert (sheet["step"], sheet["columns"], len(sheet["rows"])) == (2, 3, 10)
    assert {name: np.shape(rows) for name, rows in sheet["scores"].items()} == {
        "clip": (10, 3), "hps": (10, 3)
    }  # fmt: skip
    assert any((finished / "tensorboard").iterdir())
    phases = {event["name"] for event in json.loads((finished / "trace.json").read_text())}
    works = {"load", "sample", "decode", "score", "moments", "learn", "pack"}
    assert phases >= {*works, "broadcast"}
    page = (finished / "report.html").read_text()
    assert '<span class="state finished">' in page
    assert '"evaluation-judge-fid"' in page
    assert 'class="level error"' not in page  # every file could be read
    start, end = read_events(finished)
    assert start["command"].endswith(f"--inline --run-dir {finished}")
    assert end["how"] == "finished"
    log = (finished / "run.log").read_text()
    for said in ("base policy: FID", "iteration 4/4  ", "Held-out judge, 20", "everything is in"):
        assert said in log


def test_the_evaluation_has_every_row_and_figure(finished: Path) -> None:
    rows = json.loads((finished / "evaluation.json").read_text())
    assert list(rows) == ["base", "base, CFG 1.5", "base, CFG 2", "tuned"]
    for metrics in rows.values():
        assert metrics.keys() >= {*COLUMNS.values(), "second/fid", "second/coverage"}
    assert rows["base, CFG 2"]["entropy"] < rows["base"]["entropy"]


def test_sampler_and_learner_agree_before_every_update(finished: Path) -> None:
    for row, _ in recorded(finished):
        assert row["policy/ratio"] == pytest.approx(1, abs=1e-4)
        assert row["policy/logprob_gap"] <= 1e-4
        assert abs(row["policy/mismatch_kl"]) < 1e-6
        assert row["policy/staleness"] == 0


def test_its_learner_is_replayed_bit_for_bit(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options, outcome in (
        ([], "4 iterations, .* weights after 2 of them: equal bit for bit"),
        (["--from-step", "2"], "2 iterations, .* weights after 1 of them: equal bit for bit"),
    ):
        assert replay.main([str(finished), "--check", *options]) == 0
        assert re.search(outcome, capsys.readouterr().out)


def test_a_used_run_directory_is_refused(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*OPTIONS, "--inline", "--run-dir", str(finished)]) == REFUSED
    assert "is not empty: add --resume" in capsys.readouterr().err


STOPS: dict[str, Callable[[Path, list[int]], bool]] = {
    "before training": lambda run, seen: True,
    "between checkpoints": lambda run, seen: len(seen) == 3,
    "before a gallery": lambda run, seen: len(seen) == 2,
    "after the last step": lambda run, seen: (run / "checkpoints" / "step_000004").exists(),
}
"""When a stop is asked for, given the run directory and the iterations seen."""


BEYOND = ("before training", "before a gallery")


@pytest.mark.parametrize(
    "when", [pytest.param(w, marks=pytest.mark.slow) if w in BEYOND else w for w in STOPS]
)
def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(
    when: str, finished: Path, tmp_path: Path
) -> None:
    config = default_config(evaluation=FEW)
    run = RunDirectory.create(str(tmp_path / "run"), config)
    seen: list[int] = []

    class Counting(RunConsole):
        def update(self, row) -> None:
            seen.append(row["iteration"])

    def stop() -> bool:
        return STOPS[when](run.path, seen)

    with Counting(4) as console, InlineFleet(fleet_plan(config), stop) as fleet:
        assert Experiment(config, run, fleet, console, stop).run() is False
    assert main(["--resume", "--inline", "--run-dir", str(run.path)]) == 0
    assert recorded(run.path) == recorded(finished)
    for name in ("policy.safetensors", "optimizer.safetensors", "moments.msgpack"):
        ours, theirs = (
            root / "checkpoints" / "step_000004" / name for root in (run.path, finished)
        )
        assert ours.read_bytes() == theirs.read_bytes(), name
    assert (run.path / "evaluation.json").read_text() == (finished / "evaluation.json").read_text()


def test_a_run_cannot_change_how_far_ahead_it_is(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--resume", "--inline", "--max-staleness", "1", "--run-dir", str(finished)]
    assert main(arguments) == REFUSED
    assert "cannot change max_staleness (0 in the run, 1 now)" in capsys.readouterr().err


def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    file = copy / "checkpoints" / "step_000004" / "policy.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert main(["--resume", "--inline", "--run-dir", str(copy)]) == 0
    said = capsys.readouterr().out
    assert "skipping checkpoint step_000004: policy.safetensors is missing or damaged" in said
    assert "resumed from step_000002" in said
    assert recorded(copy) == recorded(finished)


def test_dry_run_prints_configuration_and_placement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--dry-run", "--num-samplers", "8"]) == 0
    text = capsys.readouterr().out
    assert yaml.safe_load(text)["num_samplers"] == 8
    assert "8 x sampler:" in text
    assert not any(tmp_path.iterdir())  # nothing was made


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-samplers", "0"], "num_samplers should be greater than or equal to 1, found 0"),
        (["--preset", "minature"], "did you mean 'miniature'?"),
        (["--resume", "--run-dir", "nowhere"], "nothing to resume"),
        (["--sampling.cfg-scale", "2"], "no effect with guidance 'none'"),
    ],
)
def test_wrong_command_lines_end_with_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main(arguments)
    except SystemExit as stop:  # what the argument parser itself refuses
        status = stop.code
    assert status == REFUSED
    told = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in told


@pytest.mark.slow  # test_ray_fleet.py compares two samplers with a run in one process
def test_on_ray_with_more_samplers_than_cores(finished: Path, tmp_path: Path) -> None:
    """Exit 0, a clean console, the inline run's numbers."""
    own = sorted(os.sched_getaffinity(0))
    run = tmp_path / "run"
    line = [sys.executable, "-m", "learner.run", *OPTIONS, "--num-samplers", "3"]
    done = subprocess.run(
        [*line, "--run-dir", str(run)],
        preexec_fn=lambda: os.sched_setaffinity(0, own[:2]),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    assert not [line for line in lines if any(word in line.lower() for word in NOISE)]
    assert str(run) in done.stdout
    assert recorded(run) == recorded(finished)


class Gone:
    """A role of which nothing is left when a stop was asked for."""

    def __init__(self, role: object, stop: Callable[[], bool]) -> None:
        self._role, self._stop = role, stop

    def __getattr__(self, name: str) -> object:
        if self._stop():
            raise LearnerLostError("learner-0 was lost")
        return getattr(self._role, name)


@pytest.mark.parametrize("role", ["learner", "moments"])
def test_a_worker_lost_while_stopping_is_reported_and_not_replaced(
    role: str, tmp_path: Path, logged: list[str]
) -> None:
    output = {"background": False, "gallery_every": 0}
    config = small_config(evaluation={"num_images": 0}, iterations=9, output=output)
    run = RunDirectory.create(str(tmp_path / "run"), config)
    seen: list[int] = []

    class Counting(RunConsole):
        def update(self, row) -> None:
            seen.append(row["iteration"])

    def stop() -> bool:
        return len(seen) >= 3

    with Counting(9) as console, InlineFleet(fleet_plan(config), stop) as fleet:
        setattr(fleet, f"_{role}", Gone(getattr(fleet, role), stop))
        assert Experiment(config, run, fleet, console, stop).run() is False
    (told,) = [line for line in logged if "stopped" in line]
    assert told == (
        "stopped after 3 of 9 iterations, without a checkpoint of where it was (learner-0 was "
        f"lost); the newest is step_000002; go on with\n  {resume_command(run.path)}"
    )
    assert [path.name for path in run.checkpoints.glob("step_*")] == ["step_000002"]


def test_a_taming_policy_is_tuned_by_the_same_program(tmp_path: Path) -> None:
    """Another family of models, and another order of tokens."""
    torch.manual_seed(0)
    architecture = TamingConfig(
        dim=32, num_layers=1, num_heads=2, vocab_size=64, block_size=16, grid=4, num_classes=10,
        permuter="ZCurve",
    )  # fmt: skip
    policy = TamingGPT(architecture)
    file = tmp_path / "policy.safetensors"
    write_tensors(file, policy.state_dict(), architecture.to_dict())
    run = tmp_path / "run"
    status = main([
        *OPTIONS, "--inline", "--run-dir", str(run), "--policy.checkpoint", str(file),
        "--evaluation.cfg-scales", "--iterations", "2",
    ])  # fmt: skip
    assert status == 0
    for row, _ in recorded(run):
        assert row["policy/ratio"] == pytest.approx(1, abs=1e-4)
    tuned = read_tensors(run / "checkpoints" / "step_000002" / "policy.safetensors")
    assert not torch.equal(tuned["head.weight"], policy.head.weight)


def test_samplers_may_compute_in_bf16(tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ["--inline", "--run-dir", str(run), "--evaluation.num-images", "0"]
    options += ["--iterations", "2", "--output.gallery-every", "0"]
    assert main([*flags(), *options, "--sampler.dtype", "bfloat16"]) == 0
    for row, _ in recorded(run):
        assert 1e-4 < row["policy/logprob_gap"] < 1
        assert row["policy/ratio"] == pytest.approx(1, abs=0.05)
