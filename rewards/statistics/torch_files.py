"""Arrays in a file of torch.save, as in torch-fidelity's statistics: a dictionary of numpy arrays.

Nothing is unpickled: the pickle is parsed as data, including numpy's calls that describe an array
(numpy/_core/src/multiarray/methods.c, `array_reduce`).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from cluster.errors import DataError
from cluster.model_files.pickles import MalformedError, Opaque
from cluster.model_files.torch_files import TensorRecord, TorchFile
from rewards.statistics.advice import EXPECTED, FROM_FEATURES, SAVE, TORCH, like_features

KINDS = "fiub"
_ARRAY, _BUFFER, _SCALAR = "multiarray._reconstruct", "numeric._frombuffer", "multiarray.scalar"
_DTYPE = "numpy.dtype"


class TorchArrays:
    """Arrays and plain tensors of the dictionary in a file, each built on request."""

    loader = TORCH

    def __init__(self, place: Path, path: str | os.PathLike[str]) -> None:
        """
        Args:
            path: as the user named the file.

        Raises:
            DataError: damaged, or not a dictionary.
        """
        self._path = path
        try:
            self._file = TorchFile(place, _call)
        except MalformedError as error:
            raise DataError(
                f"{path}: not a whole PyTorch file ({error}): fetch or build it again"
            ) from error
        content = self._file.content
        if not isinstance(content, dict):
            raise DataError(f"{path}: {EXPECTED} {_other(content, path)}")
        self._values = {key: value for key, value in content.items() if isinstance(key, str)}
        self.names = list(self._values)

    def shape(self, key: str) -> tuple[int, ...]:
        return _shape(self._values[key]) or ()

    def read(self, key: str) -> np.ndarray:
        """
        Raises:
            DataError: no array of numbers, or a damaged one.
        """
        value = self._values[key]
        try:
            if isinstance(value, TensorRecord):
                return self._file.read(value).numpy().copy()
            if isinstance(value, (bool, int, float, str)):
                return np.asarray(value)
            if _shape(value) is not None:
                return _array(value)
        except (ValueError, TypeError, RuntimeError, OverflowError, MemoryError) as error:
            raise DataError(
                f"{self._path}: {key}: damaged ({error}): fetch or build it again"
            ) from error
        what = value.name if isinstance(value, Opaque) else type(value).__name__
        raise DataError(
            f"{self._path}: {key}: expected an array of numbers, found {what}, which is not read: "
            f"{SAVE}"
        )


def _call(name: str, arguments: tuple[Any, ...]) -> Any:
    """The meaning of numpy's calls; None for others."""
    if name == _DTYPE and arguments and isinstance(arguments[0], str):
        return Opaque(f"{_DTYPE} {arguments[0]}")
    if name.endswith(_BUFFER) and len(arguments) == 4:  # protocol 5
        data, dtype, shape, order = arguments
        return Opaque(name, (1, shape, dtype, order == "F", data))
    if name.endswith(_SCALAR) and len(arguments) == 2:
        return Opaque(name, (1, (), arguments[0], False, arguments[1]))
    if name == "_codecs.encode" and arguments[1:] == ("latin1",):  # bytes, in protocol 2
        return arguments[0].encode("latin1")
    return None


def _shape(value: Any) -> tuple[int, ...] | None:
    """Of an array or tensor; None of anything else."""
    if isinstance(value, TensorRecord):
        return value.shape
    if isinstance(value, Opaque) and value.name.endswith((_ARRAY, _BUFFER, _SCALAR)):
        state = value.state
        if isinstance(state, tuple) and len(state) == 5 and isinstance(state[1], tuple):
            return state[1] if all(type(n) is int and n >= 0 for n in state[1]) else None
    return None


def _array(value: Opaque) -> np.ndarray:
    """
    Raises:
        ValueError: not numbers, or more or fewer bytes than the shape says.
    """
    _, shape, kind, in_columns, data = value.state
    if not isinstance(kind, Opaque) or not kind.name.startswith(f"{_DTYPE} "):
        raise ValueError("an array of no type")
    dtype = np.dtype(kind.name.removeprefix(f"{_DTYPE} "))
    if dtype.kind not in KINDS and dtype.kind != "c":
        raise ValueError(f"an array of {dtype}, not of numbers")
    if isinstance(kind.state, tuple) and len(kind.state) > 1 and kind.state[1] in ("<", ">"):
        dtype = dtype.newbyteorder(kind.state[1])
    if not isinstance(data, bytes | bytearray) or len(data) != dtype.itemsize * int(np.prod(shape)):
        raise ValueError(f"{shape} of {dtype} announced, other bytes there")
    return np.frombuffer(bytes(data), dtype).reshape(shape, order="F" if in_columns else "C")


def _other(content: Any, path: str | os.PathLike[str]) -> str:
    """Description of a file without a dictionary."""
    shape = _shape(content)
    if shape and len(shape) == 2:
        loaded = f"features = {TORCH}({str(path)!r}).numpy()"
        return f"{like_features(shape)}: {loaded}; {FROM_FEATURES}"
    what = content.name if isinstance(content, Opaque) else type(content).__name__
    found = f"one tensor of shape {shape}" if shape is not None else f"{what} of torch.save"
    return f"{found}, without mu and sigma: {SAVE}"
