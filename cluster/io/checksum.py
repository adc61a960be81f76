"""Bytes with a checksum of their own: state is what was written, or it is refused."""

from __future__ import annotations

import hashlib
import lzma
import struct
import tokenize
import zipfile
import zlib
from typing import Any

import msgpack
import numpy as np

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
"""What taking apart damaged msgpack, and arrays in it, may raise."""
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
    """A number that counts something, as it was read.

    Raises:
        ValueError: it is none.
    """
    if type(value) is not int or value < 0:
        raise ValueError(f"a count was expected, found {value!r}")
    return value


def pack_array(array: np.ndarray) -> dict[str, Any]:
    """An array as msgpack can hold it."""
    return {"dtype": array.dtype.str, "shape": array.shape, "data": array.tobytes()}


def unpack_array(fields: dict[str, Any]) -> np.ndarray:
    """Inverse of `pack_array`."""
    dtype = np.dtype(str(fields["dtype"]))
    if dtype.kind not in "fiub":
        raise ValueError(f"numbers were expected, found an array of {dtype}")
    return np.frombuffer(fields["data"], dtype=dtype).reshape(fields["shape"]).copy()


def add_checksum(body: bytes) -> bytes:
    """msgpack of the bytes and their SHA-256."""
    return msgpack.packb({"sha256": hashlib.sha256(body).digest(), "body": body})


def verify_checksum(data: bytes) -> bytes:
    """Inverse of `add_checksum`. Data of older versions without a checksum (another map, a list) is
    returned unchanged.

    Raises:
        any of UNREADABLE: damaged.
    """
    outer = msgpack.unpackb(data, strict_map_key=False)
    if not isinstance(outer, dict) or not outer.keys() & {"sha256", "body"}:
        return data
    if hashlib.sha256(outer["body"]).digest() != outer["sha256"]:
        raise ValueError("the checksum does not match: the bytes are damaged")
    return outer["body"]
