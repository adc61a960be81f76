"""One run, and one process of it, writes checkpoints to a URL."""

from __future__ import annotations

import os
import secrets
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.errors import CheckpointError, ConfigError, LockHeldError, LockLostError
from cluster.io.processes import Holder
from learner.checkpoints import remote_owner
from learner.checkpoints.remote import RemoteCheckpoints
from learner.checkpoints.remote_owner import RemoteOwner
from learner.run import REFUSED, main
from learner.run_target import RunTarget
from tests.small_run import flags
from tests.unit.checkpoint_cases import Kept, run_config


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "file":
        return f"file://{tmp_path}/elsewhere"
    return f"memory://{secrets.token_hex(4)}/checkpoints"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_owner, "BEAT_S", 0.05)
    monkeypatch.setattr(remote_owner, "STALE_S", 0.5)
    monkeypatch.setattr(remote_owner, "POLL_S", 0.02)


def far(**changes: object) -> Holder:
    return replace(Holder.this_process("B"), machine="other", host="node7", pid=1, **changes)


def test_a_second_process_is_refused_while_the_first_lives(url: str) -> None:
    with RemoteOwner.acquire(RemoteCheckpoints(url), "A") as first:
        first.check()
        with pytest.raises(LockHeldError, match=rf"is in use by process {os.getpid()} on .*run A"):
            RemoteOwner.acquire(RemoteCheckpoints(url), "A")
        first.check()
    assert RemoteCheckpoints(url).owner() is None
    RemoteOwner.acquire(RemoteCheckpoints(url), "A").release()


def test_one_of_another_machine_is_watched(url: str, caplog: pytest.LogCaptureFixture) -> None:
    place = RemoteCheckpoints(url)
    place.write_owner(far().to_bytes())
    start = time.monotonic()
    with RemoteOwner.acquire(place, "A"):
        assert time.monotonic() - start >= 0.5
    assert "from process 1 on node7 (run B)" in caplog.text
    # one that renews its mark
    holder = far()
    owner = RemoteOwner(place, holder)
    place.write_owner(holder.to_bytes())
    try:
        with pytest.raises(LockHeldError, match=r"kill 1` on node7"):
            RemoteOwner.acquire(place, "A")
    finally:
        owner.release()


def test_a_dead_one_of_this_machine_is_followed_at_once(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_owner, "STALE_S", 30.0)
    place = RemoteCheckpoints(url)
    place.write_owner(replace(Holder.this_process(), started="1").to_bytes())
    start = time.monotonic()
    with RemoteOwner.acquire(place, "A"):
        assert time.monotonic() - start < remote_owner.STALE_S


def test_who_lost_the_place_writes_no_more(tmp_path: Path, url: str) -> None:
    made = Kept(tmp_path / "run", checkpoint_url=url)
    with RemoteOwner.acquire(RemoteCheckpoints(url), "A") as made.run.remote:
        made.open()
        made.save(1)
        theirs = far().to_bytes()
        RemoteCheckpoints(url).write_owner(theirs)
        with pytest.raises(LockLostError, match=r"but to process 1 on node7 \(run B\)"):
            made.save(2)
        assert RemoteCheckpoints(url).steps() == [1]
        assert made.steps == [1, 2]  # here it is whole
    assert RemoteCheckpoints(url).owner() == theirs


def test_two_runs_that_began_at_one_place_do_not_mix(
    tmp_path: Path, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither had a checkpoint there when the other one looked."""
    one, other = (Kept(tmp_path / name, checkpoint_url=url) for name in ("one", "other"))
    one.save(1)
    other.save(1)
    assert "holds checkpoints of run" in caplog.text
    assert RemoteCheckpoints(url, one.run.identity).manifest(1).run == one.run.identity
    other.save(2)
    assert RemoteCheckpoints(url).steps() == [1]
    with pytest.raises(CheckpointError, match="a directory of its own for each run"):
        other.store.close()


def test_a_start_at_anothers_place_is_refused_and_leaves_nothing(
    tmp_path: Path, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Kept(tmp_path / "one", checkpoint_url=url).save(1)
    line = ["--inline", "--run-dir", str(tmp_path / "B"), *flags(), "--output.checkpoint-url", url]
    assert main(line) == REFUSED
    assert "holds checkpoints of run" in capsys.readouterr().err
    assert not (tmp_path / "B").exists()
    config = run_config(checkpoint_every=1, checkpoint_url=f"{url}/new")
    with RunTarget(tmp_path / "C").acquire(config) as run:
        assert run.remote is not None
        with (
            pytest.raises((LockHeldError, ConfigError), match="in use by"),
            RunTarget(tmp_path / "D").acquire(config),
        ):
            pass
    assert not (tmp_path / "D").exists()
    assert RemoteCheckpoints(f"{url}/new").owner() is None
