"""Writers of sampled images: PNG files, a contact sheet, an .npz for evaluators.

Each takes images in batches, in order: 50,000 of 256x256 are 10 GB and never in memory at once.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import numpy as np
from PIL import Image

from cluster.errors import DataError
from cluster.messages import Condition

SMALLEST_CELL = 48  # pixels: small images are enlarged to be seen
MAX_ROWS = 16
MAX_COLUMNS = 16
GAP = 2
BACKGROUND = 32
WRITERS = 8  # threads: compressing a 256x256 PNG takes longer than a GPU takes to sample it


class NpzWriter:
    """Writes uint8 images to an .npz as the ADM evaluator reads it, batch by batch.

    `arr_0` is (N, H, W, 3) uint8, uncompressed; `arr_1` (N,) int64 the classes, if there are any.
    The file appears when it is complete, and not at all if the block raises.
    """

    def __init__(self, path: Path, num_images: int, labels: Sequence[int] | None = None) -> None:
        self._path, self._num_images, self._labels = path, num_images, labels
        self._partial = path.with_name(f".{path.name}.partial")
        self._written = 0
        self._array: IO[bytes] | None = None

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._zip = zipfile.ZipFile(self._partial, "w", zipfile.ZIP_STORED, allowZip64=True)
        return self

    def write(self, images: np.ndarray) -> None:
        """Append images (B, H, W, 3) uint8, all of one size."""
        if self._array is None:
            # the zip format must know before the first byte that it may exceed 4 GB
            self._array = self._zip.open("arr_0.npy", "w", force_zip64=True)
            shape = (self._num_images, *images.shape[1:])
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(self._array, header)
        self._array.write(np.ascontiguousarray(images).data)
        self._written += len(images)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._array is not None:
            self._array.close()
        try:
            if kind is None:
                self._finish()
            self._zip.close()
            if kind is None:
                os.replace(self._partial, self._path)
        finally:
            self._partial.unlink(missing_ok=True)

    def _finish(self) -> None:
        if self._written != self._num_images:
            raise DataError(
                f"{self._path}: {self._written} images written, expected {self._num_images}"
            )
        if self._labels is not None:
            with self._zip.open("arr_1.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asarray(self._labels, np.int64))


class PngWriter:
    """Writes one PNG per image: `000017_class0207.png` is image 17, of class 207,
    `000017_caption0003.png` of caption 3 (from 0), `000017.png` of the only or no caption."""

    def __init__(self, folder: Path, conditions: Sequence[Condition]) -> None:
        """Open a folder for PNG files.

        Args:
            conditions: image i shows number i mod len(conditions).
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._conditions = folder, conditions
        self._pool = ThreadPoolExecutor(min(WRITERS, os.cpu_count() or 1))
        self._written = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def write(self, images: np.ndarray) -> None:
        """Append images (B, H, W, 3) uint8; returns when they are written."""
        names = [self._name(self._written + offset) for offset in range(len(images))]
        list(self._pool.map(_save, images, [self._folder / name for name in names]))
        self._written += len(images)

    def _name(self, index: int) -> str:
        which = index % len(self._conditions)
        number = self._conditions[which].class_index
        if number is None and len(self._conditions) == 1:
            return f"{index:06d}.png"
        label = f"caption{which:04d}" if number is None else f"class{number:04d}"
        return f"{index:06d}_{label}.png"


def _save(image: np.ndarray, path: Path) -> None:
    Image.fromarray(image).save(path, compress_level=1)


class Grid:
    """Images of one size in rows and columns; small ones are enlarged."""

    def __init__(self, rows: int, columns: int, height: int, width: int, smallest: int) -> None:
        """Make an empty grid.

        Args:
            height, width: of an image, pixels.
            smallest: least side of a cell, pixels.
        """
        self._scale = max(1, -(-smallest // min(height, width)))
        self._height, self._width = height * self._scale, width * self._scale
        shape = (rows * (self._height + GAP) + GAP, columns * (self._width + GAP) + GAP, 3)
        self.pixels = np.full(shape, BACKGROUND, np.uint8)

    @property
    def cell(self) -> tuple[int, int]:
        """Width and height of an image with half of the gaps around it, pixels. The first one
        begins at (GAP / 2, GAP / 2)."""
        return self._width + GAP, self._height + GAP

    def put(self, row: int, column: int, image: np.ndarray) -> None:
        """Show an image (H, W, 3) uint8."""
        top = GAP + row * (self._height + GAP)
        left = GAP + column * (self._width + GAP)
        large = image.repeat(self._scale, 0).repeat(self._scale, 1)
        self.pixels[top : top + self._height, left : left + self._width] = large


class ContactSheet:
    """The first images of the first conditions, one row per condition."""

    def __init__(self, num_conditions: int, num_images: int) -> None:
        self._num_conditions = num_conditions
        self._rows = min(num_conditions, num_images, MAX_ROWS)
        self._columns = min(-(-num_images // num_conditions), MAX_COLUMNS)
        self._grid: Grid | None = None
        self._seen = 0

    def write(self, images: np.ndarray) -> None:
        """Append images (B, H, W, 3) uint8."""
        if self._grid is None:
            _, height, width, _ = images.shape
            self._grid = Grid(self._rows, self._columns, height, width, SMALLEST_CELL)
        for image in images:
            column, row = divmod(self._seen, self._num_conditions)
            self._seen += 1
            if row < self._rows and column < self._columns:
                self._grid.put(row, column, image)

    def save(self, path: Path) -> None:
        """Write the sheet, if there are images."""
        if self._grid is not None:
            Image.fromarray(self._grid.pixels).save(path)
