"""Sources of real images: a folder, Parquet files, or an array of samples.

A source can be pickled: it opens its files where it reads them. It holds only the images that are
being read.
"""

from __future__ import annotations

import math
import os
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from cluster.errors import DataError
from cluster.io.checksum import DAMAGED_ARRAYS
from cluster.io.paths import expand_user
from cluster.model_files.file_kinds import FileKind, described, file_kind, presumed_kind
from cluster.model_files.tensors import locate
from cluster.program.streams import escaped
from rewards.images.class_labels import ClassLabels
from rewards.images.decoding import ImageSource, Loaded, digest
from rewards.images.folder import FolderImages, advice, shortened, walk
from rewards.images.parquet import ParquetImages, check_indices, holds_images

SAMPLES = "arr_0"  # as the ADM evaluator's batches name images and classes
CLASSES = "arr_1"
CHUNK = 1 << 20  # bytes of a read
EXPECTED = "a folder of images, a Parquet file or a folder of them, an .npz or an .npy file"


def open_source(images: str, image_column: str = "", label_column: str = "") -> ImageSource:
    """The source behind a path.

    Args:
        images: a folder of images, a Parquet file or a folder of them, or an .npz or .npy file.
        image_column: of Parquet files; empty finds the only one that holds encoded images.
        label_column: of Parquet files; empty takes "label".

    Raises:
        CheckpointError, DataError: missing, or without images.
    """
    source = _opened(images, image_column, label_column)
    column = image_column or label_column
    if column and not isinstance(source, ParquetImages):
        raise DataError(
            f"{escaped(images)}: column {column!r} is of Parquet files, which it is not"
        )
    return source


def _opened(images: str, image_column: str, label_column: str) -> ImageSource:
    place = expand_user(images)
    if place.is_dir():
        return _folder(place, image_column, label_column)
    locate(place)  # a better error, if there is no such file
    kind = presumed_kind(place)
    if kind is FileKind.PARQUET:
        return ParquetImages([place], image_column, label_column)
    if kind in (FileKind.NPZ, FileKind.NPY, FileKind.CUT_ZIP):
        samples = SampleImages(place)
        samples.verify()
        return samples
    if kind is FileKind.IMAGE:
        raise DataError(f"{escaped(images)}: one image: name the folder that holds them all")
    raise DataError(f"{escaped(images)}: expected {EXPECTED}, found {described(place)}")


def _folder(root: Path, image_column: str, label_column: str) -> ImageSource:
    contents = walk(root)
    plain = list[str]()  # tables of metadata
    if contents.images:
        plain = [name for name in contents.parquet if not holds_images(root / name)]
    elif (
        not image_column
        and advice(contents.left_out)
        and not any(holds_images(root / name) for name in contents.parquet)
    ):
        plain = contents.parquet
    contents.parquet = [name for name in contents.parquet if name not in plain]
    contents.left_out = sorted(
        [*contents.left_out, *(f"{name} (a Parquet file without images)" for name in plain)]
    )
    if contents.images and contents.parquet:
        raise DataError(
            f"{escaped(root)}: {len(contents.images)} images ({shortened([*contents.images])}) "
            f"and {len(contents.parquet)} Parquet files ({shortened(contents.parquet)}): which are "
            "meant? Name a folder that holds the one kind alone, or a Parquet file"
        )
    if contents.parquet:
        files = sorted(root / name for name in contents.parquet)
        return ParquetImages(files, image_column, label_column, contents.remarks())
    return FolderImages(root, contents)


