"""Checkpoints of a run: complete or not there, in the background, and which of them stay."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import msgpack
import pytest

from cluster.errors import CheckpointError, ConfigError, FleetError, LockLostError, StorageError
from cluster.io.locks import acquire
from cluster.io.run_layout import CONFIG, MANIFEST, OWNER
from learner.checkpoints import checkpoint, store
from learner.checkpoints.checkpoint import restore, verify
from learner.checkpoints.manifest import FileDigest, Manifest
from learner.checkpoints.store import best_step, retained_steps
from learner.monitoring.metrics import append_evaluation
from learner.output import OutputConfig
from learner.runs.run_dir import RunDirectory
from rewards.combine import Combiner, RewardTerm
from tests.small_run import small_config
from tests.unit.checkpoint_cases import FakeFleet, Kept, combiner


def test_the_newest_are_kept_and_restored(tmp_path: Path) -> None:
    made = Kept(tmp_path / "run", keep_checkpoints=2)
    for step in (10, 20, 30):
        made.save(step)
    assert made.names == ["step_000020", "step_000030"]
    newest = made.open().newest()
    assert newest is not None
    assert newest.step == 30
    assert (newest.path / CONFIG).read_bytes() == made.run.config.read_bytes()
    resumed, fleet = Combiner({"clip": RewardTerm()}), FakeFleet()
    restore(newest, fleet, resumed)
    assert resumed.anchors == {"clip": 30.1}
    assert fleet.restored == {"learner": b"weights 30", "moments": b"moments"}


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest", "no manifest"])
def test_a_damaged_checkpoint_is_skipped_with_a_message(
    tmp_path: Path, damage: str, logged: list[str]
) -> None:
    made = Kept(tmp_path / "run")
    made.save(1)
    broken = made.save(2).path
    file = broken / "policy.safetensors"
    match damage:
        case "flip":
            file.write_bytes(b"weightt 2")
        case "truncate":
            file.write_bytes(b"weig")
        case "remove":
            file.unlink()
        case "manifest":
            (broken / MANIFEST).write_bytes(b"\x81\xa1")
        case "no manifest":
            (broken / MANIFEST).unlink()
    newest = made.open().newest()
    assert newest is not None
    assert newest.step == 1
    assert len(logged) == 1
    assert "skipping checkpoint step_000002" in logged[0]
    # What comes next is the newest: the damaged one counts for nothing, and is not thrown away.
    made.store.roll_back(1)
    assert made.steps == [1]
    assert [path.name for path in made.run.checkpoints.glob("archived-*/*")] == ["step_000002"]


def test_there_is_none_or_none_is_whole(tmp_path: Path) -> None:
    made = Kept(tmp_path / "run")
    (made.run.checkpoints / ".step_000009.partial").mkdir()
    assert made.open().newest() is None
    assert made.names == [".step_000009.partial"]  # which may be another process's
    made.store.clear()
    assert made.names == []
    broken = made.save(9)
    (broken.path / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="no complete checkpoint under"):
        made.open().newest()


def test_a_renamed_or_swapped_checkpoint_is_noticed(tmp_path: Path) -> None:
    made = Kept(tmp_path / "run")
    first, second = made.save(50).path, made.save(100).path
    shutil.rmtree(second)
    shutil.copytree(first, second)
    with pytest.raises(CheckpointError, match="step_000100: its content is that of step 50"):
        verify(second)
    newest = made.open().newest()
    assert newest is not None
    assert newest.step == 50


def test_a_checkpoint_of_another_run_or_configuration_is_skipped(
    tmp_path: Path, logged: list[str]
) -> None:
    ours, theirs = Kept(tmp_path / "ours"), Kept(tmp_path / "theirs")
    ours.save(1)
    shutil.copytree(theirs.save(2).path, ours.run.checkpoints / "step_000002")
    newest = ours.open().newest()
    assert newest is not None
    assert newest.step == 1
    assert "step_000002: it belongs to run" in logged[0]
    ours.config = small_config(seed=7, output={"checkpoint_every": 1})
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        ours.open().newest()
    assert "step_000001: of another configuration: --resume continues" in logged[-1]
    assert "cannot change seed (0 in the run, 7 now)" in logged[-1]
    ours.config = small_config(iterations=9, output={"checkpoint_every": 3})  # may change
    newest = ours.open().newest()
    assert newest is not None


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/b", "..", ".hidden", ""])
def test_names_in_a_manifest_stay_inside(tmp_path: Path, name: str) -> None:
    made = Kept(tmp_path / "run")
    path = made.save(1).path
    (tmp_path / "outside").write_bytes(b"secret")
    good = verify(path).manifest
    sums = {**good.files, name: FileDigest.of(tmp_path / "outside")}
    (path / MANIFEST).write_bytes(Manifest(step=1, files=sums).to_bytes())
    with pytest.raises(CheckpointError, match="expected plain names of files in its own directory"):
        verify(path)


def test_links_do_not_lead_out(tmp_path: Path) -> None:
    made = Kept(tmp_path / "run")
    path = made.save(1).path
    outside = tmp_path / "outside"
    shutil.copytree(path, outside)
    (path / "policy.safetensors").unlink()
    (path / "policy.safetensors").symlink_to(outside / "policy.safetensors")
    with pytest.raises(CheckpointError, match=r"policy.safetensors is a link or no file"):
        verify(path)
    shutil.rmtree(path)
    path.symlink_to(outside)
    with pytest.raises(CheckpointError, match="a link that leads out of"):
        verify(path)
    # but the directory of all checkpoints may lie elsewhere
    path.unlink()
    outside.rename(tmp_path / "step_000001")
    made.run.checkpoints.rmdir()
    (tmp_path / "disk").mkdir()
    (tmp_path / "step_000001").rename(tmp_path / "disk" / "step_000001")
    made.run.checkpoints.symlink_to(tmp_path / "disk")
    assert verify(path).step == 1


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = Kept(tmp_path / "run").save(1).path
    new = msgpack.unpackb((path / MANIFEST).read_bytes())
    (path / MANIFEST).write_bytes(msgpack.packb({**new, "format": 2}))
    with pytest.raises(CheckpointError, match=r"has format 2, expected 3: resume with"):
        verify(path)


def test_every_byte_is_hashed_once_on_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Local and downloaded: digests are most of the time that a resume of a large policy takes."""
    made = Kept(tmp_path / "run", checkpoint_url=f"file://{tmp_path}/elsewhere")
    files = {*made.save(1).manifest.files}
    hashed, of = [], FileDigest.of
    count = lambda file: hashed.append(file.name) or of(file)  # noqa: E731
    monkeypatch.setattr(FileDigest, "of", count)
    assert made.open().newest().step == 1
    assert sorted(hashed) == sorted(files)
    hashed.clear()
    shutil.rmtree(made.run.checkpoints / "step_000001")
    assert made.open().newest().step == 1
    assert sorted(hashed) == sorted(files)


