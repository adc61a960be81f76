"""A state dict as one flat buffer and a msgpack manifest, and back.

One contiguous buffer goes through an object store zero-copy, whatever the dtypes (numpy has no
bfloat16), and needs no pickle of tensors. `load_weights` copies *into* the receiving module's own
tensors: the shared buffer is never aliased, so that no in-place update reaches another process.

Weights on a GPU are packed there and copied to pinned host memory once (a group of learners gathers
and packs them in host memory); a module on a GPU gets the buffer in one copy, and it is verified
and taken apart there (not yet run on a GPU).

A snapshot is full, or holds low-rank adapters alone: then it names the full snapshot (its base)
whose weights W become W + scale B A.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np
import torch
from torch import Tensor

from cluster.errors import CheckpointError
from cluster.messages import WeightSnapshot
from cluster.snapshots.pieces import (
    DTYPES,
    Pieces,
    Tensors,
    block_sums,
    digest,
    readable,
    view_of,
)

ALIGNMENT = 64  # bytes; what vector loads and pinned copies like best
FORMAT = 2
CPU = torch.device("cpu")
UNREADABLE = (ValueError, KeyError, TypeError, msgpack.UnpackException)


class Packer:
    """Packs state dicts into host buffers that it reuses once no one else refers to them: touching
    fresh memory, or pinning it, costs more than the copy. Ray has copied a return value before it
    drops its reference.

    Args:
        dtype: of floating-point tensors on the wire; None leaves each as it is.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self._dtype = dtype
        self._entries: list[dict[str, Any]] = []
        self._buffers: list[np.ndarray] = []

    @torch.no_grad()
    def __call__(
        self,
        state: Mapping[str, Tensor],
        version: int,
        *,
        config: Mapping[str, Any] | None = None,
        send: Callable[[WeightSnapshot], object] | None = None,
        **more: Any,
    ) -> WeightSnapshot:
        """Copy a state dict into one aligned buffer: on its device, then from there to the host.

        Args:
            state: tensor name -> tensor, any device, any dtype of `DTYPES`.
            version: policy version of the snapshot.
            config: architecture of the module, compared where it is loaded.
            send: called with the snapshot while its buffer is a tensor on the state's device.
            more: further entries of the manifest.

        Raises:
            CheckpointError: a tensor has a dtype that cannot travel.
        """
        entries, nbytes = _layout(state, self._dtype)
        device = device_of(state.values())
        buffer = None
        if device == CPU:
            buffer = self._free_buffer(entries, nbytes)
            flat = torch.from_numpy(buffer)
        else:  # memory that the learner's next step uses again
            flat = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        for entry, tensor in zip(entries, state.values()):
            view_of(flat, entry).copy_(tensor)
        body = {
            "version": version,
            "base": None,
            "config": dict(config or {}),
            "nbytes": nbytes,
            "checksum": checksum(flat),
            "tensors": entries,
            **more,
        }
        base = body["base"] and body["base"]["version"]
        manifest = _pack_manifest(body)
        if send is not None:
            here: Any = flat
            send(WeightSnapshot(version=version, manifest=manifest, buffer=here, base=base))
        if buffer is None:
            buffer = self._free_buffer(entries, nbytes, pinned=True)
            torch.from_numpy(buffer).copy_(flat)  # returns when the host has it
        return WeightSnapshot(version=version, manifest=manifest, buffer=buffer, base=base)

    def _free_buffer(
        self, entries: list[dict[str, Any]], nbytes: int, pinned: bool = False
    ) -> np.ndarray:
        """A view of a buffer without other views: a snapshot keeps its buffer."""
        if entries != self._entries:  # else the gaps between tensors are zeros already
            self._entries, self._buffers = entries, []
        for index in range(len(self._buffers)):
            if sys.getrefcount(self._buffers[index]) == 2:  # the list, and the call's argument
                return self._buffers[index][:]
        self._buffers.append(_host_zeros(nbytes, pinned))
        return self._buffers[-1][:]


def _host_zeros(nbytes: int, pinned: bool) -> np.ndarray:
    if pinned:  # page-locked: copied to and from a GPU at the bus's speed
        return torch.zeros(nbytes, dtype=torch.uint8, pin_memory=True).numpy()
    return np.zeros(nbytes, dtype=np.uint8)


def device_of(tensors: Iterable[Tensor]) -> torch.device:
    """The device that all tensors are on; the CPU, if they are on several."""
    found = {tensor.device for tensor in tensors}
    return found.pop() if len(found) == 1 else CPU


