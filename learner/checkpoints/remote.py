"""Copies of checkpoints at a URL. The manifest is uploaded last: with one, a copy is complete."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs
from tenacity import Retrying, retry_if_not_exception_type, stop_after_attempt, wait_exponential

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
    """The filesystem of a URL, pyarrow's own or one of fsspec, and the path in it.

    Raises:
        ConfigError: an unknown scheme, or it cannot be opened.
    """
    scheme, _, rest = url.partition("://")
    if scheme in LOCAL and in_ray_package(Path(rest)):
        raise ConfigError(
            f"output.checkpoint_url {url} is in the package of this job, which Ray deletes after "
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
    """The checkpoints of one run at a URL. Every method retries, and raises CheckpointError when
    all attempts failed.

    Args:
        run: the run's identity; empty accepts any run's.
        check_owned: called before every change; raises if another process owns the URL.

    Raises:
        ConfigError: see `open_url`; another run's checkpoints are there.
    """

    def __init__(
        self, url: str, run: str = "", check_owned: Callable[[], None] = lambda: None
    ) -> None:
        self.url, self._run, self._check_owned = url, run, check_owned
        self._fs, self._base = open_url(url)
        self._base = self._base.rstrip("/")
        if problem := self._other_run():
            raise ConfigError(problem)

    def steps(self) -> list[int]:
        """Steps of complete checkpoints (those with a manifest), oldest first."""
        found = [(step_of(place.base_name), place.path) for place in self._listed(self._base)]
        steps = sorted((step, path) for step, path in found if step is not None)
        manifests = [f"{path}/{MANIFEST}" for _, path in steps]
        infos = self._try(f"listing {self.url}", self._fs.get_file_info, manifests)
        return [step for (step, _), info in zip(steps, infos) if info.type == fs.FileType.File]

    def manifest(self, step: int) -> Manifest:
        """The manifest of a checkpoint there."""
        return Manifest.from_bytes(self._manifest_bytes(step) or b"", step_name(step))

    def read(self, step: int, name: str) -> bytes:
        """One file of a checkpoint there, checked against the manifest."""
        expected = self.manifest(step).files.get(name)
        if expected is None:
            raise CheckpointError(f"checkpoint {step_name(step)} at {self.url} has no {name}")

        def content() -> bytes:
            with self._fs.open_input_stream(f"{self._path(step)}/{name}") as stream:
                return stream.read()

        data = self._try(f"reading {name} of {step_name(step)} at {self.url}", content)
        if hashlib.sha256(data).hexdigest() != expected.sha256:
            raise CheckpointError(f"checkpoint {step_name(step)} at {self.url}: {name} is damaged")
        return data

    def upload(self, local: Path) -> None:
        """Copy a complete checkpoint to the URL, unless it is there already."""
        self._check_writable()
        manifest, data = read_manifest(local), (local / MANIFEST).read_bytes()
        if self._manifest_bytes(manifest.step) == data:
            return
        place = self._path(manifest.step)
        self._delete_manifest(place)
        self._make_dir(place)
        for name in (*manifest.files, MANIFEST):
            what = f"uploading {local.name}/{name} to {self.url}"
            self._try(what, self._send, local / name, f"{place}/{name}")

    def download(self, step: int, partial: Path) -> None:
        """Copy a checkpoint into a new local directory; the caller verifies it.

        Raises:
            StorageError: no local space left.
        """
        manifest = self.manifest(step)  # its names are plain
        with writing(partial):
            partial.mkdir(parents=True)
        for name in (*manifest.files, MANIFEST):
            source = f"{self._path(step)}/{name}"
            self._try(f"fetching {source}", self._fetch, source, partial / name)
        sync(partial)

    def keep(self, steps: Iterable[int]) -> None:
        """Remove all other checkpoints, the manifest first."""
        kept = set(steps)
        self._check_writable()
        for step in self.steps():
            if step not in kept:
                place = self._path(step)
                self._delete_manifest(place)
                self._try(f"removing {place}", self._fs.delete_dir, place)

    def archive(self, step: int, folder: str) -> None:
        """Move a checkpoint into a folder there, its manifest first."""
        self._check_writable()
        place, target = self._path(step), f"{self._base}/{folder}/{step_name(step)}"
        files = self._listed(place)
        if not files:
            return
        self._make_dir(target)
        for file in sorted(files, key=lambda file: file.base_name != MANIFEST):
            moved = f"{target}/{file.base_name}"
            self._try(f"moving {file.path}", self._fs.move, file.path, moved)
        self._try(f"removing {place}", self._fs.delete_dir, place)

    def owner(self) -> bytes | None:
        """The record of the process that writes there (`learner.checkpoints.remote_owner`)."""
        return self._content(f"{self._base}/{OWNER}")

    def write_owner(self, data: bytes) -> None:
        def write() -> None:
            self._fs.create_dir(self._base, recursive=True)
            with self._fs.open_output_stream(f"{self._base}/{OWNER}") as stream:
                stream.write(data)

        self._try(f"writing {OWNER} to {self.url}", write)

    def remove_owner(self) -> None:
        file = f"{self._base}/{OWNER}"
        self._try(f"removing {file}", self._fs.delete_file, file)

    def _check_writable(self) -> None:
        self._check_owned()
        if problem := self._other_run():
            raise CheckpointError(problem)

    def _other_run(self) -> str:
        """A message if the newest checkpoint there is another run's, else empty."""
        for step in self.steps()[-1:]:
            theirs = self.manifest(step).run
            if self._run and theirs != self._run:
                return (
                    f"output.checkpoint_url {self.url} holds checkpoints of run {theirs}, this is "
                    f"run {self._run}: name a directory of its own for each run"
                )
        return ""

    def _path(self, step: int) -> str:
        return f"{self._base}/{step_name(step)}"

    def _listed(self, place: str) -> list[fs.FileInfo]:
        selector = fs.FileSelector(place, allow_not_found=True)
        return self._try(f"listing {place}", self._fs.get_file_info, selector)

    def _make_dir(self, place: str) -> None:
        self._try(f"making {place}", lambda: self._fs.create_dir(place, recursive=True))

    def _delete_manifest(self, place: str) -> None:
        """From here on the checkpoint counts as incomplete."""
        file = f"{place}/{MANIFEST}"
        info = self._try(f"looking at {file}", self._fs.get_file_info, file)
        if info.type == fs.FileType.File:
            self._try(f"removing {file}", self._fs.delete_file, file)

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
        # not fs.copy_files: a full local disk must be a StorageError, not a failure of the URL
        with self._fs.open_input_stream(source) as theirs, target.open("wb") as ours:
            while data := theirs.read(CHUNK):
                with writing(target):
                    ours.write(data)
        sync(target)

    def _try(self, what: str, act: Callable[..., Any], *args: Any) -> Any:
        """Call `act`, with retries and growing pauses."""
        attempts = Retrying(
            stop=stop_after_attempt(ATTEMPTS),
            wait=WAIT,
            # tenacity would retry after Ctrl-C, too
            retry=retry_if_not_exception_type((TesseraError, KeyboardInterrupt)),
            reraise=True,
        )
        try:
            return attempts(act, *args)
        except (TesseraError, KeyboardInterrupt):
            raise
        except BaseException as error:  # of any filesystem's library: asyncio's cancellation, too
            raise CheckpointError(
                f"{what} failed {ATTEMPTS} times ({type(error).__name__}: {error})"
            ) from error
