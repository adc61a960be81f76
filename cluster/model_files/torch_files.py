"""Reads files of torch.save without unpickling, as plain containers and records of tensors.

Two formats: since torch 1.6 a zip archive with one pickle and a member for each storage (the memory
of tensors), before that a series of pickles followed by the storages. Both are memory-mapped, and
tensors are views of the map: an optimizer's state, for example, is never read. The formats are
those of torch/serialization.py, 2.13.
"""

from __future__ import annotations

import io
import math
import mmap
import struct
import warnings
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.model_files.pickles import Call, MalformedError, Name, Opaque, read_pickle

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "UntypedStorage": torch.uint8,
    # quantised: what takes as many bytes
    "QInt8Storage": torch.int8,
    "QUInt8Storage": torch.uint8,
    "QUInt4x2Storage": torch.uint8,
    "QInt32Storage": torch.int32,
}
_DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_ORDERED = ("collections.OrderedDict", "builtins.dict", "__builtin__.dict")
_PARAMETERS = (
    "torch.nn.parameter.Parameter",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
)
_WRAPPED = "torch._tensor._rebuild_from_type_v2"  # tensors with attributes, or of a subclass
_PLAIN_TYPES = ("torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter")
_FAULTS = {
    "torch._utils._rebuild_qtensor": "quantised; save the weights before quantisation",
    "torch._utils._rebuild_sparse_tensor": "sparse; save its to_dense()",
    "torch._utils._rebuild_nested_tensor": "nested; save plain tensors",
    "torch._utils._rebuild_meta_tensor_no_storage": (
        "on the meta device, so it has a shape and no numbers; save the model after its weights "
        "were loaded"
    ),
    "torch._utils._rebuild_wrapper_subclass": "of a tensor subclass; save plain tensors",
    "torch.distributed.tensor.DTensor": (
        "one machine's part of a distributed tensor; save the whole state dict "
        "(torch.distributed.checkpoint.state_dict, full_state_dict=True)"
    ),
}
_DTENSOR = "torch.distributed.tensor.DTensor"
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of the format before 1.6
_DIMENSIONS, _NUMBERS = 64, 1 << 48  # more than any tensor has
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip member: signature, lengths of name and extra


@dataclass(frozen=True)
class Storage:
    """A storage in a file, `count` elements long."""

    key: str
    dtype: torch.dtype
    count: int
    start: int = 0
    """Offset in elements (views, in files of torch < 0.4)."""


