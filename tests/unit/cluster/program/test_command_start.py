"""What a private Ray and a run directory need of the machine: each lack in its own words, and
advice only where it helps."""

from __future__ import annotations

import errno
import os
import pwd
import resource
import shutil
import tempfile
from collections import namedtuple
from pathlib import Path
from types import ModuleType

import pytest
import torch

from actors import sample, weights
from cluster import status
from cluster.errors import FleetError, StorageError
from cluster.io.files import writing
from cluster.io.locks import locked
from cluster.model_files.tensors import write_tensors
from cluster.ray_session import machine
from cluster.ray_session.machine import (
    check_loopback,
    check_machine,
    check_open_files,
    check_temp_root,
    why_not_started,
)
from cluster.ray_session.session import RayConfig
from learner import run
from learner.run_target import RunTarget
from learner.runs.run_dir import RunDirectory
from rewards import reference
from tests.small_run import small_config

Usage = namedtuple("Usage", "total used free")


def test_a_machine_with_ipv6_alone() -> None:
    check_loopback("127.0.0.1")
    with pytest.raises(FleetError, match=r"IPv6 .* on ::1: .*--ray\.address.*--inline"):
        check_loopback("::1")


def test_too_few_open_files() -> None:
    for enough in (machine.LEAST_FILES, 1 << 20, resource.RLIM_INFINITY):
        check_open_files(enough)
    with pytest.raises(FleetError, match=r"at most 64 files \(`ulimit -n`\).*--inline"):
        check_open_files(64)


def test_paths_of_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes count, not letters; and who chose the directory is named."""
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        monkeypatch.setenv("RAY_TMPDIR", short)
        check_machine("")
        check_machine(short)
    for name, value in (("RAY_TMPDIR", "/tmp/" + "x" * 80), ("TMPDIR", "/tmp/" + "ü" * 40)):
        monkeypatch.delenv("RAY_TMPDIR", raising=False)
        monkeypatch.setenv(name, value)
        with pytest.raises(FleetError, match=rf"\(\${name}\).*{107}: .*--ray\.temp-dir /tmp/ray"):
            check_machine("")
        assert not os.path.exists(value)
    with pytest.raises(FleetError, match=r"\(--ray\.temp-dir\), with paths of"):
        check_machine("/tmp/" + "x" * 80)


def test_a_directory_for_sockets_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FleetError, match=r"cannot keep its sockets and logs in /proc/ray"):
        check_temp_root(Path("/proc/ray"), "$TMPDIR")
    with pytest.raises(FleetError, match=r"Not a directory.*another directory by --ray\.temp-dir"):
        check_temp_root(Path("/dev/null/ray"), "$TMPDIR")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1 << 30, 1 << 30, 5 << 20))
        with pytest.raises(FleetError, match=r"only 5\.0 MiB are free: make room"):
            check_temp_root(Path(short), "$TMPDIR")
        monkeypatch.setattr(tempfile, "NamedTemporaryFile", full)
        with pytest.raises(FleetError, match=r"No space left on device\. Make room"):
            check_temp_root(Path(short), "$TMPDIR")


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (OSError(errno.EROFS, "Read-only file system"), "not read-only"),
        (PermissionError(errno.EACCES, "Permission denied"), "writable for this user"),
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
        (OSError(errno.ENOSPC, "No space left on device"), "Make room"),
        (ValueError("The object store size (3 GB) exceeds /dev/shm size"), "object-store-memory"),
        (RuntimeError("The current node timed out during startup."), "try again"),
        (TimeoutError("waited long"), "try again"),
        (RuntimeError("raylet exited with code 1"), "logs are in /tmp/ray/session_latest/logs"),
    ],
)
def test_advice_belongs_to_its_cause(error: Exception, advice: str) -> None:
    said = why_not_started(error, Path("/tmp/ray"))
    assert said.startswith("cannot start a private Ray: ")
    assert advice in said
    assert ("very busy" in said) == (advice == "try again")


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "Make room (or lift the limit)"),
        (errno.EDQUOT, "Make room (or lift the limit)"),
        (errno.EACCES, "Have it made writable for this user"),
        (errno.EROFS, "Choose a place that is not read-only"),
        (errno.EMFILE, "Lift the limit on open files"),
        (errno.ESTALE, "See that the storage is there"),
    ],
)
def test_a_file_that_cannot_be_written(number: int, advice: str, tmp_path: Path) -> None:
    with pytest.raises(StorageError) as caught, writing(tmp_path / "file"):
        raise OSError(number, os.strerror(number))
    assert advice in str(caught.value)
    assert str(caught.value).endswith(", then go on with --resume")
    for words in ("Make room", "MiB are free there"):
        assert (words in str(caught.value)) == advice.startswith("Make room")


def test_a_run_directory_that_cannot_be_made() -> None:
    """There is nothing to resume yet."""
    with pytest.raises(StorageError, match="another directory by --run-dir") as caught:
        RunDirectory.create("/proc/run", small_config())
    assert "--resume" not in str(caught.value)
    with (
        pytest.raises(StorageError, match="another directory by --run-dir"),
        RunTarget(Path("/proc/run")).acquire(small_config()),
    ):
        pass


def test_what_is_not_a_run_is_not_resumed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory that the run names itself, and what other commands write."""
    monkeypatch.chdir("/proc")
    with (
        pytest.raises(StorageError, match="another directory by --run-dir"),
        RunTarget(None).acquire(small_config()),
    ):
        pass
    with (
        pytest.raises(StorageError, match=r"/proc/samples .*, then start again$"),
        locked(Path("/proc/samples"), "--out"),
    ):
        pass
    with pytest.raises(StorageError, match=r", then start again$"):
        write_tensors("/proc/x.safetensors", {"a": torch.zeros(1)}, {})