def test_what_the_manifest_does_not_name_is_not_read(tmp_path: Path) -> None:
    found = Kept(tmp_path / "run").save(1)
    (found.path / "groups.msgpack").write_bytes(b"of somebody else")
    assert verify(found.path).read("groups.msgpack") is None


def test_the_learner_does_not_wait_for_the_disk(tmp_path: Path) -> None:
    """Half a second a checkpoint: with `background` the loop goes on meanwhile."""
    times = {}
    for background in (True, False):
        made = Kept(tmp_path / str(background), background=background)
        fleet = FakeFleet(slow_s=0.5)
        start = time.monotonic()
        made.store.save(1, fleet, combiner())
        times[background] = time.monotonic() - start
        made.store.poll()
        assert made.steps == ([] if background else [1])
        made.store.close()
        assert made.steps == [1]
    assert times[True] < 0.25 < 0.5 <= times[False]


def test_one_is_made_at_a_time(tmp_path: Path) -> None:
    made = Kept(tmp_path / "run")
    made.store.save(1, FakeFleet(slow_s=0.3), combiner())
    start = time.monotonic()
    made.store.save(2, FakeFleet(), combiner())
    assert time.monotonic() - start >= 0.25
    assert made.steps == [1]
    made.store.close()
    assert made.steps == [1, 2]


def test_a_wait_has_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Kept(tmp_path / "run")
    made.config = small_config(timeout_s=0.3)
    made.open().save(1, FakeFleet(slow_s=60), combiner())
    monkeypatch.setattr(store, "WAIT_S", 0.05)
    with pytest.raises(CheckpointError, match=r"the learner's files: not done within 0\.3 s"):
        made.store.close()


