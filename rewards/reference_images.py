"""Real images for a reference, by number: a folder, Parquet files, or an array of samples.

Every source opens its files where it reads them, so it can be sent to another process. No source
ever holds more than a stretch of its images.
"""

from __future__ import annotations

import bisect
import hashlib
import io
import itertools
import os
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from PIL import Image

from cluster.errors import DataError
from cluster.paths import expanded
from cluster.sealing import DAMAGED_ARRAYS
from cluster.tensors import locate
from rewards.base import check_images

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
SAMPLES = "arr_0"  # as the ADM evaluator's batches name images and classes
CLASSES = "arr_1"


@dataclass(frozen=True)
class Loaded:
    """One image, or why it could not be read."""

    name: str
    pixels: np.ndarray | None
    """(H, W, 3) uint8"""
    error: str = ""


class ImageSource(Protocol):
    """Numbered images."""

    @property
    def fingerprint(self) -> str:
        """Digest of the list of images: the same list gives the same one anywhere."""
        ...

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> Iterator[Loaded]:
        """Images start..stop-1, in order."""
        ...

    def classes(self) -> np.ndarray:
        """Class of every image, (N,) int64.

        Raises:
            DataError: the source has none.
        """
        ...


def open_source(images: str, image_column: str = "", label_column: str = "") -> ImageSource:
    """The source behind a path.

    Args:
        images: a folder of images, a Parquet file or a folder of them, or an .npz or .npy file.
        image_column: of Parquet files; empty finds the only one that holds encoded images.
        label_column: of Parquet files; empty takes "label".

    Raises:
        CheckpointError, DataError: nothing there, or nothing that holds images.
    """
    place = expanded(images)
    if place.is_dir():
        parquet = sorted(place.rglob("*.parquet"))
        if parquet:
            return ParquetImages(parquet, image_column, label_column)
        return FolderImages(place)
    if place.suffix == ".parquet":
        return ParquetImages([locate(place)], image_column, label_column)
    if place.suffix in (".npz", ".npy"):
        return SampleImages(locate(place))
    locate(place)  # a better error, if there is no such file
    raise DataError(
        f"{images}: expected a folder of {', '.join(SUFFIXES)} files, .parquet, .npz or .npy"
    )


def decode(name: str, data: bytes | Path) -> Loaded:
    """An encoded image as RGB, as the FID tools load them: no rotation by EXIF, alpha dropped."""
    try:
        with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image:
            return Loaded(name, np.asarray(image.convert("RGB")))
    except Exception as error:  # what a damaged file makes of a decoder is anything
        return Loaded(name, None, f"{type(error).__name__}: {error}".replace("\n", " "))


class FolderImages:
    """Every image file below a folder, in the order of the paths; folders right below are classes,
    numbered in the order of their names, as ImageNet's are."""

    def __init__(self, root: Path) -> None:
        """
        Raises:
            DataError: no image below the folder.
        """
        self._root = root
        self._names = sorted(
            os.path.relpath(os.path.join(folder, name), root).replace(os.sep, "/")
            for folder, _, files in os.walk(root, followlinks=True)
            for name in files
            if name.lower().endswith(SUFFIXES) and not name.startswith(".")
        )
        if not self._names:
            raise DataError(f"{root}: no {', '.join(SUFFIXES)} files in it or below")
        lines = (f"{name} {(root / name).stat().st_size}" for name in self._names)
        self.fingerprint = _digest(os.fsencode("\n".join(lines)))

    def __len__(self) -> int:
        return len(self._names)

    def read(self, start: int, stop: int) -> Iterator[Loaded]:
        for name in self._names[start:stop]:
            yield decode(str(self._root / name), self._root / name)

    def classes(self) -> np.ndarray:
        folders = [name.partition("/")[0] if "/" in name else "" for name in self._names]
        if "" in folders:
            stray = self._names[folders.index("")]
            raise DataError(
                f"{self._root}: classes are the folders right below it, but {stray} is in none"
            )
        return _numbered(folders)


@dataclass(frozen=True)
class _RowGroup:
    first: int
    end: int
    """Rows first..end-1 of all files together."""
    file: Path
    file_first: int
    """Number of the file's first row."""
    index: int