@pytest.mark.parametrize("given", ["ray", "~/ray", "./ray"])
@pytest.mark.parametrize("name", ["RAY_TMPDIR", "TMPDIR"])
def test_a_relative_directory_is_refused_wherever_it_is_named(
    name: str, given: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Ray's processes would look for it elsewhere, and time out after half a minute."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv(name, given)
    with pytest.raises(FleetError, match=rf"\(\${name}\), which is no absolute path"):
        check_machine("")
    assert not any(tmp_path.iterdir())


COMMANDS = {
    "run directory": (run, ["--dry-run", "--run-dir", "~PLACE/x"]),
    "preset": (run, ["--dry-run", "--preset", "~PLACE/x.yaml"]),
    "reward": (run, ["--dry-run", "--rewards.extra", "~PLACE/x.py:Name"]),
    "reference": (run, ["--dry-run", "--rewards.loo-fid.reference", "~PLACE/x.npz"]),
    "status": (status, ["--run", "~PLACE/x"]),
    "sample": (sample, ["--classes", "0", "--out", "~PLACE/x"]),
    "run to sample": (sample, ["--classes", "0", "--run", "~PLACE/x"]),
    "moments": (reference, ["--images", "~PLACE/x", "--out", "y.npz"]),
    "export": (weights, ["export", "y", "~PLACE/x.pt"]),
}


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A user without HOME or an entry in the passwd file, as containers have them."""

    def nobody(_: object) -> None:
        raise KeyError

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    for name in ("HOME", "TESSERA_WEIGHTS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("homeless")
@pytest.mark.parametrize("user", ["", "nobody-of-this-name"])
@pytest.mark.parametrize(("module", "arguments"), COMMANDS.values(), ids=COMMANDS)
def test_a_home_directory_that_is_not_there(
    module: ModuleType, arguments: list[str], user: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert module.main([word.replace("PLACE", user) for word in arguments]) in (1, 2)
    told = capsys.readouterr().err
    assert f"~{user}/x" in told
    assert "the home directory that ~ stands for is not known" in told


@pytest.mark.usefixtures("homeless")
@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        (weights, ["list"]),
        (weights, ["fetch", "llamagen-vq-16"]),
        (reference, ["fetch", "imagenet256"]),
        (run, ["--dry-run", "--rewards.loo-fid.reference", "imagenet256"]),
        (run, ["--dry-run", "--preset", "llamagen-b-256"]),
    ],
)
def test_weights_without_a_home_directory(
    module: ModuleType, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert module.main(arguments) == 2
    assert "or set TESSERA_WEIGHTS" in capsys.readouterr().err


def test_the_directory_of_a_private_ray_is_absolute() -> None:
    RayConfig(temp_dir="/tmp/ray")
    with pytest.raises(ValueError, match="temp_dir must be an absolute path, found 'ray'"):
        RayConfig(temp_dir="ray")
