"""A learner that does not see the run directory: its files of a checkpoint come and go in parts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.errors import StorageError
from learner.checkpoints import exchange
from learner.checkpoints.checkpoint import restore
from learner.training.file_exchange import FileExchange
from tests.unit.checkpoint_cases import FakeFleet, Kept, combiner

ROOT = Path(__file__).parents[4]


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "node").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "node"))
    monkeypatch.setattr(exchange, "PART", 5)


class Elsewhere(FakeFleet):
    elsewhere = True


@pytest.mark.parametrize("length", [0, 4, 5, 13])
def test_a_checkpoint_of_a_learner_elsewhere_is_as_any_other(
    tmp_path: Path, logged: list[str], length: int
) -> None:
    content = bytes(range(length))
    kept = Kept(tmp_path / "run")
    here, there = FakeFleet(content), Elsewhere(content)
    kept.save(1, here)
    kept.save(2, there)
    kept.save(3, there)
    folders = sorted(kept.run.checkpoints.iterdir())
    names = [{file.name for file in folder.iterdir()} for folder in folders]
    assert len(folders) > 1
    assert all(each == names[0] for each in names)
    notes = [line for line in logged if "does not see" in line]
    assert len(notes) == 1
    assert "output.checkpoint_url" in notes[0]

    found = kept.open().newest()
    assert found is not None
    for fleet in (FakeFleet(), Elsewhere()):
        restore(found, fleet, combiner())
        assert fleet.restored == {"learner": content, "moments": b"moments"}
    assert not any((tmp_path / "node").iterdir())


def test_what_an_interrupted_exchange_left_does_not_get_into_the_next_one(tmp_path: Path) -> None:
    kept, fleet = Kept(tmp_path / "run"), Elsewhere(b"whole")
    kept.save(1, fleet)
    fleet.receive_part("policy.safetensors", b"half of")
    fleet.receive_part("other.safetensors", b"another one's")
    found = kept.store.newest()
    assert found is not None
    restore(found, fleet, combiner())
    assert fleet.restored["learner"] == b"whole"


def test_a_directory_of_the_same_path_on_another_disk_is_not_shared(tmp_path: Path) -> None:
    class OtherDisk(FileExchange):
        def sees(self, file: Path, content: bytes) -> bool:
            return super().sees(tmp_path / "other" / file.name, content)

    here, other = tmp_path / "here", tmp_path / "other"
    here.mkdir()
    other.mkdir()
    assert exchange.shares(FileExchange(), here)
    assert not exchange.shares(OtherDisk(), here)
    assert not any(here.iterdir())


def test_no_space_on_the_learners_node_says_where(tmp_path: Path) -> None:
    learner = FileExchange()
    folder = learner.exchange_folder()
    (folder / "policy.safetensors").mkdir()  # it cannot be written
    with pytest.raises(StorageError, match=r"node/tessera-checkpoint-.*policy\.safetensors"):
        learner.receive_part("policy.safetensors", b"x")


def test_what_a_killed_learner_left_is_removed(tmp_path: Path) -> None:
    kill = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    made = (
        "from learner.training.file_exchange import FileExchange as F; F().receive_part('a', b'x')"
    )
    env = {**os.environ, "TMPDIR": str(tmp_path / "node")}
    subprocess.run([sys.executable, "-c", f"{made}; {kill}"], env=env, cwd=ROOT)
    (left,) = (tmp_path / "node").iterdir()
    living = FileExchange().exchange_folder()
    assert not left.exists()
    assert FileExchange().exchange_folder() != living
    assert living.exists()