class ParquetImages:
    """Rows of Parquet files with encoded images, as Hugging Face datasets are stored: a column of
    {bytes, path} or of binary. One row group at a time is in memory."""

    def __init__(self, files: list[Path], image_column: str = "", label_column: str = "") -> None:
        """
        Raises:
            DataError: not Parquet, without rows, or without such a column.
        """
        self._files, self._label = files, label_column
        self._groups: list[_RowGroup] = []
        described, end = [], 0
        for number, file in enumerate(files):
            parquet = _parquet(file)
            if number == 0:
                self._column = _image_column(file, parquet.schema_arrow, image_column)
            metadata, start = parquet.metadata, end
            for index in range(metadata.num_row_groups):
                first, end = end, end + metadata.row_group(index).num_rows
                self._groups.append(_RowGroup(first, end, file, start, index))
            described.append(f"{file.name} {metadata.num_rows} {file.stat().st_size}")
        if not end:
            raise DataError(f"{files[0]}: no rows")
        self._count = end
        self.fingerprint = _digest(os.fsencode("\n".join([self._column, *described])))
        self._held: tuple[_RowGroup, list[Any]] | None = None

    def __len__(self) -> int:
        return self._count

    def read(self, start: int, stop: int) -> Iterator[Loaded]:
        index = bisect.bisect_right(self._groups, start, key=lambda group: group.end)
        for group in itertools.takewhile(lambda g: g.first < stop, self._groups[index:]):
            rows = self._rows(group)
            for row in range(max(start, group.first), min(stop, group.end)):
                name = f"{group.file} row {row - group.file_first}"
                cell = rows[row - group.first]
                data = cell.get("bytes") if isinstance(cell, dict) else cell
                if not data:
                    yield Loaded(name, None, f"no bytes in column {self._column!r}")
                else:
                    yield decode(name, data)

    def classes(self) -> np.ndarray:
        name, values = self._label or "label", list[Any]()
        for file in self._files:
            parquet = _parquet(file)
            columns = parquet.schema_arrow.names
            if name not in columns:
                raise DataError(
                    f"{file}: no column {name!r} of labels: name it with --label-column, found "
                    f"{columns}"
                )
            values += parquet.read(columns=[name]).column(name).to_pylist()
        if all(isinstance(value, int) for value in values):
            return _indices(values, f"{self._files[0]}: column {name!r}")
        if all(isinstance(value, str) for value in values):
            return _numbered(values)
        raise DataError(f"{self._files[0]}: column {name!r} must hold integers or names, all rows")

    def _rows(self, group: _RowGroup) -> list[Any]:
        if self._held is None or self._held[0] != group:
            table = _parquet(group.file).read_row_group(group.index, columns=[self._column])
            self._held = group, table.column(self._column).to_pylist()
        return self._held[1]


