"""A learner's part of a checkpoint: a consistent copy that a thread writes."""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.errors import FleetError, StorageError
from cluster.io.background import Background
from cluster.io.files import writing
from cluster.model_files import tensors
from cluster.model_files.tensors import read_tensors, write_tensors
from learner.training import state_files
from learner.training.lora import LoraConfig
from learner.training.optimizer import OptimizerConfig
from tests.unit.learner_cases import batch_of, make, tiny_policy_file


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.mark.parametrize("rank", [0, 2])
def test_what_is_written_is_what_was_there_when_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    """The thread is held until the learner has taken its next step."""
    options = OptimizerConfig(lr=1e-2, microbatch=8, lora=LoraConfig(rank=rank))
    learner = make(tiny_policy_file(tmp_path), optimizer=options)
    learner.step(batch_of(learner))
    for name in ("before", "during", "after"):
        (tmp_path / name).mkdir()
    learner.save(tmp_path / "before")
    held = threading.Event()
    write = write_tensors

    def slow(*arguments: Any, **options: Any) -> None:
        assert held.wait(30)
        write(*arguments, **options)

    monkeypatch.setattr(state_files, "write_tensors", slow)
    learner.save(tmp_path / "during", background=True)
    assert learner.saved() is False
    learner.step(batch_of(learner, 1))
    assert list((tmp_path / "during").iterdir()) == []
    held.set()
    assert learner.saved(30) is True
    assert content(tmp_path / "during") == content(tmp_path / "before")
    learner.save(tmp_path / "after")
    assert content(tmp_path / "after") != content(tmp_path / "before")


def test_a_thread_that_fails_is_heard(tmp_path: Path) -> None:
    learner = make(tiny_policy_file(tmp_path))
    learner.save(tmp_path / "nowhere", background=True)
    with pytest.raises(StorageError, match=r"nowhere/policy\.safetensors could not be written"):
        learner.saved(30)


def test_a_background_that_fails_or_lasts() -> None:
    def fail() -> None:
        raise FleetError("no")

    with pytest.raises(FleetError, match="no"):
        Background("failing", fail).done(10)
    for kind in (SystemExit, KeyboardInterrupt, GeneratorExit):  # not the end of whoever asks

        def end(kind: type[BaseException] = kind) -> None:
            raise kind("why")

        with pytest.raises(FleetError, match=rf"^writing ended by {kind.__name__}\(why\)$"):
            Background("writing", end).done(10)
    task = Background("sleeping", lambda: time.sleep(0.2))
    assert task.done() is False
    assert task.done(10) is True


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A disk that is full after so many bytes, as far as one file can tell."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_no_room_for_tensors(tmp_path: Path) -> None:
    file = tmp_path / "big.safetensors"
    with (
        largest_file(10_000),
        pytest.raises(StorageError, match=r"big\.safetensors could not be written: .*File too la"),
    ):
        write_tensors(file, {"a": torch.zeros(100_000)}, {})
    assert not file.exists()
    with largest_file(1_000_000):
        write_tensors(file, {"a": torch.zeros(1000)}, {})
    assert read_tensors(file)["a"].shape == (1000,)
    assert tensors.read_config(file) == {}


def test_no_room_for_a_learner(tmp_path: Path) -> None:
    learner = make(tiny_policy_file(tmp_path))
    learner.step(batch_of(learner))
    (tmp_path / "saved").mkdir()
    with largest_file(1000), pytest.raises(StorageError, match="MiB are free there"):
        learner.save(tmp_path / "saved")


def test_the_message_names_the_file_the_reason_and_what_to_do(tmp_path: Path) -> None:
    file = tmp_path / "x"
    with (
        largest_file(10),
        pytest.raises(
            StorageError,
            match=r"x could not be written: File too large; [\d,]+ MiB are free there\. "
            r"step_1 is whole\. Make room .* --resume",
        ),
        writing(file, kept="step_1 is whole"),
    ):
        file.write_bytes(b"0" * 100)


def test_a_run_begins_with_a_learner_that_has_learned_nothing(tmp_path: Path) -> None:
    learner = make(tiny_policy_file(tmp_path))
    learner.start(2.0)
    learner.step(batch_of(learner))
    with pytest.raises(FleetError, match="found one of 1 updates: start it anew, or restore"):
        learner.start(2.0)


def test_going_back_forgets_the_optimizers_newer_state(tmp_path: Path) -> None:
    """Restored into a learner that went on, or into a new one: the same next step."""
    learner, new = (make(tiny_policy_file(tmp_path)) for _ in range(2))
    for name in ("zero", "one"):
        (tmp_path / name).mkdir()
        learner.save(tmp_path / name)
        learner.step(batch_of(learner))
    for name in ("one", "zero"):
        found = []
        for each in (learner, new):
            each.restore(tmp_path / name)
            found.append(each.step(batch_of(each)).metrics)
        assert found[0] == found[1], name