def test_one_whose_learner_died_is_forgotten(tmp_path: Path) -> None:
    made = Kept(tmp_path / "run")
    made.save(1)
    fleet = FakeFleet(slow_s=60)
    made.store.save(2, fleet, combiner())
    fleet.error = FleetError("learner was lost")
    with pytest.raises(FleetError, match="was lost"):
        made.store.poll()
    made.store.abandon()
    assert made.names == ["step_000001"]
    # and one that has left the learner is finished without it
    fleet = FakeFleet()
    made.store.save(3, fleet, combiner())
    while not fleet.left:
        made.store.poll()
    fleet.error = FleetError("learner was lost")
    made.store.abandon()
    assert made.names == ["step_000001", "step_000003"]
    verify(made.run.checkpoints / "step_000003")


@pytest.mark.parametrize("who", ["learner", "learner later", "driver"])
def test_a_full_disk_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    made = Kept(tmp_path / "run")
    made.save(10)
    fleet = FakeFleet()
    full = StorageError("policy.safetensors could not be written: No space left on device")
    if who == "learner":
        monkeypatch.setattr(fleet, "save", lambda *_: (_ for _ in ()).throw(full))
    elif who == "learner later":
        fleet.error = full
    else:

        def refuse(path: Path, data: bytes) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(Path, "write_bytes", refuse)
        monkeypatch.setattr(fleet, "save", lambda path, _: (path / "policy").touch())

    def save() -> None:
        made.store.save(20, fleet, combiner())
        made.store.wait()

    with pytest.raises(StorageError) as caught:
        save()
    said = str(caught.value)
    assert "checkpoint step_000020 was not kept (step_000010 is whole)" in said
    assert "No space left on device" in said
    assert who != "driver" or re.search(r"[\d,]+ MiB are free there.*--resume", said)
    monkeypatch.undo()
    assert made.names == ["step_000010"]
    newest = made.open().newest()
    assert newest is not None
    assert newest.step == 10


def test_storage_that_is_not_shared_is_noticed(tmp_path: Path) -> None:
    made, fleet = Kept(tmp_path / "run"), FakeFleet()
    fleet.save = lambda directory, background: None  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match="does the storage show one node"):
        made.save(1, fleet)
    assert made.names == []


def test_who_is_no_owner_any_more_publishes_nothing(tmp_path: Path) -> None:
    """As after a suspension: the new owner wrote its own lock."""
    made = Kept(tmp_path / "run", keep_checkpoints=1)
    made.save(1)
    made.run.lock = acquire(made.run.path / OWNER, "run")
    fleet = FakeFleet(slow_s=0.2)
    made.store.save(2, fleet, combiner())
    other = replace(made.run.lock.holder, token="0" * 16, pid=1)
    (made.run.path / OWNER).write_bytes(other.to_bytes())
    with pytest.raises(LockLostError, match=r"process 1 on .* has taken over"):
        made.store.wait()
    assert made.steps == [1]
    writes = (
        lambda: made.store.save(3, FakeFleet(), combiner()),
        lambda: made.store.roll_back(0),
        lambda: made.store.add_figures(verify(made.run.checkpoints / "step_000001"), {"fid": 1.0}),
        lambda: made.run.write_evaluation({}),
        lambda: made.run.write_config(made.config),
        lambda: append_evaluation(made.run, 1, {}),
        made.store.clear,
    )
    before = sorted(str(path) for path in made.run.path.rglob("*"))
    for write in writes:
        with pytest.raises(LockLostError):
            write()
    made.store.abandon()
    assert "has taken over" in made.run.exit_message()
    assert sorted(str(path) for path in made.run.path.rglob("*") if ".step" not in path.name) == [
        path for path in before if ".step" not in path
    ]
    made.run.lock.release()


def test_one_that_goes_is_never_seen_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Kept(tmp_path / "run", keep_checkpoints=1)
    made.save(1)
    seen = []
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda path, **_: seen.append(path.name))
    made.save(2)
    assert made.steps == [2]
    assert [name for name in seen if name.startswith("step_")] == []
    monkeypatch.undo()
    made.store.clear()
    assert made.names == ["step_000002"]


