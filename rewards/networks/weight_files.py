"""Files of published networks: fetched once, told apart by a digest of their weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from cluster.errors import CheckpointError
from cluster.io.checksum import sha256_of
from cluster.model_files.tensors import load_strict

PUBLISHED = "published"
COUNTER = "num_batches_tracked"  # of batch norm: means nothing here, and some files lack it
TOLD = 300  # characters of another library's error that are worth repeating


def given(checkpoint: str) -> bool:
    """Whether a `checkpoint` option names a file of the user's own."""
    return checkpoint not in ("", PUBLISHED)


def weights_file(checkpoint: str, url: str) -> str:
    """The file that a `checkpoint` option names, else the published one, fetched if need be.

    Raises:
        CheckpointError: it cannot be fetched, or the file in the cache is another.
    """
    return checkpoint if given(checkpoint) else str(published_file(url))


def published_file(url: str) -> Path:
    """A published file, from torch.hub's cache or fetched into it.

    Args:
        url: its name carries the beginning of the file's SHA-256, as in `network-6726825d.pth`.

    Raises:
        CheckpointError: it cannot be fetched, or the file in the cache is another.
    """
    place = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    digest = place.stem.rpartition("-")[2]
    remedy = f"put {url} at {place}, or name your copy of it in `checkpoint`"
    if not place.is_file():
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(place), digest)
        except (OSError, RuntimeError) as error:  # no network; or another file than expected
            raise CheckpointError(
                f"{place.name} cannot be fetched ({brief(error)}): {remedy}"
            ) from error
    found = sha256_of(place)
    if not found.startswith(digest):
        raise CheckpointError(
            f"{place}: expected a file whose SHA-256 begins with {digest}, found {found[:16]}; "
            f"it is damaged or another file: remove it, then {remedy}"
        )
    return place


def load_network(network: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """`load_strict`, whether or not the file has batch norm's counters."""
    wanted = {name: value for name, value in network.state_dict().items() if _counts(name)}
    tensors = {name: value for name, value in state.items() if not _counts(name)}
    load_strict(network, tensors | wanted, source)


def weights_digest(network: nn.Module) -> str:
    """SHA-256 of all weights, 16 hex digits: the same whatever file they came from.

    Names, types, shapes and bytes count, in the order of the names.
    """
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        if not _counts(name):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            flat = value.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def brief(error: Exception) -> str:
    """Another library's error in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= TOLD else f"{text[:TOLD]}..."


def _counts(name: str) -> bool:
    return name.endswith(COUNTER)