@dataclass(frozen=True)
class TensorRecord:
    """A tensor in a file, not built yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    stride: tuple[int, ...] = ()
    offset: int = 0
    storage: Storage | None = None
    fault: str = ""
    """Why it is not a plain tensor, and what to do; empty if it is."""


class TorchFile:
    """A file of torch.save; `content` is the saved object, with records for tensors.

    Raises:
        MalformedError: damaged, or not of this format.
        OSError: it cannot be read.
    """

    def __init__(self, file: Path, call: Call = lambda name, arguments: None) -> None:
        """call: data for calls other than torch's (`read_pickle`)."""

        def answer(name: str, arguments: tuple[Any, ...]) -> Any:
            given = call(name, arguments)
            return _call(name, arguments) if given is None else given

        self._call = answer
        self.names: set[str] = set()
        """Functions and classes in the file; none is imported."""
        self._members: dict[str, tuple[int, int, int]] = {}  # offset, bytes, CRC-32 or 0
        self._checked: set[str] = set()
        with file.open("rb") as stream:
            try:
                self._map = _mapped(stream.fileno())
            except ValueError as error:
                raise MalformedError("an empty file") from error
        if self._map[:4] == b"PK\x03\x04":
            self.content = self._archive(file)
        else:
            self.content = self._series()

    def read(self, record: TensorRecord, *, check: bool = True) -> Tensor:
        """The tensor of a record, a view of the file.

        Args:
            check: verify its checksum, if the file has one.

        Raises:
            MalformedError: it is truncated or damaged.
        """
        if record.storage is None or record.fault:
            raise MalformedError(f"a tensor that is {record.fault or 'nowhere'}")
        data = self._data(record.storage, check)
        if record.dtype != data.dtype:  # newer types, whose storages are bytes
            whole = len(data) - len(data) % record.dtype.itemsize
            data = data[:whole].view(record.dtype)
        return data.as_strided(record.shape, record.stride, record.offset)

    def _data(self, storage: Storage, check: bool) -> Tensor:
        if storage.count == 0:
            return torch.empty(0, dtype=storage.dtype)
        if storage.key not in self._members:
            raise MalformedError(f"its storage {storage.key!r} is missing")
        offset, held, crc = self._members[storage.key]
        size = storage.dtype.itemsize
        first, wanted = storage.start * size, storage.count * size
        if first + wanted > held or offset + held > len(self._map):
            raise MalformedError(f"its storage {storage.key!r} is not whole")
        if check and crc and storage.key not in self._checked:
            if zlib.crc32(memoryview(self._map)[offset : offset + held]) != crc:
                raise MalformedError(f"the checksum of its storage {storage.key!r} differs")
            self._checked.add(storage.key)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            bytes_ = torch.frombuffer(
                self._map, dtype=torch.uint8, count=wanted, offset=offset + first
            )
        return bytes_.view(storage.dtype)

    def _archive(self, file: Path) -> Any:
        """The zip format."""
        try:
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
        except (zipfile.BadZipFile, ValueError, struct.error, EOFError) as error:
            raise MalformedError(str(error)) from error
        pickle = next((m for m in members if m.filename.endswith("/data.pkl")), None)
        if pickle is None:
            raise MalformedError("an archive without data.pkl")
        folder = pickle.filename.removesuffix("data.pkl")
        for member in members:
            if member.filename.startswith(f"{folder}data/"):
                key = member.filename.removeprefix(f"{folder}data/")
                self._members[key] = (*self._place(member), member.CRC)
            elif member.filename == f"{folder}byteorder" and self._bytes(member) == b"big":
                raise MalformedError("written on a big-endian machine")
        data = self._bytes(pickle)
        if pickle.CRC and zlib.crc32(data) != pickle.CRC:
            raise MalformedError("the checksum of data.pkl differs")
        return read_pickle(io.BytesIO(data), self._call, _storage, self.names)

    def _bytes(self, member: zipfile.ZipInfo) -> bytes:
        offset, size = self._place(member)
        return self._map[offset : offset + size]

    def _place(self, member: zipfile.ZipInfo) -> tuple[int, int]:
        """Offset and size of a member's data."""
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise MalformedError(
                "compressed, which torch.save does not do; unpack and save it again"
            )
        at = member.header_offset
        header = self._map[at : at + _LOCAL_HEADER.size]
        if at < 0 or len(header) < _LOCAL_HEADER.size or header[:4] != b"PK\x03\x04":
            raise MalformedError(f"no {member.filename} where the directory says")
        _, name, extra = _LOCAL_HEADER.unpack(header)
        offset = at + _LOCAL_HEADER.size + name + extra
        if offset + member.file_size > len(self._map):
            raise MalformedError(f"{member.filename} is not whole")
        return offset, member.file_size

    def _series(self) -> Any:
        """The format before 1.6: magic number, version, machine, object, keys, storages."""
        used: dict[str, Storage] = {}

        def storage(key: Any) -> Storage:
            found = _storage(key)
            used.setdefault(found.key, found)
            return found

        stream: Any = self._map
        if read_pickle(stream) != _MAGIC or read_pickle(stream) != _PROTOCOL:
            raise MalformedError("not of torch.save")
        machine = read_pickle(stream)
        if not isinstance(machine, dict) or machine.get("little_endian") is not True:
            raise MalformedError("written on a big-endian machine")
        content = read_pickle(stream, self._call, storage, self.names)
        keys = read_pickle(stream)
        if not isinstance(keys, list):
            raise MalformedError("no list of storages")
        at = stream.tell()
        for key in keys:
            if not isinstance(key, str | int) or str(key) not in used:
                raise MalformedError("an unknown storage")
            head = stream[at : at + 8]
            count = struct.unpack("<q", head)[0] if len(head) == 8 else -1
            size = count * used[str(key)].dtype.itemsize
            if count < 0 or at + 8 + size > len(stream):
                raise MalformedError(f"its storage {key!r} is not whole")
            self._members[str(key)] = (at + 8, size, 0)
            at += 8 + size
        return content


def _mapped(number: int) -> mmap.mmap:
    """A private map of an open file, so that writing to a tensor does not change the file. Linux
    refuses one for a file larger than memory, which is then mapped read-only."""
    try:
        return mmap.mmap(number, 0, access=mmap.ACCESS_COPY)
    except OSError:
        return mmap.mmap(number, 0, access=mmap.ACCESS_READ)