def pack_weights(
    state: Mapping[str, Tensor], version: int, dtype: torch.dtype | None = None
) -> WeightSnapshot:
    """A full snapshot in a new buffer; see `Packer`."""
    return Packer(dtype)(state, version)


def pack_adapters(
    pairs: Mapping[str, tuple[Tensor, Tensor, float]], version: int, base: SnapshotName
) -> WeightSnapshot:
    """A snapshot of low-rank adapters alone.

    Args:
        pairs: name of a weight (out, in) -> A (rank, in), B (out, rank), scale: it becomes
            W + scale B A.
        base: names the full snapshot of the weights that they belong to.
    """
    state: dict[str, Tensor] = {}
    for name, (a, b, _) in pairs.items():
        state |= {f"{name}.A": a, f"{name}.B": b}
    return Packer()(
        state,
        version,
        base=dataclasses.asdict(base),
        scales={name: float(scale) for name, (_, _, scale) in pairs.items()},
    )


@dataclass(frozen=True)
class SnapshotName:
    """Identity of a snapshot: the same weights have the same name."""

    version: int
    digest: bytes
    """Of its manifest, which has the buffer's checksum."""

    def __str__(self) -> str:
        return f"version {self.version} ({self.digest.hex()[:8]})"


@dataclass(frozen=True)
class Opened:
    """A verified snapshot. Its tensors are read-only views of the buffer."""

    name: SnapshotName
    config: Mapping[str, Any]
    base: SnapshotName | None
    scales: Mapping[str, float]
    tensors: Tensors


def open_snapshot(snapshot: WeightSnapshot, device: torch.device = CPU) -> Opened:
    """Verify a snapshot.

    Args:
        device: where it is verified, and where its tensors are; another one than the buffer's gets
            the buffer in one copy.

    Raises:
        CheckpointError: manifest or buffer are damaged, do not match, or have another format.
    """
    body, named = _unpack_manifest(snapshot)
    buffer: Any = snapshot.buffer
    nbytes = snapshot.nbytes
    if body["nbytes"] != nbytes or body["version"] != snapshot.version:
        raise CheckpointError(
            f"snapshot {snapshot.version}: manifest speaks of version {body['version']} with "
            f"{body['nbytes']} bytes, found {nbytes} bytes"
        )
    if isinstance(buffer, Pieces):  # summed up as they arrived
        flat = buffer if device == CPU else buffer.on(device)
    else:
        flat = (buffer if isinstance(buffer, Tensor) else readable(buffer)).to(device)
    if (flat.checksum() if isinstance(flat, Pieces) else checksum(flat)) != body["checksum"]:
        raise CheckpointError(
            f"snapshot {snapshot.version} is damaged: checksum does not match; it must be sent anew"
        )
    return Opened(
        name=SnapshotName(snapshot.version, named),
        config=body["config"],
        base=SnapshotName(**body["base"]) if body["base"] else None,
        scales=body.get("scales", {}),
        tensors=Tensors(body["tensors"], flat),
    )


def unpack_weights(snapshot: WeightSnapshot) -> dict[str, Tensor]:
    """A state dict whose tensors are fresh copies of the snapshot's.

    Raises:
        CheckpointError: the buffer does not match its manifest (length or checksum).
    """
    return {name: view.clone() for name, view in open_snapshot(snapshot).tensors.items()}


@torch.no_grad()
def load_weights(
    module: torch.nn.Module, snapshot: WeightSnapshot, base: WeightSnapshot | None = None
) -> None:
    """Copy a snapshot into a module's own parameters and persistent buffers, in place.

    Everything is checked before the first tensor is touched, so a refused snapshot changes nothing.
    On a GPU the copies are queued in the current stream, after what was queued there before, and
    are done when this returns: the snapshot's memory may then be used for something else.

    Args:
        base: the full snapshot that `snapshot` builds upon, where it does.

    Raises:
        CheckpointError: damaged snapshot, another base than it builds upon, or one of another
            architecture (names, shapes or configuration differ).
    """
    own = module.state_dict()
    device = device_of(own.values())
    opened = open_snapshot(snapshot, device)
    full = opened if opened.base is None else _base_of(opened, base, device)
    _check_architecture(module, own, full)
    pairs = {} if full is opened else _pairs(opened, own)
    for name in full.tensors:
        if name in pairs:
            a, b, scale = pairs[name]
            update, view = (b @ a) * scale, full.tensors[name]
            own[name].copy_(view + update.to(view.dtype))
        else:
            full.tensors.copy_into(own[name], name)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def checksum(flat: Tensor) -> bytes:
    """16 bytes that change with any flipped bit, missing block or exchanged blocks of a flat uint8
    tensor whose length is a multiple of 8. The same on every device: sums of integers are exact.

    64-bit words are added up in blocks, and the sums are hashed: at the speed of memory, several
    times that of a CRC. Words that change places inside a block go unnoticed."""
    return digest(block_sums(flat).cpu().numpy().tobytes())


