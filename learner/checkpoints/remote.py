"""Checkpoints at a URL: uploaded with the manifest last, so that what has one is whole."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs
from tenacity import (
    Retrying,
    retry_if_not_exception_type,
    stop_after_attempt,
    wait_exponential,
)

from cluster.errors import CheckpointError, ConfigError, TesseraError
from cluster.io.files import sync, writing
from cluster.io.paths import in_ray_package
from cluster.io.run_layout import MANIFEST, step_name, step_of
from learner.checkpoints.checkpoint import read_manifest
from learner.checkpoints.manifest import Manifest
from learner.output import LOCAL

ATTEMPTS = 4
WAIT = wait_exponential(multiplier=0.5, max=8)
CHUNK = 8 << 20  # bytes
MOST_MANIFEST = 1 << 20
OWNER = "owner.json"


def open_url(url: str) -> tuple[fs.FileSystem, str]:
    """The filesystem behind a URL, pyarrow's own or any of fsspec's, and the path in it.

    Raises:
        ConfigError: nobody knows the scheme, or it cannot be opened.
    """
    scheme, _, rest = url.partition("://")
    if scheme in LOCAL and in_ray_package(Path(rest)):
        raise ConfigError(
            f"output.checkpoint_url {url} lies in the package of this job, which Ray deletes after "
            "it: name a place that stays"
        )
    try:
        try:
            return fs.FileSystem.from_uri(url)
        except pa.ArrowInvalid:  # a scheme that pyarrow does not know
            import fsspec

            found, path = fsspec.core.url_to_fs(url)
            return fs.PyFileSystem(fs.FSSpecHandler(found)), path
    except (pa.ArrowException, OSError, ValueError, ImportError) as error:
        raise ConfigError(
            f"output.checkpoint_url {url}: cannot be opened ({error}); a scheme beside s3, gs, "
            "hdfs and file needs its fsspec package installed"
        ) from error


class RemoteCheckpoints:
    """The checkpoints of one run at a URL.

    Args:
        run: the run's identity; empty takes any run's.
        check_owned: asked before anything is changed there; what it raises leaves all as it is.

    Raises:
        ConfigError: see `open_url`; another run's checkpoints are there.
    """

    def __init__(
        self, url: str, run: str = "", check_owned: Callable[[], None] = lambda: None
    ) -> None:
        self.url, self._run, self._check_owned = url, run, check_owned
        self._fs, self._base = open_url(url)
        self._base = self._base.rstrip("/")
        if foreign := self._other_run():
            raise ConfigError(foreign)

    def steps(self) -> list[int]:
        """Of complete checkpoints (those with a manifest), oldest first.

        Raises:
            CheckpointError: the place does not answer.
        """
        found = [(step_of(place.base_name), place) for place in self._listed(self._base)]
        steps = sorted((step, place.path) for step, place in found if step is not None)
        asked = [f"{path}/{MANIFEST}" for _, path in steps]
        infos = self._try(f"listing {self.url}", lambda: self._fs.get_file_info(asked))
        return [step for (step, _), info in zip(steps, infos) if info.type == fs.FileType.File]

    def manifest(self, step: int) -> Manifest:
        """What a checkpoint there says of itself.

        Raises:
            CheckpointError: it cannot be read.
        """
        return Manifest.from_bytes(self._manifest_bytes(step) or b"", step_name(step))

    def read(self, step: int, name: str) -> bytes:
        """One file of a checkpoint there.

        Raises:
            CheckpointError: it cannot be read, or is not what the manifest says.
        """
        expected = self.manifest(step).files.get(name)
        if expected is None:
            raise CheckpointError(f"checkpoint {step_name(step)} at {self.url} has no {name}")

        def whole() -> bytes:
            with self._fs.open_input_stream(f"{self._path(step)}/{name}") as stream:
                return stream.read()

        data = self._try(f"reading {name} of {step_name(step)} at {self.url}", whole)
        if hashlib.sha256(data).hexdigest() != expected.sha256:
            raise CheckpointError(f"checkpoint {step_name(step)} at {self.url}: {name} is damaged")
        return data

    def upload(self, here: Path) -> None:
        """Bring a complete checkpoint there; nothing happens if it is there.

        Raises:
            CheckpointError: not within the attempts there are.
        """
        self._before_writing()
        manifest, data = read_manifest(here), (here / MANIFEST).read_bytes()
        if self._manifest_bytes(manifest.step) == data:
            return
        place = self._path(manifest.step)
        self._delete_manifest(place)
        self._try(f"making {place}", lambda: self._fs.create_dir(place, recursive=True))
        for name in (*manifest.files, MANIFEST):
            self._try(
                f"uploading {here.name}/{name} to {self.url}",
                lambda name=name: self._send(here / name, f"{place}/{name}"),  # type: ignore[misc]
            )

    def download(self, step: int, partial: Path) -> None:
        """Bring a checkpoint here; the caller verifies it.

        Raises:
            CheckpointError: not within the attempts there are.
            StorageError: there is no room here.
        """
        manifest = self.manifest(step)  # its names are plain
        with writing(partial):
            partial.mkdir(parents=True)
        for name in (*manifest.files, MANIFEST):
            source = f"{self._path(step)}/{name}"
            self._try(
                f"fetching {source}",
                lambda name=name, source=source: self._fetch(source, partial / name),  # type: ignore[misc]
            )
        sync(partial)

    def keep(self, steps: Iterable[int]) -> None:
        """Remove all others, the manifest first.

        Raises:
            CheckpointError: not within the attempts there are.
        """
        staying = set(steps)
        self._before_writing()
        for step in self.steps():
            if step not in staying:
                place = self._path(step)
                self._delete_manifest(place)
                self._try(f"removing {place}", lambda place=place: self._fs.delete_dir(place))  # type: ignore[misc]

    def archive(self, step: int, folder: str) -> None:
        """Move a checkpoint into a folder there, its manifest first.

        Raises:
            CheckpointError: not within the attempts there are.
        """
        self._before_writing()
        place, target = self._path(step), f"{self._base}/{folder}/{step_name(step)}"
        files = self._listed(place)
        if not files:
            return
        self._try(f"making {target}", lambda: self._fs.create_dir(target, recursive=True))
        for file in sorted(files, key=lambda file: file.base_name != MANIFEST):
            source = file.path
            name = file.base_name
            self._try(
                f"moving {source}",
                lambda source=source, name=name: self._fs.move(source, f"{target}/{name}"),  # type: ignore[misc]
            )
        self._try(f"removing {place}", lambda: self._fs.delete_dir(place))

    def owner(self) -> bytes | None:
        """The record of the process that writes there (`learner.checkpoints.remote_owner`).

        Raises:
            CheckpointError: the place does not answer.
        """
        return self._content(f"{self._base}/{OWNER}")

    def write_owner(self, data: bytes) -> None:
        """Leave a mark of this process."""

        def write() -> None:
            self._fs.create_dir(self._base, recursive=True)
            with self._fs.open_output_stream(f"{self._base}/{OWNER}") as stream:
                stream.write(data)

        self._try(f"writing {OWNER} to {self.url}", write)

    def remove_owner(self) -> None:
        """Remove the mark."""
        file = f"{self._base}/{OWNER}"
        self._try(f"removing {file}", lambda: self._fs.delete_file(file))

    def _before_writing(self) -> None:
        """Raises:
        CheckpointError: another run writes there.
        """
        self._check_owned()
        if foreign := self._other_run():
            raise CheckpointError(foreign)

    def _other_run(self) -> str:
        """What is wrong if the newest checkpoint there is another run's; empty if nothing is."""
        for step in self.steps()[-1:]:
            theirs = self.manifest(step).run
            if self._run and theirs and theirs != self._run:
                return (
                    f"output.checkpoint_url {self.url} holds checkpoints of run {theirs}, this is "
                    f"run {self._run}: name a directory of its own for each run"
                )
        return ""

    def _path(self, step: int) -> str:
        return f"{self._base}/{step_name(step)}"

    def _listed(self, place: str) -> list[fs.FileInfo]:
        selector = fs.FileSelector(place, allow_not_found=True)
        return self._try(f"listing {place}", lambda: self._fs.get_file_info(selector))

    def _delete_manifest(self, place: str) -> None:
        """Remove a manifest: what it describes is about to change."""
        file = f"{place}/{MANIFEST}"
        info = self._try(f"looking at {file}", lambda: self._fs.get_file_info(file))
        if info.type == fs.FileType.File:
            self._try(f"removing {file}", lambda: self._fs.delete_file(file))

    def _manifest_bytes(self, step: int) -> bytes | None:
        return self._content(f"{self._path(step)}/{MANIFEST}")

    def _content(self, file: str) -> bytes | None:
        """A small file; None if there is none."""

        def read() -> bytes | None:
            if self._fs.get_file_info(file).type != fs.FileType.File:
                return None
            with self._fs.open_input_stream(file) as stream:
                return stream.read(MOST_MANIFEST)

        return self._try(f"reading {file}", read)

    def _send(self, source: Path, target: str) -> None:
        with source.open("rb") as ours, self._fs.open_output_stream(target) as theirs:
            shutil.copyfileobj(ours, theirs, CHUNK)

    def _fetch(self, source: str, target: Path) -> None:
        with self._fs.open_input_stream(source) as theirs, target.open("wb") as ours:
            while data := theirs.read(CHUNK):
                with writing(target):
                    ours.write(data)
        sync(target)

    def _try(self, what: str, act: Callable[[], Any]) -> Any:
        """Do it, again after a while if it fails, so many times."""
        attempts = Retrying(
            stop=stop_after_attempt(ATTEMPTS),
            wait=WAIT,
            # tenacity would try again after Ctrl-C, too
            retry=retry_if_not_exception_type((TesseraError, KeyboardInterrupt)),
            reraise=True,
        )
        try:
            return attempts(act)
        except (TesseraError, KeyboardInterrupt):
            raise
        except BaseException as error:  # of any filesystem's library: asyncio's cancellation, too
            raise CheckpointError(
                f"{what} failed {ATTEMPTS} times ({type(error).__name__}: {error})"
            ) from error