def test_what_stays() -> None:
    steps = range(10, 130, 10)
    output = OutputConfig(keep_checkpoints=2, keep_every=50)
    assert retained_steps(steps, output, best=30) == {30, 50, 100, 110, 120}
    assert retained_steps(steps, OutputConfig(keep_checkpoints=1), best=None) == {120}
    assert retained_steps([10], output, best=30) == {10}  # the best one is not here


def test_the_best_is_the_least_distance_or_the_most_of_the_others() -> None:
    graded = {1: {"fid": 3.0, "accuracy": 0.5}, 2: {"fid": 2.0, "accuracy": 0.5}, 3: {}}
    assert best_step("fid", graded) == 2
    assert best_step("accuracy", graded) == 1  # the earlier of equals
    assert best_step("second/fid", {1: {"second/fid": 3.0}, 2: {"second/fid": 2.0}}) == 2
    assert best_step("fid", {1: {"fid": float("nan")}}) is None


def test_the_best_one_stays_and_is_pointed_to(tmp_path: Path) -> None:
    made = Kept(tmp_path / "run", keep_checkpoints=1, keep_best="fid")
    for step, fid in enumerate((5.0, 2.0, 3.0, 4.0), 1):
        made.save(step, figures={"fid": fid})
    assert made.steps == [2, 4]
    said = json.loads(made.run.best.read_text())
    assert said == {
        "figure": "fid",
        "value": 2.0,
        "step": 2,
        "checkpoint": "checkpoints/step_000002",
    }
    found = made.open().at(4)
    made.store.add_figures(found, {"fid": 1.0})
    assert json.loads(made.run.best.read_text())["step"] == 4
    assert verify(found.path).manifest.figures == {"fid": 1.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output": {"keep_best": "fid"}}, "set evaluation.every to the number of iterations"),
        ({"output": {"keep_best": "fed"}, "evaluation": {"every": 2}}, "found 'fed'"),
        ({"output": {"keep_best": "entropy"}, "evaluation": {"every": 2}}, "found 'entropy'"),
        (
            {"output": {"keep_best": "fid"}, "evaluation": {"every": 2, "images": ""}},
            "compares with real images: name them by evaluation.images, or choose one of accuracy",
        ),
        ({"evaluation": {"every": 2, "patience": 1}}, "watches the figure of output.keep_best"),
        ({"output": {"keep_every": 3}}, r"must be a multiple of output.checkpoint_every \(2\)"),
        ({"output": {"checkpoint_url": "/tmp/x"}}, "must be a URL"),
        ({"output": {"checkpoint_url": "file://runs/x"}}, "by its whole path"),
        ({"output": {"checkpoint_url": "local://x"}}, "by its whole path"),
        ({"output": {"checkpoint_url": "s3://me:secret@bucket/x"}}, "a user or a password"),
    ],
)
def test_settings_that_do_not_go_together(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        small_config(**changes)
    assert "secret" not in str(caught.value)


def test_a_step_that_is_not_there_lists_those_that_are(tmp_path: Path) -> None:
    made = Kept(tmp_path / "run")
    made.save(2)
    made.save(4)
    assert made.store.at(2).step == 2
    with pytest.raises(ConfigError, match=r"--from-step 3: .* there are: 2, 4"):
        made.store.at(3)
    (made.run.checkpoints / "step_000004" / MANIFEST).unlink()
    with pytest.raises(ConfigError, match=r"--from-step 4: no complete .* there are: 2$"):
        made.store.at(4)


def test_a_run_keeps_its_identity_when_its_directory_is_renamed(tmp_path: Path) -> None:
    made = Kept(tmp_path / "run")
    made.save(1)
    made.run.path.rename(tmp_path / "other")
    newest = Kept(tmp_path / "other").store.newest()
    assert newest is not None
    run = RunDirectory(tmp_path / "other")
    identity = run.identity
    run.write_config(small_config(iterations=7))
    assert run.identity == identity
    assert run.read_config().iterations == 7


def test_a_crash_between_two_renames_loses_nothing_that_was_whole(tmp_path: Path) -> None:
    final, partial = tmp_path / "step_000001", tmp_path / ".step_000001.ab"
    for place in (final, partial):
        place.mkdir()
        (place / "x").write_text(place.name)
    checkpoint.replace_directory(partial, final)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]
    assert (final / "x").read_text() == ".step_000001.ab"