def _base_of(opened: Opened, base: WeightSnapshot | None, device: torch.device) -> Opened:
    what = f"snapshot {opened.name.version} builds upon {opened.base}"
    if base is None:
        raise CheckpointError(f"{what}, and came without it: the full snapshot must come first")
    full = open_snapshot(base, device)
    if full.name != opened.base:
        raise CheckpointError(f"{what}, but was given the wrong base: {full.name}")
    return full


def _check_architecture(module: torch.nn.Module, own: Mapping[str, Tensor], full: Opened) -> None:
    views = full.tensors
    other = f"snapshot {full.name.version} is of another architecture: "
    missing, unexpected = own.keys() - views.keys(), views.keys() - own.keys()
    if missing or unexpected:
        raise CheckpointError(
            f"{other}missing {sorted(missing)[:3] or 'none'}, "
            f"unexpected {sorted(unexpected)[:3] or 'none'}"
        )
    for name in views:
        if own[name].shape != views.shape(name):
            raise CheckpointError(
                f"{other}{name!r} has shape {views.shape(name)}, expected {tuple(own[name].shape)}"
            )
    expected = architecture(module)
    if not (expected and full.config):
        return
    for key in expected.keys() | full.config.keys():  # not visible in shapes: heads, rotary base
        if expected.get(key) != full.config.get(key):
            raise CheckpointError(
                f"{other}{key} is {full.config.get(key)!r}, expected {expected.get(key)!r}"
            )


def architecture(module: torch.nn.Module) -> dict[str, Any]:
    """A policy's configuration, as a manifest has it; empty for modules without one."""
    config: Any = getattr(module, "config", None)
    return msgpack.unpackb(msgpack.packb(config.to_dict())) if config is not None else {}


def _pairs(opened: Opened, own: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor, float]]:
    found = {}
    for name, scale in opened.scales.items():
        a, b = opened.tensors[f"{name}.A"], opened.tensors[f"{name}.B"]
        if name not in own or own[name].shape != (len(b), a.shape[1]):
            raise CheckpointError(
                f"snapshot {opened.name.version} has an adapter of {name!r} for a weight of shape "
                f"{(len(b), a.shape[1])}, expected "
                f"{tuple(own[name].shape) if name in own else 'no such weight'}"
            )
        found[name] = (a, b, scale)
    return found


def _layout(
    state: Mapping[str, Tensor], dtype: torch.dtype | None
) -> tuple[list[dict[str, Any]], int]:
    """Offset of each tensor, and the total length in bytes."""
    entries: list[dict[str, Any]] = []
    offset = 0
    for name, tensor in state.items():
        kind = dtype if dtype and tensor.is_floating_point() else tensor.dtype
        label = str(kind).removeprefix("torch.")
        if label not in DTYPES:
            raise CheckpointError(
                f"weight {name!r} has dtype {label}, which a snapshot cannot carry; "
                f"expected one of {', '.join(DTYPES)}"
            )
        entries.append({"name": name, "dtype": label, "shape": list(tensor.shape), "at": offset})
        offset += math.ceil(tensor.numel() * kind.itemsize / ALIGNMENT) * ALIGNMENT
    return entries, max(offset, ALIGNMENT)  # numpy and torch are odd about empty memory


def _pack_manifest(body: Mapping[str, Any]) -> bytes:
    packed = msgpack.packb(body)
    return msgpack.packb({"format": FORMAT, "body": packed, "digest": digest(packed)})


def _unpack_manifest(snapshot: WeightSnapshot) -> tuple[dict[str, Any], bytes]:
    """The manifest's body and digest."""
    try:
        manifest = msgpack.unpackb(snapshot.manifest)
        found, packed, named = manifest["format"], manifest["body"], manifest["digest"]
        intact = digest(packed) == named
    except UNREADABLE:
        intact, found = False, FORMAT
    if found != FORMAT:
        raise CheckpointError(
            f"snapshot {snapshot.version} has format {found}, expected {FORMAT}: learner and "
            "samplers run different versions of Tessera"
        )
    if not intact:
        raise CheckpointError(
            f"snapshot {snapshot.version} is damaged: its manifest cannot be read; it must be sent "
            "anew"
        )
    return msgpack.unpackb(packed), named