@dataclass
class SampleImages:
    """An array (N, H, W, 3) uint8: an .npy file, or `arr_0` of an .npz file with classes in
    `arr_1`, as for the ADM evaluator. Read image by image, also if compressed."""

    path: Path
    _shape: tuple[int, ...] = field(init=False)
    _offset: int = field(init=False)
    """Offset of the data in the (unpacked) array file."""
    _size: int = field(init=False)
    """Bytes of the (unpacked) array file."""
    _single: bool = field(init=False)
    """An .npy file, by its content."""
    _file: IO[bytes] | None = field(init=False, default=None)
    remarks: tuple[str, ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        try:
            self._single = file_kind(self.path) is FileKind.NPY
            with self._open() as file:
                self._shape, dtype = read_header(file)
                self._offset = file.tell()
            self._size = size = self.path.stat().st_size
            if not self._single:
                with zipfile.ZipFile(self.path) as archive:
                    self._size = archive.getinfo(f"{SAMPLES}.npy").file_size
        except KeyError:
            with zipfile.ZipFile(self.path) as archive:
                found = [name.removesuffix(".npy") for name in archive.namelist()]
            what = f"needs an array {SAMPLES!r} of images, found {found}"
            if "mu" in found:
                what += (
                    ": these are moments of features, not images; they belong in "
                    "rewards.loo_fid.reference (or seed_from)"
                )
            raise DataError(f"{self.path}: {what}") from None
        except DAMAGED_ARRAYS as error:
            raise self._damaged(error) from error
        of_images = len(self._shape) == 4 and self._shape[-1] == 3 and min(self._shape) > 0
        if dtype != np.uint8 or not of_images:
            raise DataError(
                f"{escaped(self.path)}: expected images (N, H, W, 3) of uint8, found {dtype} of "
                f"shape {self._shape}{_conversion(self._shape, dtype)}"
            )
        self.fingerprint = digest(os.fsencode(f"{self.path.name} {self._shape} {size}"))

    def __len__(self) -> int:
        return self._shape[0]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None}  # another process opens it for itself

    def read(self, start: int, stop: int) -> Iterator[Loaded]:
        each = math.prod(self._shape[1:])
        for index in range(start, min(stop, len(self))):
            data = self._bytes(index, each) if each <= self._size else b""
            if len(data) < each:
                raise DataError(
                    f"{escaped(self.path)}: cut off: {len(self)} images announced, {index} "
                    "there: fetch or write it again"
                )
            pixels = np.frombuffer(data, np.uint8).reshape(self._shape[1:])
            yield Loaded(escaped(f"{self.path} image {index}"), pixels)

    def verify(self) -> None:
        """Compare all images with the archive's checksum, which single reads do not.

        Raises:
            DataError: they are damaged.
        """
        if self._single:
            return
        try:
            with zipfile.ZipFile(self.path) as file, file.open(f"{SAMPLES}.npy") as member:
                while member.read(CHUNK):
                    pass
        except DAMAGED_ARRAYS as error:
            raise self._damaged(error) from error

    def _bytes(self, index: int, each: int) -> bytes:
        """Bytes of an image; fewer at the end of the file."""
        try:
            if self._file is None:
                self._file = self._open()
            if self._file.tell() != (at := self._offset + index * each):
                self._file.seek(at)  # forwards, also in a compressed member
            return self._file.read(each)
        except DAMAGED_ARRAYS as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> DataError:
        return DataError(
            f"{escaped(self.path)}: not a readable array of images ({error}): fetch or write it "
            "again"
        )

    @property
    def random_access(self) -> bool:
        """Whether an image is read without those before it: not if compressed."""
        try:
            if self._single:
                return True
            with zipfile.ZipFile(self.path) as archive:
                return archive.getinfo(f"{SAMPLES}.npy").compress_type == zipfile.ZIP_STORED
        except DAMAGED_ARRAYS as error:
            raise self._damaged(error) from error

    @property
    def has_classes(self) -> bool:
        """Whether there is an array of classes, sound or not."""
        if self._single:
            return False
        try:
            with zipfile.ZipFile(self.path) as archive:
                return f"{CLASSES}.npy" in archive.namelist()
        except DAMAGED_ARRAYS as error:
            raise self._damaged(error) from error

    def classes(self, names: tuple[str, ...] = ()) -> ClassLabels:
        if self._single:
            raise DataError(f"{self.path}: an .npy file has no classes: use an .npz with {CLASSES}")
        try:
            with np.load(self.path, allow_pickle=False) as file:
                found, values = file.files, file.get(CLASSES)
        except DAMAGED_ARRAYS as error:
            raise self._damaged(error) from error
        where = escaped(self.path)
        if values is None:
            raise DataError(f"{where}: no classes, array {CLASSES!r}; found {found}")
        if values.shape != (len(self),) or values.dtype.kind not in "iu":
            raise DataError(
                f"{where}: {CLASSES} must hold ({len(self)},) integers, found {values.dtype} "
                f"of shape {values.shape}"
            )
        if values.max() > np.iinfo(np.int64).max:
            raise DataError(f"{where}: {CLASSES}: {values.max()} is no class")
        indices = values.astype(np.int64)
        check_indices(indices, f"{where}: {CLASSES}")
        if names and indices.max() >= len(names):
            raise DataError(f"{where}: class {indices.max()}, but --class-names has {len(names)}")
        return ClassLabels(indices, names)

    def _open(self) -> IO[bytes]:
        """The array file, at its start."""
        if self._single:
            return self.path.open("rb")
        archive = zipfile.ZipFile(self.path)
        member = archive.getinfo(f"{SAMPLES}.npy")
        if member.compress_type != zipfile.ZIP_STORED:
            return archive.open(member)
        # Stored: read the archive itself, where seeking is cheap. The member begins after a local
        # header of 30 bytes, its name and an extra field (APPNOTE.TXT 4.3.7).
        archive.close()
        file = self.path.open("rb")
        file.seek(member.header_offset + 26)
        file.seek(member.header_offset + 30 + sum(struct.unpack("<HH", file.read(4))))
        return file


def array_of_images(path: Path) -> bool:
    """Whether an .npy file has the four dimensions of images."""
    try:
        with path.open("rb") as file:
            return len(read_header(file, fortran=True)[0]) == 4
    except DAMAGED_ARRAYS:
        return True  # an error when the images are read


def _conversion(shape: tuple[int, ...], dtype: np.dtype) -> str:
    """How to convert an array to images; empty if unknown."""
    if len(shape) == 2:
        return ": are these features, (N, D)?"
    steps = []
    if len(shape) == 4 and shape[1] in (1, 3, 4) and shape[-1] not in (1, 3, 4):
        steps.append("x.transpose(0, 2, 3, 1) of channels first")
    if len(shape) == 3 or (len(shape) == 4 and 1 in (shape[1], shape[-1])):
        steps.append("np.repeat(x.reshape(N, H, W, 1), 3, -1) of grey")
    if len(shape) == 4 and shape[-1] == 4:
        steps.append("x[..., :3] of RGBA")
    if dtype.kind == "f":
        steps.append("(255 * x).round().astype(np.uint8) of values in [0, 1]")
    elif dtype == np.uint16:
        steps.append("(x >> 8).astype(np.uint8) of values up to 65535")
    elif dtype.kind in "iu" and dtype != np.uint8:
        steps.append("x.astype(np.uint8) of values in 0..255")
    return f": write it with {', '.join(steps)}" if steps else ""


def read_header(file: IO[bytes], *, fortran: bool = False) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of an .npy file at its start.

    Args:
        fortran: accept Fortran order.

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