def _storage(key: Any) -> Storage:
    """The storage of a persistent ID: ("storage", type, key, device, count), in older files also a
    view: (its key, offset, count) or None."""
    if (
        not isinstance(key, tuple)
        or len(key) not in (5, 6)
        or key[0] not in ("storage", b"storage")
    ):
        raise MalformedError("a reference to something other than a storage")
    kind, name, count = key[1], str(key[2]), key[4]
    last = kind.path.rpartition(".")[2] if isinstance(kind, Name) else ""
    if last not in _STORAGES or not _natural((count,)):
        raise MalformedError(f"a storage of type {last or type(kind).__name__!r}")
    whole = Storage(name, _STORAGES[last], count)
    view = key[5] if len(key) == 6 else None
    if view is None:
        return whole
    if not isinstance(view, tuple) or len(view) != 3 or not _natural(view[1:]):
        raise MalformedError("a view of a storage that cannot be")
    return replace(whole, start=view[1], count=view[2])


def _call(name: str, arguments: tuple[Any, ...]) -> Any:
    """Results of the calls that torch.save writes; None for others."""
    if name in _ORDERED:
        return _ordered(arguments)
    if name == "torch.Size":
        return tuple(arguments[0]) if arguments and isinstance(arguments[0], list | tuple) else None
    if name in ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"):
        return _tensor(*arguments[:4], metadata=arguments[6:7])
    if name == "torch._utils._rebuild_tensor_v3" and len(arguments) > 6:
        dtype = arguments[6].path if isinstance(arguments[6], Name) else ""
        if dtype not in _DTYPES:
            raise MalformedError(f"a tensor of type {dtype!r}")
        return _tensor(*arguments[:4], metadata=arguments[7:8], dtype=_DTYPES[dtype])
    if name in _PARAMETERS:
        return arguments[0] if arguments and isinstance(arguments[0], TensorRecord) else None
    if name == _WRAPPED and len(arguments) >= 3:
        return _wrapped(*arguments[:3])
    if name in _FAULTS:
        return TensorRecord((), torch.float32, fault=_FAULTS[name])
    return None


def _wrapped(made: Any, kind: Any, arguments: Any) -> Any:
    if not isinstance(made, Name) or not isinstance(kind, Name) or not isinstance(arguments, tuple):
        raise MalformedError("a tensor of no type")
    if kind.path.startswith("torch.distributed"):
        return TensorRecord((), torch.float32, fault=_FAULTS[_DTENSOR])
    if kind.path not in _PLAIN_TYPES:
        return Opaque(kind.path)
    return _call(made.path, arguments)


def _ordered(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    if not arguments:
        return {}
    made: dict[Any, Any] = {}
    for name, value in arguments[0].items() if isinstance(arguments[0], dict) else arguments[0]:
        if isinstance(name, tuple):
            raise MalformedError("a name that is no text")
        made[name] = value
    return made


def _tensor(
    storage: Any = None,
    offset: Any = 0,
    shape: Any = (),
    stride: Any = (),
    *,
    metadata: Sequence[Any] = (),
    dtype: torch.dtype | None = None,
) -> TensorRecord:
    numbers = isinstance(shape, tuple) and isinstance(stride, tuple) and len(shape) == len(stride)
    if not isinstance(storage, Storage) or not numbers or not _natural((offset, *shape, *stride)):
        raise MalformedError("a tensor whose shape cannot be")
    if len(shape) > _DIMENSIONS or math.prod(max(n, 1) for n in shape) > _NUMBERS:
        raise MalformedError("a tensor whose shape cannot be")
    if any(metadata):
        return TensorRecord(shape, storage.dtype, fault="conjugate or negative; save its clone()")
    dtype = dtype or storage.dtype
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride)) + 1
    if 0 not in shape and last * dtype.itemsize > storage.count * storage.dtype.itemsize:
        raise MalformedError(f"a tensor of shape {shape} that its storage cannot hold")
    return TensorRecord(shape, dtype, stride, offset, storage)


def legacy_tensor(value: Any) -> Any:
    """The record of a tensor of torch < 0.2, an object with the state (storage, offset, shape,
    stride); other values are returned unchanged."""
    if isinstance(value, Opaque) and value.name.startswith("torch.") and "Tensor" in value.name:
        state = value.state
        if isinstance(state, tuple) and len(state) == 4 and isinstance(state[0], Storage):
            return _tensor(*state)
    return value


def _natural(numbers: Sequence[Any]) -> bool:
    """Whether all are integers in the range of file sizes."""
    return all(type(number) is int and 0 <= number < 1 << 48 for number in numbers)
