"""A state dict as one flat buffer and a msgpack manifest, and back.

One contiguous buffer goes through an object store zero-copy, whatever the dtypes (numpy has no
bfloat16), and needs no pickle of tensors. `load_weights` copies *into* the receiving module's own
tensors: the shared buffer is never aliased, so an in-place update cannot reach another process.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import msgpack
import numpy as np
import torch

from cluster.errors import CheckpointError
from cluster.messages import WeightSnapshot

ALIGNMENT = 64  # bytes; what vector loads and pinned copies like best
FORMAT = 1
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int64": torch.int64,
    "int32": torch.int32,
    "uint8": torch.uint8,
    "bool": torch.bool,
}


def pack_weights(state: Mapping[str, torch.Tensor], version: int) -> WeightSnapshot:
    """Copy a state dict into one aligned buffer.

    Args:
        state: tensor name -> tensor, any device, any dtype of `DTYPES`.
        version: policy version of the snapshot.

    Raises:
        CheckpointError: a tensor has a dtype that cannot travel.
    """
    entries: list[dict[str, Any]] = []
    offset = 0
    for name, tensor in state.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise CheckpointError(
                f"weight {name!r} has dtype {dtype}, which a snapshot cannot carry; "
                f"expected one of {', '.join(DTYPES)}"
            )
        nbytes = tensor.numel() * tensor.element_size()
        entries.append({"name": name, "dtype": dtype, "shape": list(tensor.shape), "at": offset})
        offset += math.ceil(nbytes / ALIGNMENT) * ALIGNMENT
    buffer = np.zeros(offset, dtype=np.uint8)
    flat = torch.from_numpy(buffer)
    for entry, tensor in zip(entries, state.values()):
        raw = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
        flat[entry["at"] : entry["at"] + raw.numel()].copy_(raw)
    manifest = {
        "format": FORMAT,
        "version": version,
        "tensors": entries,
        "nbytes": offset,
        "crc32": zlib.crc32(buffer.data),
    }
    return WeightSnapshot(version=version, manifest=msgpack.packb(manifest), buffer=buffer)


def unpack_weights(snapshot: WeightSnapshot) -> dict[str, torch.Tensor]:
    """A state dict whose tensors are fresh copies of the snapshot's.

    Raises:
        CheckpointError: the buffer does not match its manifest (length or checksum).
    """
    return {name: view.clone() for name, view in _views(snapshot)}


def load_weights(module: torch.nn.Module, snapshot: WeightSnapshot) -> None:
    """Copy a snapshot into a module's own parameters and persistent buffers, in place.

    Everything is checked before the first tensor is touched, so a refused snapshot changes nothing.

    Raises:
        CheckpointError: damaged snapshot, or one of another architecture (names or shapes differ).
    """
    own, views = module.state_dict(), dict(_views(snapshot))
    missing, unexpected = own.keys() - views.keys(), views.keys() - own.keys()
    if missing or unexpected:
        raise CheckpointError(
            f"snapshot {snapshot.version} is of another architecture: "
            f"missing {sorted(missing)[:3] or 'none'}, "
            f"unexpected {sorted(unexpected)[:3] or 'none'}"
        )
    for name, view in views.items():
        if own[name].shape != view.shape:
            raise CheckpointError(
                f"snapshot {snapshot.version} is of another architecture: {name!r} has shape "
                f"{tuple(view.shape)}, expected {tuple(own[name].shape)}"
            )
    for name, view in views.items():
        own[name].copy_(view)


def _views(snapshot: WeightSnapshot) -> Iterator[tuple[str, torch.Tensor]]:
    manifest = msgpack.unpackb(snapshot.manifest)
    buffer = snapshot.buffer
    if manifest["format"] != FORMAT:
        raise CheckpointError(
            f"snapshot {snapshot.version} has format {manifest['format']}, expected {FORMAT}"
        )
    if manifest["nbytes"] != buffer.nbytes or manifest["version"] != snapshot.version:
        raise CheckpointError(
            f"snapshot {snapshot.version}: manifest speaks of version {manifest['version']} with "
            f"{manifest['nbytes']} bytes, found {buffer.nbytes} bytes"
        )
    if zlib.crc32(buffer.data) != manifest["crc32"]:
        raise CheckpointError(f"snapshot {snapshot.version} is damaged: checksum does not match")
    for entry in manifest["tensors"]:
        dtype = DTYPES[entry["dtype"]]
        nbytes = math.prod(entry["shape"]) * dtype.itemsize
        raw = buffer[entry["at"] : entry["at"] + nbytes]
        yield entry["name"], _tensor(raw).view(dtype).view(entry["shape"])


def _tensor(raw: np.ndarray) -> torch.Tensor:
    """A tensor over `raw`, read-only or not: torch has no read-only tensors and would warn."""
    return torch.from_numpy(raw if raw.flags.writeable else np.asarray(_OnlyRead(raw)))


class _OnlyRead:
    """Shows read-only memory to numpy as writable; whoever uses it promises not to write."""

    def __init__(self, raw: np.ndarray) -> None:
        self._raw = raw
        pointer, _ = raw.__array_interface__["data"]
        self.__array_interface__ = {**raw.__array_interface__, "data": (pointer, False)}
