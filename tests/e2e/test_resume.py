"""Resumed runs equal the uninterrupted one, bit for bit; evaluations while training; lost runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cluster.fleet import InlineFleet
from cluster.io.run_layout import CONFIG
from learner.checkpoints.checkpoint import verify
from learner.experiment import Experiment
from learner.fleet_plan import fleet_plan
from learner.monitoring.console import RunConsole
from learner.monitoring.metrics import read_metrics, repeatable
from learner.run import REFUSED, main
from learner.runs.run_dir import RunDirectory
from tests.small_run import small_config

STEPS = 6
LATE = 5
"""Where runs are cut: between two checkpoints."""


def config_of(staleness: int, **output: Any):
    return small_config(
        iterations=STEPS,
        max_staleness=staleness,
        entropy={"controller": "target", "coef": 0.01, "damping": 0.5},
        evaluation={"num_images": 20, "cfg_scales": (), "every": 3},
        output={"checkpoint_every": 2, "keep_checkpoints": 9, "gallery_every": 0, **output},
    )


class KilledError(Exception):
    """What a test ends a run with: nothing is put in order."""


def run_until(path: Path, staleness: int, last: int = STEPS, **output: Any) -> Path:
    """A run; killed after so many iterations are recorded, before they are kept."""
    config = config_of(staleness, **output)
    run = RunDirectory.create(str(path), config)

    class Killing(RunConsole):
        def update(self, row: Any) -> None:
            if row["iteration"] == last < STEPS:
                raise KilledError

    with Killing(STEPS) as console, InlineFleet(fleet_plan(config)) as fleet:
        experiment = Experiment(config, run, fleet, console, lambda: False)
        if last == STEPS:
            assert experiment.run()
        else:
            with pytest.raises(KilledError):
                experiment.run()
    return path


@pytest.fixture(
    scope="module",
    params=[pytest.param(0, marks=pytest.mark.slow), 1],  # test_main_job.py resumes on-policy runs
    ids=["on-policy", "one ahead"],
)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    folder = tmp_path_factory.mktemp("resume")
    return request.param, run_until(folder / "run", request.param)  # the moments know its name


def metrics(run: Path) -> list[dict[str, Any]]:
    return [repeatable(row) for row in read_metrics(run / "metrics.jsonl")]


def assert_same(found: Path, expected: Path) -> None:
    """Everything that equal runs have in common; files of checkpoints and Parquet bit for bit."""
    rows = [
        [repeatable(row) for row in read_metrics(p / "metrics.jsonl")] for p in (found, expected)
    ]
    assert rows[0] == rows[1]
    assert [row["iteration"] for row in rows[0]] == list(range(1, STEPS + 1))
    assert rows[0][-1]["policy/entropy_coef"] != 0.01  # the controller did steer
    for pattern in ("rollouts/*.parquet", "evaluations.jsonl", "evaluation.json"):
        theirs = {path.name: path.read_bytes() for path in expected.glob(pattern)}
        assert theirs
        assert {path.name: path.read_bytes() for path in found.glob(pattern)} == theirs
    names = sorted(path.name for path in (expected / "checkpoints").glob("step_*"))
    assert names == [f"step_{step:06d}" for step in (2, 3, 4, 6)]
    assert sorted(path.name for path in (found / "checkpoints").glob("step_*")) == names
    for name in names:
        ours, theirs = (verify(path / "checkpoints" / name) for path in (found, expected))
        files = set(theirs.manifest.files) - {CONFIG}  # which names the run
        assert set(ours.manifest.files) - {CONFIG} == files
        for file in files:
            assert ours.read(file) == theirs.read(file), f"{name}/{file}"
        assert ours.manifest.figures == theirs.manifest.figures


@pytest.mark.parametrize("last", [pytest.param(1, marks=pytest.mark.slow), LATE])
def test_killed_and_resumed_equals_uninterrupted(whole: tuple, tmp_path: Path, last: int) -> None:
    """Before the first checkpoint, and between two; with what a kill leaves half written."""
    staleness, expected = whole
    run = run_until(tmp_path / "run", staleness, last)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 5, "vers')
    with (run / "trace.json").open("a") as file:
        file.write(',\n{"name": "sam')
    (run / "rollouts" / "iteration_000009.parquet").write_bytes(b"PAR1")
    (run / "rollouts" / ".iteration_000005.parquet.partial").write_bytes(b"PAR1")
    (run / "checkpoints" / ".step_000004.0a1b").mkdir()
    assert main(["--resume", "--inline", "--run-dir", str(run)]) == 0
    assert_same(run, expected)
    assert sorted(path.name for path in run.rglob(".*")) == []
    events = json.loads((run / "trace.json").read_text())
    assert {event["name"] for event in events} >= {"sample", "learn"}


def test_from_an_earlier_step(
    whole: tuple, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, expected = whole
    run = tmp_path / "run"
    shutil.copytree(expected, run)
    arguments = ["--resume", "--inline", "--run-dir", str(run), "--from-step"]
    assert main([*arguments, "5"]) == REFUSED
    assert "--from-step 5: no complete checkpoint of it; there are: 2, 3, 4, 6" in (
        capsys.readouterr().err
    )
    assert main([*arguments, "3"]) == 0
    assert_same(run, expected)
    (aside,) = (run / "checkpoints").glob("archived-*")
    names = sorted(path.name for path in aside.iterdir())
    assert names == ["evaluations.jsonl", "metrics.jsonl", "step_000004", "step_000006"]
    assert (aside / "metrics.jsonl").read_bytes() == (expected / "metrics.jsonl").read_bytes()


def test_from_step_needs_resume(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--from-step", "2", "--inline"]) == REFUSED
    assert "add --resume" in capsys.readouterr().err


def test_evaluations_change_nothing_but_what_is_kept(whole: tuple, tmp_path: Path) -> None:
    staleness, expected = whole
    config = config_of(staleness)
    rows = [json.loads(line) for line in (expected / "evaluations.jsonl").read_text().splitlines()]
    assert [row.pop("step") for row in rows] == [3, 6]
    assert rows[0] != rows[1]
    assert rows[1] == json.loads((expected / "evaluation.json").read_text())["tuned"]
    assert verify(expected / "checkpoints" / "step_000003").manifest.figures == rows[0]
    assert verify(expected / "checkpoints" / "step_000002").manifest.figures == {}
    plain = tmp_path / "plain"
    flags = ["--inline", "--run-dir", str(plain), "--evaluation.every", "0"]
    flags += ["--evaluation.num-images", "0"]
    made = RunDirectory.create(str(tmp_path / "preset"), config)
    assert main(["--preset", str(made.config), *flags]) == 0
    metrics = [
        [repeatable(row) for row in read_metrics(p / "metrics.jsonl")] for p in (plain, expected)
    ]
    assert metrics[0] == metrics[1]


def test_an_evaluation_that_a_stop_interrupted_is_repeated(whole: tuple, tmp_path: Path) -> None:
    staleness, expected = whole
    config = config_of(staleness)
    run = RunDirectory.create(str(tmp_path / "run"), config)
    stopping: list[bool] = []

    class Stopping(RunConsole):
        def update(self, row: Any) -> None:
            if row["iteration"] == 3:  # and then the evaluation of step 3 is due
                stopping.append(True)

    with (
        Stopping(STEPS) as console,
        InlineFleet(fleet_plan(config), lambda: bool(stopping)) as fleet,
    ):
        experiment = Experiment(config, run, fleet, console, lambda: bool(stopping))
        assert experiment.run() is False
    assert verify(run.checkpoints / "step_000003").manifest.figures == {}
    # those drawn ahead, with weights that are gone then
    assert (run.checkpoints / "step_000003" / "groups.msgpack").is_file() == bool(staleness)
    assert main(["--resume", "--inline", "--run-dir", str(run.path)]) == 0
    assert_same(run.path, expected)
    assert metrics(run.path)[-1]["policy/staleness"] == staleness


def test_everything_can_be_brought_back_several_times_within_a_run(
    whole: tuple, tmp_path: Path
) -> None:
    """As when a lost learner was replaced: by one that has learned nothing."""
    staleness, expected = whole
    config = config_of(staleness)
    run = RunDirectory.create(str(tmp_path / "run"), config)
    lost = [2, 4, 5]

    class Losing(RunConsole):
        def update(self, row: Any) -> None:
            if lost and row["iteration"] == lost[0]:
                lost.pop(0)
                raise KilledError

    with Losing(STEPS) as console, InlineFleet(fleet_plan(config)) as fleet:
        experiment = Experiment(config, run, fleet, console, lambda: False)
        first, starts = experiment._prepare_fleet(), []
        while True:
            starts.append(first)
            try:
                assert experiment._train(first) == STEPS
                break
            except KilledError:
                plan = fleet_plan(config)
                fleet._learner = plan.learner.factory(plan.learner.config, name="learner")
                # what was asked for is forgotten; and a sampler that has newer weights would
                # refuse older ones
                fleet._submitted.clear()
                fleet._sampler = plan.sampler.factory(plan.sampler.config, name="sampler")
                first = experiment.restore()
        experiment._finish(STEPS)
        experiment._checkpoints.close()
    # what the learner wrote when it was lost, and nobody had heard of, is no checkpoint
    assert starts == [0, 0, 2, 3]
    assert_same(run.path, expected)


def test_the_best_one_is_kept_and_a_lost_directory_made_again(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/elsewhere"
    run = run_until(tmp_path / "run", 0, keep_checkpoints=1, keep_best="fid", checkpoint_url=url)
    best = json.loads((run / "best.json").read_text())
    evaluations = [
        json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()
    ]
    assert best["value"] == min(row["fid"] for row in evaluations)
    expected = sorted({best["step"], STEPS})
    there = sorted(path.name for path in (tmp_path / "elsewhere").iterdir())
    assert there == [f"step_{step:06d}" for step in expected]
    whole = verify(run / "checkpoints" / f"step_{STEPS:06d}")
    policy = whole.read("policy.safetensors")
    shutil.rmtree(run)
    again = ["--resume", "--inline", "--run-dir", str(run), "--output.checkpoint-url", url]
    assert main(again) == 0
    assert verify(run / "checkpoints" / f"step_{STEPS:06d}").read("policy.safetensors") == policy
    assert "tuned" in json.loads((run / "evaluation.json").read_text())


def test_a_changed_configuration_file_is_refused(
    whole: tuple, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole[1], run)
    text = (run / CONFIG).read_text()
    (run / CONFIG).write_text(text.replace("iterations: 6", "iterations: 7"))
    assert main(["--resume", "--inline", "--run-dir", str(run)]) == REFUSED
    assert "give them as flags to --resume" in capsys.readouterr().err


def test_rows_that_are_not_what_they_were_are_noticed(
    whole: tuple, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole[1], run)
    rows = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(rows.replace('"version": 3', '"version": 7'))
    assert main(["--resume", "--inline", "--run-dir", str(run)]) != 0
    assert "it is damaged, or was edited" in " ".join(capsys.readouterr().out.split())
    (run / "metrics.jsonl").unlink()
    (run / "rollouts" / "iteration_000001.parquet").write_bytes(b"PAR1")
    assert main(["--resume", "--inline", "--run-dir", str(run), "--from-step", "4"]) == 0
    said = capsys.readouterr().out
    assert "note: metrics.jsonl is gone" in said
    assert "the rollouts of 1 iterations are missing or damaged, the first of 1" in said
    assert [row["iteration"] for row in read_metrics(run / "metrics.jsonl")] == [5, 6]
