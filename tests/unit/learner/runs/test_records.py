"""Run directory, metrics, rollouts, timeline, checkpoints."""

from __future__ import annotations

import errno
import json
import os
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cluster.errors import ConfigError, DataError, StorageError
from cluster.spans import Span
from learner.config import RunConfig
from learner.grpo.advantage import group_advantages
from learner.loggers.logger import Loggers
from learner.loggers.tensorboard import TensorBoard
from learner.monitoring.gallery import contact_sheet
from learner.monitoring.metrics import Recorder, read_metrics, repeatable
from learner.monitoring.timeline import Trace
from learner.runs import records
from learner.runs.run_dir import RunDirectory
from rewards.combine import Combiner, RewardTerm
from tests.unit.helpers import scored_group


def new_run(path: Path) -> RunDirectory:
    return RunDirectory.create(str(path), RunConfig())


def test_a_used_directory_is_refused(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    assert run.read_config() == RunConfig()
    with pytest.raises(ConfigError, match="is not empty: add --resume"):
        new_run(tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file: name another directory"):
        new_run(tmp_path / "file")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match="is not empty, and holds no run: name another"):
        new_run(tmp_path / "other")


def test_a_run_that_kept_nothing_leaves_nothing(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    assert run.exit_message() == "nothing was kept"
    assert not run.path.exists()
    run = new_run(tmp_path / "run")
    run.write_evaluation({"base": {"fid": 1.0}})
    assert f"--resume --run-dir {run.path}" in run.exit_message()
    assert run.evaluation.is_file()


def test_what_is_below_belongs_to_another_run(tmp_path: Path) -> None:
    """A run started in the folder of runs, of which one has just begun."""
    other = new_run(tmp_path / "runs" / "other")
    with pytest.raises(ConfigError, match="is not empty, and holds no run: name another"):
        new_run(tmp_path / "runs")
    assert "what was kept" in RunDirectory(tmp_path / "runs").exit_message()
    assert other.read_config() == RunConfig()


def test_a_run_behind_a_link_that_kept_nothing_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    for _ in range(2):  # the same command line again
        assert new_run(tmp_path / "run").exit_message() == "nothing was kept"
    assert not [path for path in (tmp_path / "disk").rglob("*") if path.is_file()]


def record(recorder: Recorder, iteration: int) -> None:
    groups = [scored_group({"clip": [0.1, np.nan]}, errors=[None, "clip: boom"])]
    advantages = group_advantages(groups, {}, Combiner({"clip": RewardTerm()}))
    row = {"iteration": iteration, "reward/clip": 0.1, "time/learn": 0.5}
    recorder.record(row, groups, advantages, [Span("learner", "learn", 1.0, 1.5)])


def test_a_resumed_run_has_every_row_once(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    recorder = Recorder(run, 0, rollouts=True)
    for iteration in range(1, 6):
        record(recorder, iteration)
    recorder.close()
    resumed = Recorder(run, 3, rollouts=True)  # the checkpoint was written after iteration 3
    assert [row["iteration"] for row in read_metrics(run.metrics)] == [1, 2, 3]
    assert len(list(run.rollouts.iterdir())) == 3
    for iteration in range(4, 7):
        record(resumed, iteration)
    resumed.close()
    assert [row["iteration"] for row in read_metrics(run.metrics)] == list(range(1, 7))
    assert len(list(run.rollouts.iterdir())) == 6
    events = json.loads(run.trace.read_text())
    assert len([event for event in events if event["ph"] == "M"]) == 1
    assert len([event for event in events if event["ph"] == "X"]) == 8


def test_row_rollouts_and_checkpoint_of_a_moment_have_one_number(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    loggers = Loggers({"TensorBoard": TensorBoard(run.tensorboard)})
    recorder = Recorder(run, 0, rollouts=True, loggers=loggers)
    for iteration in range(1, 4):
        record(recorder, iteration)
    recorder.close()
    loggers.close()
    names = sorted(file.name for file in run.rollouts.iterdir())
    assert names == [f"iteration_{number:06d}.parquet" for number in (1, 2, 3)]
    assert pq.read_table(run.rollouts / names[2])["iteration"].to_pylist() == [3, 3]
    events = EventAccumulator(str(run.tensorboard)).Reload()
    assert [event.step for event in events.Scalars("reward/clip")] == [1, 2, 3]
    Recorder(run, 2, rollouts=True).close()  # as --from-step 2 does
    assert [row["iteration"] for row in read_metrics(run.metrics)] == [1, 2]
    assert sorted(file.name for file in run.rollouts.iterdir()) == names[:2]


@pytest.mark.parametrize("rollouts", [True, False])
@pytest.mark.parametrize("versions", [True, False])
def test_a_run_that_counts_from_0_keeps_to_it(
    tmp_path: Path, rollouts: bool, versions: bool
) -> None:
    """Its checkpoints vouch for the rows as they are."""
    run = new_run(tmp_path / "run")
    rows = [{"iteration": at, **({"version": at + 1} if versions else {})} for at in range(4)]
    lines = [json.dumps(row) + "\n" for row in rows]
    run.metrics.write_text("".join(lines))
    recorder = Recorder(new_run(tmp_path / "other"), 0, rollouts=True)
    for number in range(1, 5):
        record(recorder, number)
        made = tmp_path / "other" / "rollouts" / f"iteration_{number:06d}.parquet"
        made.rename(run.rollouts / f"iteration_{number - 1:06d}.parquet")
    recorder.close()
    assert (
        records.digests(run, 3)[run.metrics.name] == sha256("".join(lines[:3]).encode()).hexdigest()
    )
    resumed = Recorder(run, 3, rollouts=rollouts)
    record(resumed, 4)
    resumed.close()
    assert [row["iteration"] for row in read_metrics(run.metrics)] == [0, 1, 2, 3]
    kept = sorted(int(file.stem[-6:]) for file in run.rollouts.iterdir())
    assert kept == ([0, 1, 2, 3] if rollouts else [0, 1, 2])


def test_a_run_that_lost_its_first_rows_is_reported_by_its_versions(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    run.metrics.write_text('{"iteration": 4, "version": 5}\n')
    assert records.counted_from(run) == 0
    run.metrics.write_text('{"iteration": 5, "version": 5}\n')
    assert records.counted_from(run) == 1
    run.metrics.unlink()
    assert records.counted_from(run) == 1


def test_a_line_that_a_crash_cut_short_is_left_out(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    recorder = Recorder(run, 0, rollouts=False)
    for iteration in range(1, 4):
        record(recorder, iteration)
    recorder.close()
    with run.metrics.open("a") as file:
        file.write('{"iter')
    assert [row["iteration"] for row in read_metrics(run.metrics)] == [1, 2, 3]
    resumed = Recorder(run, 3, rollouts=False)
    record(resumed, 4)
    resumed.close()
    assert [row["iteration"] for row in read_metrics(run.metrics)] == [1, 2, 3, 4]
    lines = run.metrics.read_text().splitlines()
    run.metrics.write_text("\n".join([lines[0], "{", *lines[2:]]) + "\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2: not JSON"):
        read_metrics(run.metrics)


@pytest.mark.parametrize("name", ["metrics.jsonl", "iteration_000002.parquet"])
def test_no_room_for_records(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was whole stays whole, and the run can be gone on with."""
    run = new_run(tmp_path / "run")
    recorder = Recorder(run, 0, rollouts=True)
    record(recorder, 1)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if name == "metrics.jsonl":
        monkeypatch.setattr(recorder, "_metrics", SimpleNamespace(write=refuse))
    else:
        monkeypatch.setattr(pq, "write_table", refuse)
    with pytest.raises(StorageError, match=rf"{name} could not be written: No space left.*MiB are"):
        record(recorder, 2)
    monkeypatch.undo()
    recorder.close()
    assert [row["iteration"] for row in read_metrics(run.metrics)] == [1]
    resumed = Recorder(run, 1, rollouts=True)
    record(resumed, 2)
    resumed.close()
    assert [row["iteration"] for row in read_metrics(run.metrics)] == [1, 2]
    assert len([file for file in run.rollouts.iterdir() if pq.read_metadata(file)]) == 2


def test_rollouts_have_everything(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    recorder = Recorder(run, 0, rollouts=True)
    record(recorder, 1)
    recorder.close()
    rows = pq.read_table(next(run.rollouts.iterdir())).to_pylist()
    assert len(rows) == 2
    good, failed = rows
    assert set(good) >= {
        "iteration", "group", "rollout", "seed", "class_index", "text", "policy_version",
        "temperature", "top_k", "top_p", "cfg_scale", "guidance",
        "tokens", "logprobs", "entropies", "reward_clip", "advantage", "error",
    }  # fmt: skip
    assert len(good["tokens"]) == len(good["logprobs"]) == 4
    assert (good["error"], failed["error"]) == (None, "clip: boom")
    assert np.isnan(failed["reward_clip"])


def test_repeatable_metrics_leave_times_out() -> None:
    row = {"iteration": 1, "fid/ema": 2.0, "time/learn": 0.1, "fleet/restarts": 0}
    assert repeatable(row) == {"iteration": 1, "fid/ema": 2.0}


def test_the_timeline_of_a_killed_run_can_be_gone_on_with(tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    trace = Trace(file, resume=False)
    trace.add([Span("a", "work", 0.0, 1.0)])
    trace.close()
    file.write_text(file.read_text().rstrip().removesuffix("]"))  # as one that was killed
    resumed = Trace(file, resume=True)
    resumed.add([Span("b", "work", 1.0, 2.0), Span("a", "work", 2.0, 3.0)])
    resumed.close()
    events = json.loads(file.read_text())
    assert [event["tid"] for event in events if event["ph"] == "X"] == [1, 2, 1]


def test_images_in_decoding_have_a_row_beside_the_next_tokens(tmp_path: Path) -> None:
    trace = Trace(tmp_path / "trace.json", resume=False)
    trace.add([Span("s", "sample", 0, 2), Span("s", "decode", 2, 3), Span("s", "sample", 2, 4)])
    trace.close()
    events = json.loads((tmp_path / "trace.json").read_text())
    names = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    rows = [(names[event["tid"]], event["name"]) for event in events if event["ph"] == "X"]
    assert rows == [("s", "sample"), ("s decode", "decode"), ("s", "sample")]


def test_an_empty_timeline_is_valid(tmp_path: Path) -> None:
    Trace(tmp_path / "trace.json", resume=False).close()
    assert json.loads((tmp_path / "trace.json").read_text()) == []


def test_contact_sheet_places_every_image() -> None:
    rows = [np.full((3, 8, 8, 3), 50 * row + 50, np.uint8) for row in range(2)]
    sheet = contact_sheet(rows).pixels
    assert sheet.shape == (2 * 34 + 2, 3 * 34 + 2, 3)  # 8 pixels enlarged to 32, gaps of 2
    assert (sheet[2:34, 2:34] == 50).all()
    assert (sheet[36:68, 70:102] == 100).all()
    assert (sheet[0] == 32).all()
