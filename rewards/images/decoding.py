"""Decodes an image as 8-bit RGB.

As FID tools do, with Pillow's `convert("RGB")`: no rotation by EXIF, alpha dropped. Except modes
that this conversion destroys: it clips 16-bit grey at 255 and turns floats in [0, 1] black.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from cluster.errors import TesseraError
from cluster.model_files.file_kinds import FileKind, described, file_kind
from cluster.program.streams import escaped
from rewards.images.class_labels import ClassLabels

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000")
NEWER_FORMATS = ("QOI", "AVIF")  # not in every Pillow
BY_NAME_ALONE = {".tga": "TGA"}  # has no magic number: any file could be one
SUFFIXES = frozenset(
    (
        *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".bmp", ".dib"),
        *(".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".jp2", ".j2k", ".j2c"),
        *(".jpc", ".jpf", ".jpx", ".avif", ".avifs", ".qoi", ".tga", ".heic", ".heif"),
    )
)
"""Files of these names are images; one that cannot be read is an error."""
ALPHA = "transparent pixels: alpha dropped, as the FID tools do"
FIRST = "several pictures in one file: the first is used"
DEEP = "more than 8 bits a channel: the upper 8 are used"
TIFF_BITS, TIFF_PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0


@dataclass(frozen=True)
class Loaded:
    """An image, or why it could not be read."""

    name: str
    pixels: np.ndarray | None
    """(H, W, 3) uint8"""
    error: str = ""
    notes: tuple[str, ...] = ()
    """Parts of the image that were dropped: `ALPHA`, `FIRST`, `DEEP`."""


class ImageSource(Protocol):
    """Numbered images."""

    @property
    def fingerprint(self) -> str:
        """Digest of the list of images, the same on every machine."""
        ...

    @property
    def remarks(self) -> tuple[str, ...]:
        """Lines about what is read and what is left out."""
        ...

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> Iterator[Loaded]:
        """Images start..stop-1, in order."""
        ...

    def classes(self, names: tuple[str, ...] = ()) -> ClassLabels:
        """Class of every image.

        Args:
            names: of all classes in the order of their numbers; empty: the source's order.

        Raises:
            DataError: no classes, or ambiguous ones.
        """
        ...


class _UnusableError(TesseraError):
    """An image whose conversion would change what it shows."""


def decode(name: str, data: bytes | Path) -> Loaded:
    """Decode an image; see the module."""
    name = escaped(name)
    suffix = os.path.splitext(name)[1].lower()
    try:
        with Image.open(
            io.BytesIO(data) if isinstance(data, bytes) else data, formats=_formats(suffix)
        ) as image:
            notes = (FIRST,) if getattr(image, "is_animated", False) else ()
            pixels, more = _rgb(image)
            return Loaded(name, pixels, notes=(*notes, *more))
    except _UnusableError as error:
        return Loaded(name, None, str(error))
    except Exception as error:  # decoders raise anything for a damaged file
        reason = f"{type(error).__name__}: {error}"
        if suffix in (".heic", ".heif"):
            reason = "HEIC is not read: convert it"
        elif isinstance(error, UnidentifiedImageError) and isinstance(data, Path):
            reason = f"no image that Pillow reads, but {_other(data)}"
        return Loaded(name, None, escaped(reason))


def _other(file: Path) -> str:
    """The kind of a file that is not a readable image."""
    try:
        image = file_kind(file) is FileKind.IMAGE
        return "one of another kind, or damaged: convert it" if image else described(file)
    except OSError as error:
        return str(error)


def _rgb(image: Image.Image) -> tuple[np.ndarray, tuple[str, ...]]:
    """(H, W, 3) uint8, and the dropped parts."""
    if image.mode.startswith("I") and _sixteen_bits(image):
        grey = _upper_bits(image)
        return np.repeat(grey[..., None], 3, axis=-1), (DEEP,)
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        kind = "floating-point" if image.mode == "F" else "32-bit or signed"
        raise _UnusableError(f"{kind} grey values without a known white: write it with 8 bits")
    notes = []
    if any(";16" in str(tile[3]) for tile in getattr(image, "tile", ())):
        notes.append(DEEP)
    if _transparent(image):
        notes.append(ALPHA)
    return np.asarray(image.convert("RGB")), tuple(notes)


def _sixteen_bits(image: Image.Image) -> bool:
    """Whether values are 0..65535: always in PNG and PGM; TIFF may have 32 bits or a sign."""
    return image.mode.startswith("I;16") or image.format in ("PNG", "PPM", "JPEG2000")


def _upper_bits(image: Image.Image) -> np.ndarray:
    """(H, W) uint8 of 16-bit grey, as Pillow reads 16-bit colour; restores 8-bit images that were
    written with 16 bits (times 256 or 257)."""
    bits, inverted = 16, False
    if image.format == "TIFF":
        tags: Any = image.tag_v2  # type: ignore[attr-defined]
        bits = int(tags.get(TIFF_BITS, (16,))[0])
        inverted = tags.get(TIFF_PHOTOMETRIC) == WHITE_IS_ZERO
    values = np.asarray(image).astype(np.int64)
    grey = (values >> (bits - 8)).clip(0, 255).astype(np.uint8)
    return 255 - grey if inverted else grey


def _transparent(image: Image.Image) -> bool:
    if "transparency" in image.info:
        return True
    if image.mode not in ("RGBA", "LA", "PA"):
        return False
    low, _ = image.getchannel("A").getextrema()
    return low < 255  # type: ignore[operator]


@functools.lru_cache(maxsize=8)
def _formats(suffix: str) -> list[str]:
    """Formats that Pillow may try: no vector formats, which can run programs."""
    Image.init()
    wanted = (*FORMATS, *NEWER_FORMATS, BY_NAME_ALONE.get(suffix, ""))
    return [name for name in wanted if name in Image.OPEN]


def digest(data: bytes) -> str:
    """SHA-256 of some bytes, 16 hex digits."""
    return hashlib.sha256(data).hexdigest()[:16]
