"""What commands write has one owner at a time, and does not go into the package of a Ray job."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from actors import captions, sample, weights
from cluster.io.locks import locked, locked_file
from cluster.io.run_layout import OWNER
from cluster.model_files.tensors import locate
from learner import evaluate
from learner.checkpoints.remote import open_url
from learner.miniature import arms, build
from rewards.reference import build as reference
from rewards.reference.build import ReferenceConfig
from tests.unit.learner import test_run_target as test_run_target

package = test_run_target.package
POLICY = "package://learner.miniature/networks/policy.safetensors"


def images(folder: Path) -> Path:
    file = folder / "images.npz"
    np.savez(file, np.zeros((4, 8, 8, 3), np.uint8))
    return file


def texts(folder: Path) -> Path:
    (folder / "captions.txt").write_text("a cat\n")
    return folder / "captions.txt"


Main = Callable[[list[str]], int]
DIRECTORIES: dict[str, tuple[Main, list[str]]] = {
    "arms": (arms.main, ["--seeds", "1", "--iterations", "1"]),
    "build": (build.main, ["--scale", "0.001"]),
    "evaluate": (evaluate.main, ["digits:held-out", "--preset", "miniature", "--inline"]),
    "sample": (sample.main, ["--classes", "0", "--num-images", "1", "--device", "cpu"]),
}


@pytest.mark.parametrize("command", DIRECTORIES)
def test_a_directory_that_another_process_writes_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    main, options = DIRECTORIES[command]
    out = tmp_path / "out"
    with locked(out, "it"):
        assert main([*options, "--out", str(out)]) == 2
        assert f"--out {out} is in use by process {os.getpid()}" in capsys.readouterr().err
        assert [path.name for path in out.iterdir()] == [OWNER]


@pytest.mark.parametrize("command", ["reference", "captions", "export"])
def test_a_file_that_another_process_writes_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    suffix = {"reference": ".npz", "captions": ".parquet", "export": ".pt"}
    target = tmp_path / f"out{suffix[command]}"
    lines: dict[str, tuple[Main, list[str]]] = {
        "reference": (
            reference.run,
            ["--images", str(images(tmp_path)), "--out", str(target)],
        ),
        "captions": (captions.main, [str(texts(tmp_path)), str(target)]),
        "export": (weights.main, ["export", str(weights_file()), str(target)]),
    }
    main, line = lines[command]
    with locked_file(target, "it"):
        before = sorted(path.name for path in tmp_path.iterdir())
        assert main(line) == 2
        assert f"is in use by process {os.getpid()}" in capsys.readouterr().err
        assert sorted(path.name for path in tmp_path.iterdir()) == before


def weights_file() -> Path:
    return locate(POLICY)


def test_names_with_glob_characters_are_locked_too(tmp_path: Path) -> None:
    other = tmp_path / ".ab.npz.lock.0123"
    other.touch()
    with locked_file(tmp_path / "[ab]*.npz", "it"):
        assert other.exists()


def test_outputs_in_a_job_go_where_they_stay(package: Path, tmp_path: Path) -> None:
    home = Path.home() / "tessera-runs"
    options = [*DIRECTORIES["sample"][1], "--npz", "all.npz"]
    assert sample.main([*options, "--out", "shown"]) == 0
    assert (home / "shown" / "samples.json").is_file()
    assert (home / "all.npz").is_file()
    assert weights.main(["export", str(weights_file()), "policy.pt"]) == 0
    assert (home / "policy.pt").is_file()
    assert list(package.iterdir()) == []


def test_checkpoints_at_a_url_do_not_go_there(package: Path) -> None:
    with pytest.raises(ValueError, match="which Ray deletes after it"):
        open_url(f"file://{package}/checkpoints")


def test_a_refused_reference_makes_no_folder(tmp_path: Path) -> None:
    config = ["--images", str(images(tmp_path)), "--out", str(tmp_path / "new" / "x.txt")]
    assert reference.run(config) == 2
    assert not (tmp_path / "new").exists()
    assert ReferenceConfig(images="x", out=Path("x.npz")).out == Path("x.npz")
