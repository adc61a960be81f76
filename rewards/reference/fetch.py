"""Published reference moments: `python -m rewards.reference fetch imagenet256`.

ADM's reference batches (Dhariwal and Nichol 2021, 2105.05233) hold images, and `mu` and `sigma` of
all ImageNet training images in FID's Inception, the reference of LlamaGen and most
class-conditional models.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from huggingface_hub import file_download
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import WeakFileLock
from huggingface_hub.utils.logging import set_verbosity_error

from cluster.errors import CheckpointError, ConfigError, DataError, TesseraError, did_you_mean
from cluster.io.checksum import sha256_of, verify_sum, write_sum
from cluster.io.paths import output_path
from cluster.model_files.tensors import weights_directory
from cluster.program import logs
from cluster.program.console import exit_status, make_console
from cluster.program.invocation import command_of
from rewards.distribution.reference import read_stored
from rewards.networks.inception import FEATURES

logger = logging.getLogger(__name__)

BATCHES = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet"
_UNREACHABLE: tuple[type[BaseException], ...] = (*HfHubHTTPError.__bases__, OSError)


def fetch_command() -> str:
    """The command that fetches a published reference, without its name."""
    return f"{command_of('rewards.reference')} fetch"


@dataclass(frozen=True, kw_only=True)
class PublishedReference:
    """A file of reference moments."""

    name: str
    url: str
    size: int = 0
    """Bytes; 0 if unknown."""
    sha256: str = ""
    """Empty if unpublished: the file is then checked by its content, and its digest is stored at
    the first download."""

    @property
    def file(self) -> str:
        return self.url.rpartition("/")[2]

    def place(self, directory: Path | None = None) -> Path:
        """Its path, in the directory of weights."""
        return (directory or weights_directory()) / self.file


def _batch(pixels: int, file: str, size: int = 0, sha256: str = "") -> PublishedReference:
    url = f"{BATCHES}/{pixels}/{file}"
    return PublishedReference(name=f"imagenet{pixels}", url=url, size=size, sha256=sha256)


PUBLISHED = {
    reference.name: reference
    for reference in (
        _batch(
            256,
            "VIRTUAL_imagenet256_labeled.npz",
            2_037_122_530,
            "b32732719497e42660a9affb4a966068cba0855ac449b82015e34ec376d20758",
        ),
        _batch(512, "VIRTUAL_imagenet512.npz"),
        _batch(128, "VIRTUAL_imagenet128_labeled.npz"),
        _batch(64, "VIRTUAL_imagenet64_labeled.npz"),
    )
}
"""By name. Several projects pin the digest of imagenet256."""


class UnreachableError(CheckpointError):
    """No connection, or an interrupted transfer."""


def reference_file(reference: str) -> str:
    """The path of a configured reference, a published name or a path."""
    return str(PUBLISHED[reference].place()) if reference in PUBLISHED else reference


def by_file(path: str) -> PublishedReference | None:
    """The published reference with that file name."""
    return next((r for r in PUBLISHED.values() if r.file == Path(path).name), None)


def fetch(reference: PublishedReference, directory: Path) -> Path:
    """Download a published reference into a directory, or check the existing file.

    Raises:
        UnreachableError: no connection.
        CheckpointError: the server refuses, or another file.
        DataError: the file has no such moments.
    """
    target = reference.place(directory)
    set_verbosity_error()  # no log of every retry
    with _explained(reference, target):
        directory.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(target.with_name(f".{target.name}.lock")):
            known = target.is_file()
            if known and verify_sum(target):
                logger.info(
                    f"{reference.name} is at {target} already, SHA-256 as stored at its download"
                )
                return target
            file = target if known else _received(reference, target)
            digest = sha256_of(file)
            try:
                _verify(reference, file, digest)
            except TesseraError as error:
                if known:
                    remedy = "move the file away to fetch it again"
                    raise CheckpointError(f"{error}; {remedy}") from error
                file.unlink()  # the same command fetches it again
                raise
            os.replace(file, target)
            write_sum(target, digest)
    already = " already" if known else ""
    logger.info(f"{reference.name} is at {target}{already}, {_how(reference, digest)}")
    return target


def _received(reference: PublishedReference, target: Path) -> Path:
    """Download to a hidden name, resuming an earlier part."""
    partial = target.with_name(f".{target.name}.part")
    size = reference.size or None
    if size and partial.is_file() and partial.stat().st_size > size:
        partial.unlink()
    with partial.open("ab") as stream:
        file_download.http_get(
            reference.url,
            stream,
            resume_size=stream.tell(),
            expected_size=size,
            displayed_filename=reference.file,
        )
    return partial


def _verify(reference: PublishedReference, file: Path, digest: str) -> None:
    """
    Raises:
        CheckpointError: another file than the published one.
        DataError: not the moments of FID's Inception.
    """
    if reference.sha256 and digest != reference.sha256:
        raise CheckpointError(
            f"{file}: SHA-256 is {digest}, expected {reference.sha256} of {reference.url}: it was "
            "damaged or replaced, and is not used"
        )
    found = read_stored(file).reference.mu.size
    if found != FEATURES:
        raise DataError(
            f"{file}: mu: expected ({FEATURES},), of FID's Inception, found ({found},): is "
            f"this the file of {reference.url}?"
        )


def _how(reference: PublishedReference, digest: str) -> str:
    if reference.sha256:
        return "SHA-256 as published"
    return f"moments checked; its SHA-256 is not published, stored is {digest}"


@contextmanager
def _explained(reference: PublishedReference, target: Path) -> Iterator[None]:
    """Turn errors of the transfer into ours, with what to do."""
    by_hand = f"run the same command again to resume, or place {reference.url} at {target}"
    try:
        yield
    except TesseraError:
        raise
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        raise CheckpointError(f"{reference.url}: HTTP {status}; {by_hand}") from None
    except _UNREACHABLE as error:
        if isinstance(error, OSError) and error.errno is not None and not _of_network(error):
            raise CheckpointError(
                f"{target.parent}: cannot keep {reference.file} there ({error.strerror})"
            ) from error
        raise UnreachableError(
            f"{reference.url} was not reached, or the transfer broke off "
            f"({type(error).__name__}): {by_hand}"
        ) from None


def _of_network(error: OSError) -> bool:
    return isinstance(error, ConnectionError | TimeoutError)


@dataclass(frozen=True, kw_only=True)
class FetchReference:
    """Download published reference moments (ADM's, of ImageNet), resumed and verified."""

    name: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="NAME")]]
    """imagenet64, imagenet128, imagenet256 or imagenet512."""
    directory: str = ""
    """Target; empty is $TESSERA_WEIGHTS or ~/.cache/tessera, where runs look for it."""


def named(name: str) -> PublishedReference:
    """
    Raises:
        ConfigError: there is none of that name.
    """
    if name not in PUBLISHED:
        files = {reference.file: reference.name for reference in PUBLISHED.values()}
        hint = did_you_mean(files.get(re.sub(r".*/", "", name), name), PUBLISHED)
        raise ConfigError(
            f"no published reference is named {name!r}: {hint}there are {', '.join(PUBLISHED)}"
        )
    return PUBLISHED[name]


def run(arguments: list[str]) -> int:
    """The command; returns the exit status."""
    command = tyro.cli(FetchReference, args=arguments, prog=fetch_command())

    def work() -> None:
        given = command.directory
        folder = output_path(given, "--directory") if given else weights_directory()
        fetch(named(command.name), folder)

    with logs.to_console(make_console()):
        return exit_status(
            work,
            refused=(ConfigError, UnreachableError),
            stopped="stopped; the same command resumes",
        )
