"""Downloads official files from the Hugging Face hub: resumed, verified, complete or absent.

`huggingface_hub` transfers the file. It is renamed into the weights directory once its SHA-256
equals the hub's; the digest is kept beside it and verified at each load.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub import file_download
from huggingface_hub.errors import FileMetadataError, HfHubHTTPError
from huggingface_hub.utils import WeakFileLock, build_hf_headers
from huggingface_hub.utils.logging import set_verbosity_error
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from actors.checkpoints.families import HUB, NamedModel
from cluster.errors import CheckpointError, ConfigError
from cluster.io.checksum import sha256_of, verify_sum, write_sum
from cluster.program.console import make_console

logger = logging.getLogger(__name__)

# The library's HTTP client differs between its versions: take its errors from the base class of the
# library's own error.
_UNREACHABLE: tuple[type[BaseException], ...] = (
    *(base for base in HfHubHTTPError.__bases__ if base is not OSError),
    ConnectionError,  # includes that of the library's offline mode
    TimeoutError,
    FileMetadataError,
)
_REFUSED = (401, 403, 404, 410)  # HTTP statuses that a retry does not change


class UnreachableError(CheckpointError):
    """The hub gave no answer, or the transfer broke off."""


def fetch(model: NamedModel, directory: Path) -> Path:
    """Download a model's official file to a directory, or verify the one that is there.

    Returns:
        The file.

    Raises:
        ConfigError: the hub has no such file; says which files to place where.
        UnreachableError: says which file to place where.
        CheckpointError: the hub refuses, or the file is not what the hub states.
    """
    if model.project:
        return _placed_by_hand(model, directory)
    if not model.file:
        raise ConfigError(
            f"no official file of {model.name} is published; its architecture fits files of your "
            f"own (--policy.checkpoint FILE --policy.architecture {model.name})"
        )
    target = model.path(directory)
    set_verbosity_error()  # the library logs every retry with hosts and signed URLs
    with _explained(model, target):
        directory.mkdir(parents=True, exist_ok=True)
        # one process at a time: two would append to the same partial file
        with WeakFileLock(_hidden(target, "lock")):
            if target.is_file():
                return _checked(model, target)
            stated = _stated(model)
            received = _received(model, target, stated)
            found = _hashed(received)
            if found != stated.sha256:
                received.unlink()
                raise CheckpointError(
                    f"{model.file}: received a file with SHA-256 {found}, but the hub states "
                    f"{stated.sha256}; nothing was kept, fetch it again"
                )
            os.replace(received, target)
            write_sum(target, found)
    logger.info("%s is at %s, SHA-256 as the hub states it", model.name, target)
    return target


def _received(model: NamedModel, target: Path, stated: _Stated) -> Path:
    """The downloaded file under a hidden name; continues a partial file of an earlier process.

    `hf_hub_download` does not resume across processes since version 2: it deletes its partial file.
    Its transfer function takes an offset, so the partial file is kept here, named by the digest.
    """
    partial = _hidden(target, f"{stated.sha256[:12]}.part")
    if partial.is_file() and partial.stat().st_size > stated.size:
        partial.unlink()
    with partial.open("ab") as stream:
        file_download.http_get(
            huggingface_hub.hf_hub_url(model.repo, model.file, revision=stated.revision),
            stream,
            resume_size=stream.tell(),
            headers=build_hf_headers(),
            expected_size=stated.size,
            displayed_filename=model.file,
        )
    return partial


def _hidden(target: Path, suffix: str) -> Path:
    return target.with_name(f".{target.name}.{suffix}")


def _checked(model: NamedModel, target: Path) -> Path:
    """Verify a file that is already there."""
    with _progress(target) as advance:
        known = verify_sum(target, advance)
    if known:
        logger.info("%s is at %s already, SHA-256 as noted when it was fetched", model.name, target)
        return target
    expected = _stated(model).sha256
    found = _hashed(target)
    if found != expected:
        raise CheckpointError(
            f"{target}: SHA-256 is {found}, but the hub states {expected} for {model.file}; move "
            "the file away to fetch it again"
        )
    write_sum(target, found)
    logger.info("%s is at %s already, SHA-256 as the hub states it", model.name, target)
    return target


def _placed_by_hand(model: NamedModel, directory: Path) -> Path:
    checkpoint, project = model.path(directory), model.project_path(directory)
    if checkpoint.is_file() and project.is_file():
        logger.info(
            "%s is at %s and %s; no SHA-256 of theirs is published", model.name, checkpoint, project
        )
        return checkpoint
    raise ConfigError(
        f"{model.name} is not on the hub: its authors link to it in the README of "
        f"CompVis/taming-transformers (table of models, {model.origin!r}). Place the checkpoint "
        f"(last.ckpt) at {checkpoint} and the configuration beside it (*-project.yaml, or "
        f"model.yaml) at {project}"
    )


@dataclass(frozen=True)
class _Stated:
    """The hub's metadata of a file."""

    revision: str | None
    sha256: str
    size: int


def _stated(model: NamedModel) -> _Stated:
    url = huggingface_hub.hf_hub_url(model.repo, model.file)
    found = huggingface_hub.get_hf_file_metadata(url)
    digest = found.etag or ""
    if not re.fullmatch(r"[0-9a-f]{64}", digest) or found.size is None:
        raise CheckpointError(
            f"{model.file}: the hub states no SHA-256 (found {digest!r}), so that a download could "
            "not be verified"
        )
    return _Stated(found.commit_hash, digest, found.size)


@contextmanager
def _explained(model: NamedModel, target: Path) -> Iterator[None]:
    """Translate errors of the hub and its library into ours; only the type of error is passed on,
    since the texts name internal hosts and caches."""
    try:
        yield
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in _REFUSED:
            raise CheckpointError(
                f"the hub refuses {model.file} of {HUB}/{model.repo} (HTTP {status}): moved, or "
                "not open to you"
            ) from None
        raise UnreachableError(_by_hand(model, target, f"HTTP {status}")) from None
    except _UNREACHABLE as error:
        raise UnreachableError(_by_hand(model, target, type(error).__name__)) from None
    except OSError as error:
        if error.errno is None:  # the library's, about the length of what it received
            raise UnreachableError(_by_hand(model, target, "incomplete")) from None
        raise CheckpointError(
            f"{target.parent}: cannot keep {model.file} there ({error.strerror})"
        ) from error


def _by_hand(model: NamedModel, target: Path, reason: str) -> str:
    there = " (it is there, but was not compared with the hub's)" if target.is_file() else ""
    return (
        f"the hub was not reached, or the transfer broke off ({reason}). Run the same command "
        f"again to resume, or place {model.file} of {HUB}/{model.repo} at {target}{there}"
    )


def _hashed(file: Path) -> str:
    with _progress(file) as advance:
        return sha256_of(file, advance)


@contextmanager
def _progress(file: Path) -> Iterator[Callable[[int], None]]:
    """A bar on stderr while a file is read."""
    columns = (TextColumn("SHA-256"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = make_console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=file.stat().st_size)
        yield lambda size: progress.advance(bar, size)
