"""SHA-256 checksums, of state in msgpack and of downloaded files."""

from __future__ import annotations

import hashlib
import lzma
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from cluster.errors import CheckpointError

_CHUNK = 1 << 22  # bytes read at a time
UNREADABLE = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    IndexError,
    OverflowError,
    MemoryError,
    SyntaxError,  # numpy, of a damaged dtype
    msgpack.UnpackException,
)
"""What reading damaged msgpack, and arrays in it, may raise."""
DAMAGED_ARRAYS = (
    *UNREADABLE,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    tokenize.TokenError,
    EOFError,
    OSError,
    RuntimeError,  # a damaged flag says: encrypted; a damaged number: an unknown compression
)
"""What reading a damaged .npy or .npz file may raise."""


def count(value: Any) -> int:
    """A non-negative integer that was read from a file.

    Raises:
        ValueError: it is something else.
    """
    if type(value) is not int or value < 0:
        raise ValueError(f"a count was expected, found {value!r}")
    return value


def pack_array(array: np.ndarray) -> dict[str, Any]:
    """An array as plain values for msgpack."""
    return {"dtype": array.dtype.str, "shape": array.shape, "data": array.tobytes()}


def unpack_array(fields: dict[str, Any]) -> np.ndarray:
    """Inverse of `pack_array`."""
    dtype = np.dtype(str(fields["dtype"]))
    if dtype.kind not in "fiub":
        raise ValueError(f"numbers were expected, found an array of {dtype}")
    return np.frombuffer(fields["data"], dtype=dtype).reshape(fields["shape"]).copy()


def add_checksum(body: bytes, **header: int) -> bytes:
    """msgpack of some bytes, their SHA-256, and unprotected fields of a header."""
    return msgpack.packb({**header, "sha256": hashlib.sha256(body).digest(), "body": body})


def verify_checksum(data: bytes) -> bytes:
    """Inverse of `add_checksum`, without the header. Data of older versions that has no checksum
    (another map, a list) is returned as it is.

    Raises:
        any of UNREADABLE: damaged.
    """
    outer = msgpack.unpackb(data, strict_map_key=False)
    if not isinstance(outer, dict) or not outer.keys() & {"sha256", "body"}:
        return data
    if hashlib.sha256(outer["body"]).digest() != outer["sha256"]:
        raise ValueError("the checksum does not match: the bytes are damaged")
    return outer["body"]


def sum_file(file: Path) -> Path:
    """The file beside a download that holds its SHA-256, as `sha256sum` writes it."""
    return file.with_name(file.name + ".sha256")


def sha256_of(file: Path, advance: Callable[[int], None] = lambda size: None) -> str:
    """SHA-256 of a file, in hexadecimal; `advance` is called with the size of each piece read."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(_CHUNK):
            digest.update(piece)
            advance(len(piece))
    return digest.hexdigest()


def write_sum(file: Path, digest: str) -> None:
    """Write the SHA-256 of a file beside it."""
    line = f"{digest}  {file.name}\n"
    sum_file(file).write_text(line, encoding="utf-8", errors="surrogateescape")


def verify_sum(file: Path, advance: Callable[[int], None] = lambda size: None) -> bool:
    """Compare a file with the checksum beside it; False if there is none.

    Raises:
        CheckpointError: they differ.
    """
    note = sum_file(file)
    if not note.is_file():
        return False
    expected = note.read_text(encoding="utf-8", errors="surrogateescape").split()[:1]
    found = sha256_of(file, advance)
    if expected != [found]:
        raise CheckpointError(
            f"{file}: SHA-256 is {found}, but {note.name} says "
            f"{expected[0] if expected else 'nothing'}: the file was damaged or replaced; fetch it "
            f"again, or remove {note.name} if you replaced it on purpose"
        )
    return True
