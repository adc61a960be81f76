"""Files of published networks: checked, fetched once, identified by a digest of their weights."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from cluster.errors import CheckpointError
from cluster.io.checksum import sha256_of
from cluster.model_files.checkpoints import is_own, open_checkpoint
from cluster.model_files.tensors import load_strict, read_config, read_shapes
from cluster.preflight import Download, Findings

PUBLISHED = "published"
HUB_PAGE = "https://huggingface.co"
COUNTER = "num_batches_tracked"  # of batch norm; unused here, and missing in some files
MAX_MESSAGE = 300  # characters of another library's error


def is_user_file(checkpoint: str) -> bool:
    """Whether a `checkpoint` option names a file, not the published weights."""
    return checkpoint not in ("", PUBLISHED)


def check_weights(path: str) -> Collection[str]:
    """Names of the tensors in a file of published weights, from its header.

    Raises:
        CheckpointError: missing, damaged, or a network of this program.
    """
    if is_own(path):
        raise CheckpointError(
            f"{path}: expected published weights, found a {family_of(path)!r} of this program: "
            "leave it empty for the published ones, or name another file"
        )
    return open_checkpoint(path).tensors.keys()


def family_of(path: str) -> str:
    """Kind of network in a safetensors file of this program; empty for other files.

    Raises:
        CheckpointError: not a whole safetensors file.
    """
    read_shapes(path)
    try:
        return str(read_config(path).get("family", ""))
    except CheckpointError:
        return ""


def is_cached(repository: str, file: str) -> bool:
    """Whether a file of a Hugging Face repository is in the local cache."""
    import huggingface_hub

    return isinstance(huggingface_hub.try_to_load_from_cache(repository, file), str)


def check_hub(
    findings: Findings,
    field: str,
    name: str,
    repository: str,
    files: Sequence[str],
    size: float = 0.0,
    path: str = "",
) -> None:
    """Note a download from the Hugging Face hub, unless one of `files` is in the local cache.

    Args:
        path: of the page to name, below the repository's.
    """
    from huggingface_hub import constants

    if not any(is_cached(repository, file) for file in files):
        download = Download(field=field, name=name, url=f"{HUB_PAGE}/{repository}{path}", size=size)
        findings.fetched(download, offline=bool(constants.HF_HUB_OFFLINE))


def weights_file(checkpoint: str, url: str) -> str:
    """The file that a `checkpoint` option names, else the published one (`published_file`)."""
    return checkpoint if is_user_file(checkpoint) else str(published_file(url))


def cached_place(url: str) -> Path:
    """Where torch.hub keeps a published file."""
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]


def published_file(url: str) -> Path:
    """A published file, from torch.hub's cache or fetched into it.

    Args:
        url: ends in the first digits of the file's SHA-256, as in `network-6726825d.pth`.

    Raises:
        CheckpointError: not reachable, or another file is in the cache.
    """
    place = cached_place(url)
    digest = place.stem.rpartition("-")[2]
    remedy = f"put {url} at {place}, or name your copy of it in `checkpoint`"
    if not place.is_file():
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(place), digest)
        except (OSError, RuntimeError) as error:  # no network; or another file
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
    """`load_strict`, with or without batch norm's counters in the file."""
    wanted = {name: value for name, value in network.state_dict().items() if _counts(name)}
    tensors = {name: value for name, value in state.items() if not _counts(name)}
    load_strict(network, tensors | wanted, source)


def weights_digest(network: nn.Module) -> str:
    """SHA-256 (16 hex digits) of names, dtypes, shapes and bytes of all weights, sorted by name:
    independent of the kind of file."""
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
    return text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]}..."


def _counts(name: str) -> bool:
    return name.endswith(COUNTER)
