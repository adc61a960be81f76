"""Checkpoints at a URL: uploaded, kept, fetched; half uploads and failing storage."""

from __future__ import annotations

import asyncio
import secrets
import shutil
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from tenacity import wait_none

from cluster.errors import CheckpointError, ConfigError
from cluster.io.run_layout import CONFIG, MANIFEST, step_name
from learner.checkpoints import remote
from learner.checkpoints.checkpoint import verify
from learner.checkpoints.remote import RemoteCheckpoints
from tests.unit.checkpoint_cases import Kept


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "WAIT", wait_none())


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "file":
        return f"file://{tmp_path}/elsewhere"
    return f"memory://{secrets.token_hex(4)}/checkpoints"


class Flaky(MemoryFileSystem):
    """Forgets so many writes in the middle."""

    protocol = "flaky"
    failures, written = 0, 0
    error: BaseException = OSError("connection reset")

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        file = super()._open(path, mode=mode, **options)
        if mode == "wb" and type(self).failures:
            type(self).failures -= 1
            write = file.write

            def half(data: bytes) -> int:
                write(bytes(data)[: len(data) // 2])
                raise type(self).error

            file.write = half
        return file


@pytest.fixture
def flaky() -> str:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    Flaky.failures, Flaky.error = 0, OSError("connection reset")
    return f"flaky://{secrets.token_hex(4)}"


def test_finished_checkpoints_are_there_too_and_the_same_ones_stay(
    tmp_path: Path, url: str, logged: list[str]
) -> None:
    made = Kept(tmp_path / "run", checkpoint_url=url, keep_checkpoints=2, keep_every=3)
    for step in range(1, 7):
        made.save(step)
    assert RemoteCheckpoints(url).steps() == made.steps == [3, 5, 6]
    shutil.rmtree(made.run.checkpoints)
    made.run.checkpoints.mkdir()
    newest = made.open().newest()
    assert newest is not None
    assert (newest.step, newest.path.parent) == (6, made.run.checkpoints)
    assert newest.read("policy.safetensors") == b"weights 6"
    assert logged == [f"fetched step_000006 from {url}"]
    assert made.store.steps() == [3, 5, 6]
    assert made.store.at(3).step == 3


def test_the_newest_of_both_places_is_used(tmp_path: Path, url: str) -> None:
    made = Kept(tmp_path / "run", checkpoint_url=url)
    for step in (1, 2):
        made.save(step)
    shutil.rmtree(made.run.checkpoints / "step_000002")
    assert made.open().newest().step == 2  # from there
    (made.run.checkpoints / "step_000002" / "policy.safetensors").write_bytes(b"damaged")
    assert made.open().newest().step == 2  # a damaged one here is fetched anew
    RemoteCheckpoints(url).keep([1])
    (made.run.checkpoints / "step_000002" / "policy.safetensors").write_bytes(b"damaged")
    assert made.open().newest().step == 1


def test_half_an_upload_is_no_checkpoint(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/elsewhere"
    made = Kept(tmp_path / "run", checkpoint_url=url)
    made.save(1)
    made.save(2)
    (tmp_path / "elsewhere" / "step_000002" / MANIFEST).unlink()
    shutil.rmtree(made.run.checkpoints / "step_000002")
    assert made.open().newest().step == 1
    assert RemoteCheckpoints(url).steps() == [1]


def test_what_was_damaged_there_is_skipped(tmp_path: Path, logged: list[str]) -> None:
    made = Kept(tmp_path / "run", checkpoint_url=f"file://{tmp_path}/elsewhere")
    made.save(1)
    made.save(2)
    shutil.rmtree(made.run.checkpoints / "step_000002")
    (tmp_path / "elsewhere" / "step_000002" / "moments.msgpack").write_bytes(b"other")
    assert made.open().newest().step == 1
    assert "skipping checkpoint" in logged[0]
    assert "moments.msgpack is missing or damaged" in logged[0]
    assert made.names == ["step_000001"]


def test_a_storage_that_fails_now_and_then_is_tried_again(
    tmp_path: Path, flaky: str, logged: list[str]
) -> None:
    made = Kept(tmp_path / "run", checkpoint_url=flaky)
    Flaky.failures = 3
    made.save(1)
    assert logged == []
    shutil.rmtree(made.run.checkpoints / "step_000001")
    assert made.open().newest().read("policy.safetensors") == b"weights 1"


def test_a_storage_that_fails_in_the_middle_is_reported_and_made_up_for(
    tmp_path: Path, flaky: str, logged: list[str]
) -> None:
    made = Kept(tmp_path / "run", checkpoint_url=flaky)
    made.save(1)
    Flaky.failures = 1000
    made.save(2)
    assert "step_000002/" in logged[0]
    assert "failed 4 times (OSError: connection reset)" in logged[0]
    assert "it is whole here" in logged[0]
    assert (made.steps, RemoteCheckpoints(flaky).steps()) == ([1, 2], [1])
    with pytest.raises(CheckpointError, match="failed 4 times"):
        made.store.close()
    Flaky.failures = 0
    made.save(3)
    assert RemoteCheckpoints(flaky).steps() == [1, 2, 3]
    made.store.close()


def test_a_storage_library_that_cancels_is_a_storage_that_fails(
    tmp_path: Path, flaky: str, logged: list[str]
) -> None:
    """fsspec's asynchronous filesystems raise it; it is no Exception, and would end the thread."""
    made = Kept(tmp_path / "run", checkpoint_url=flaky)
    Flaky.failures, Flaky.error = 1000, asyncio.CancelledError()
    made.save(1)
    assert "failed 4 times (CancelledError: )" in logged[0]


def test_ctrl_c_is_not_tried_again(flaky: str) -> None:
    Flaky.failures, Flaky.error = 1000, KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        RemoteCheckpoints(flaky).write_owner(b"mine")
    assert Flaky.failures == 999


def test_later_ones_are_archived_there_too(tmp_path: Path, url: str) -> None:
    made = Kept(tmp_path / "run", checkpoint_url=url)
    for step in (1, 2, 3):
        made.save(step)
    made.store.roll_back(1)
    assert (made.steps, RemoteCheckpoints(url).steps()) == ([1], [1])
    aside = [
        path.relative_to(made.run.checkpoints) for path in made.run.checkpoints.glob("archived-*/*")
    ]
    (folder,) = {path.parts[0] for path in aside if path.parts[0].startswith("archived-")}
    assert verify(made.run.checkpoints / folder / "step_000003").step == 3
    there = RemoteCheckpoints(f"{url}/{folder}")
    assert there.steps() == [2, 3]
    there.download(3, tmp_path / step_name(3))
    assert verify(tmp_path / step_name(3)).step == 3
    assert made.open().newest().step == 1


def test_another_runs_place_is_refused(tmp_path: Path, url: str) -> None:
    Kept(tmp_path / "one", checkpoint_url=url).save(1)
    with pytest.raises(ConfigError, match=r"holds checkpoints of run .* a directory of its own"):
        Kept(tmp_path / "other", checkpoint_url=url)


def test_a_lost_directory_can_be_made_again(tmp_path: Path, url: str) -> None:
    made = Kept(tmp_path / "run", checkpoint_url=url)
    made.save(1)
    there = RemoteCheckpoints(url)
    assert there.read(1, CONFIG) == made.run.config.read_bytes()
    with pytest.raises(CheckpointError, match="has no other"):
        there.read(1, "other")


def test_an_unknown_scheme_says_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere://x: cannot be opened"):
        Kept(tmp_path / "run", checkpoint_url="nowhere://x")