@dataclass
class SampleImages:
    """An array (N, H, W, 3) uint8: an .npy file, or `arr_0` of an .npz file with classes in
    `arr_1`, as the ADM evaluator reads them. Compressed or not, it is read in stretches."""

    path: Path
    _shape: tuple[int, ...] = field(init=False)
    _offset: int = field(init=False)
    """Where the numbers begin in the (unpacked) array file."""
    _file: IO[bytes] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        try:
            with self._open() as file:
                self._shape, dtype = read_header(file)
                self._offset = file.tell()
            size = self.path.stat().st_size
        except KeyError:
            with zipfile.ZipFile(self.path) as archive:
                found = [name.removesuffix(".npy") for name in archive.namelist()]
            raise DataError(
                f"{self.path}: needs an array {SAMPLES!r} of images, found {found}"
            ) from None
        except DAMAGED_ARRAYS as error:
            raise DataError(f"{self.path}: not a readable array of images ({error})") from error
        if dtype != np.uint8 or len(self._shape) != 4 or self._shape[-1] != 3 or not self._shape[0]:
            raise DataError(
                f"{self.path}: expected images (N, H, W, 3) of uint8, found {dtype} of shape "
                f"{self._shape}"
            )
        self.fingerprint = _digest(os.fsencode(f"{self.path.name} {self._shape} {size}"))

    def __len__(self) -> int:
        return self._shape[0]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None}  # another process opens it for itself

    def read(self, start: int, stop: int) -> Iterator[Loaded]:
        if self._file is None:
            self._file = self._open()
        each = int(np.prod(self._shape[1:]))
        self._file.seek(self._offset + start * each)  # forwards, also in a compressed member
        for index in range(start, min(stop, len(self))):
            data = self._file.read(each)
            if len(data) < each:
                raise DataError(
                    f"{self.path}: cut off: {len(self)} images announced, {index} there: fetch or "
                    "write it again"
                )
            pixels = np.frombuffer(data, np.uint8).reshape(self._shape[1:])
            yield Loaded(f"{self.path} image {index}", pixels)

    def classes(self) -> np.ndarray:
        if self.path.suffix == ".npy":
            raise DataError(f"{self.path}: an .npy file has no classes: use an .npz with {CLASSES}")
        with np.load(self.path, allow_pickle=False) as file:
            if CLASSES not in file:
                raise DataError(f"{self.path}: no classes, array {CLASSES!r}; found {file.files}")
            values = file[CLASSES]
        if values.shape != (len(self),) or values.dtype.kind not in "iu":
            raise DataError(
                f"{self.path}: {CLASSES} must hold ({len(self)},) integers, found {values.dtype} "
                f"of shape {values.shape}"
            )
        return _indices(values, f"{self.path}: {CLASSES}")

    def _open(self) -> IO[bytes]:
        """The array file, at its beginning."""
        if self.path.suffix == ".npy":
            return self.path.open("rb")
        archive = zipfile.ZipFile(self.path)
        member = archive.getinfo(f"{SAMPLES}.npy")
        if member.compress_type != zipfile.ZIP_STORED:
            return archive.open(member)
        # Not packed: read the archive itself, where seeking costs nothing. The member begins after
        # a local header of 30 bytes, its name and an extra field (APPNOTE.TXT 4.3.7).
        archive.close()
        file = self.path.open("rb")
        file.seek(member.header_offset + 26)
        file.seek(member.header_offset + 30 + sum(struct.unpack("<HH", file.read(4))))
        return file


def stack(images: list[np.ndarray]) -> Iterator[tuple[list[int], np.ndarray]]:
    """Images of one size together: their places and (M, H, W, 3) uint8."""
    places: dict[tuple[int, ...], list[int]] = {}
    for place, pixels in enumerate(images):
        places.setdefault(pixels.shape, []).append(place)
    for found in places.values():
        batch = np.stack([images[place] for place in found])
        check_images(batch)
        yield found, batch


def read_header(file: IO[bytes], *, fortran: bool = False) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of the array file that begins here.

    Args:
        fortran: an array in Fortran order will do.

    Raises:
        ValueError: not an array file, or not in C order.
    """
    version = np.lib.format.read_magic(file)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read is None:
        raise ValueError(f"array file format {version}")
    shape, in_columns, dtype = read(file)
    if in_columns and not fortran:
        raise ValueError("the array is in Fortran order: write it with numpy.ascontiguousarray")
    return shape, dtype


def _parquet(file: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(file)
    except UnicodeError as error:
        raise DataError(f"{file}: pyarrow reads no file of such a name ({error})") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{file}: not a whole Parquet file ({error}): fetch it again") from error


def _image_column(file: Path, schema: Any, wanted: str) -> str:
    import pyarrow as pa

    def holds_images(kind: Any) -> bool:
        if pa.types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    found = [item.name for item in schema if holds_images(item.type)]
    if wanted and wanted not in found:
        raise DataError(
            f"{file}: column {wanted!r} holds no encoded images ({{bytes, path}} or binary); "
            f"those that do: {found}, of {schema.names}"
        )
    if not wanted and len(found) != 1:
        raise DataError(
            f"{file}: {len(found)} columns could hold encoded images, {found} of {schema.names}: "
            "name one with --image-column"
        )
    return wanted or found[0]


def _numbered(names: list[str]) -> np.ndarray:
    return np.unique(np.array(names), return_inverse=True)[1].astype(np.int64)


def _indices(values: Any, where: str) -> np.ndarray:
    indices = np.asarray(values, np.int64)
    if indices.min() < 0:
        raise DataError(f"{where}: classes are numbered from 0, found {indices.min()}")
    return indices


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
