"""A snapshot's buffer in pieces, for hosts that pass it on while it arrives.

Pieces are equal but for the last one, and begin at multiples of `BLOCK`: their sums, side by side,
are those of the whole buffer, so that each is summed up when it arrives.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

BLOCK = 1 << 16  # bytes that share one sum of the checksum
WORD = 8  # bytes
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


def cut(buffer: np.ndarray, count: int) -> list[np.ndarray]:
    """Views of a flat buffer as `count` pieces; the last ones are empty if it is too short."""
    size = max(math.ceil(buffer.nbytes / count / BLOCK), 1) * BLOCK
    return [buffer[at * size : (at + 1) * size] for at in range(count)]


def block_sums(flat: Tensor) -> Tensor:
    """Sums of the 64-bit words of each whole block, and of what is left behind the last one."""
    words = flat.view(torch.int64)
    per_block = BLOCK // WORD
    whole = len(words) // per_block * per_block
    return torch.cat([words[:whole].view(-1, per_block).sum(1), words[whole:].sum().view(1)])


def digest(data: bytes) -> bytes:
    """16 bytes."""
    return hashlib.blake2b(data, digest_size=16).digest()


def view_of(flat: Tensor, entry: Mapping[str, Any]) -> Tensor:
    """The tensor of a manifest's entry in a whole buffer."""
    dtype = DTYPES[entry["dtype"]]
    nbytes = math.prod(entry["shape"]) * dtype.itemsize
    return flat[entry["at"] : entry["at"] + nbytes].view(dtype).view(entry["shape"])


class Pieces:
    """A buffer that arrives piece by piece, in order."""

    def __init__(self) -> None:
        self._pieces: list[Tensor] = []
        self._sums: list[Tensor] = []
        self._left: Tensor | None = None  # sum of the words behind the last whole block
        self.nbytes = 0

    def add(self, piece: np.ndarray) -> None:
        """Take the next piece, and sum it up. All but the last one are whole blocks long."""
        if not piece.nbytes:
            return
        flat = readable(piece)
        sums = block_sums(flat)
        self._pieces.append(flat)
        self._sums.append(sums[:-1])
        self._left = sums[-1:]
        self.nbytes += piece.nbytes

    def checksum(self) -> bytes:
        """That of the whole buffer (`cluster.weights.checksum`)."""
        left = torch.zeros(1, dtype=torch.int64) if self._left is None else self._left
        return digest(torch.cat([*self._sums, left]).numpy().tobytes())

    def on(self, device: torch.device) -> Tensor:
        """The whole buffer on a device."""
        flat, at = torch.empty(self.nbytes, dtype=torch.uint8, device=device), 0
        for piece in self._pieces:
            flat[at : at + len(piece)].copy_(piece)
            at += len(piece)
        return flat

    def span(self, entry: Mapping[str, Any]) -> list[Tensor]:
        """A tensor's elements in order: flat views, one of each piece that has some."""
        dtype = DTYPES[entry["dtype"]]
        begin = entry["at"]
        end, at, found = begin + math.prod(entry["shape"]) * dtype.itemsize, 0, []
        for piece in self._pieces:
            inside = piece[max(begin - at, 0) : max(end - at, 0)]
            if len(inside):
                found.append(inside.view(dtype))
            at += len(piece)
        return found or [torch.empty(0, dtype=dtype)]


class Tensors(Mapping[str, Tensor]):
    """The tensors of a verified buffer: views of it, to be read only.

    Args:
        entries: of the manifest.
        buffer: whole, or in pieces: a tensor of several pieces is put together when it is asked
            for.
    """

    def __init__(self, entries: Sequence[Mapping[str, Any]], buffer: Tensor | Pieces) -> None:
        self._entries = {str(entry["name"]): entry for entry in entries}
        self._buffer = buffer

    def __getitem__(self, name: str) -> Tensor:
        entry = self._entries[name]
        if isinstance(self._buffer, Tensor):
            return view_of(self._buffer, entry)
        parts = self._buffer.span(entry)
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(entry["shape"])

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entries[name]["shape"])

    def copy_into(self, own: Tensor, name: str) -> None:
        """Copy a tensor into one of the same shape, in place, without another copy of it."""
        if isinstance(self._buffer, Tensor) or not own.is_contiguous():
            own.copy_(self[name])
            return
        flat, at = own.view(-1), 0
        for part in self._buffer.span(self._entries[name]):
            flat[at : at + len(part)].copy_(part)
            at += len(part)


def readable(raw: np.ndarray) -> Tensor:
    """A tensor over `raw`, read-only or not: torch has no read-only tensors and would warn."""
    return torch.from_numpy(raw if raw.flags.writeable else np.asarray(_OnlyRead(raw)))


class _OnlyRead:
    """Presents read-only memory to numpy as writable; its user must not write."""

    def __init__(self, raw: np.ndarray) -> None:
        self._raw = raw
        pointer, _ = raw.__array_interface__["data"]
        self.__array_interface__ = {**raw.__array_interface__, "data": (pointer, False)}
