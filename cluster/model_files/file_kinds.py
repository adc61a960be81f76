"""Recognises kinds of files by content, since names are unreliable: a `model.pt` may be a web page.
The suffix decides only where the content is ambiguous.
"""

from __future__ import annotations

import enum
import os
import re
import struct
import zipfile
from pathlib import Path

HEAD = 4096  # bytes that are read


class FileKind(enum.Enum):
    """Kinds of files, each with its name in messages."""

    EMPTY = "an empty file"
    HTML = "a web page"
    LFS_POINTER = "a Git LFS pointer"
    SAFETENSORS = "a safetensors file"
    TORCH = "a PyTorch file"
    """torch.save's zip archive."""
    TORCH_LEGACY = "a PyTorch file of the format before torch 1.6"
    TORCHSCRIPT = "a TorchScript archive"
    PICKLE = "a pickle"
    NPZ = "an .npz file"
    NPY = "an .npy file"
    PARQUET = "a Parquet file"
    ARROW = "an Arrow file"
    """IPC, as a file (Feather) or a stream (the datasets library's `save_to_disk`)."""
    IMAGE = "an image"
    HDF5 = "an HDF5 file"
    GGUF = "a GGUF file"
    GZIP = "a gzip file"
    ZIP = "a zip archive"
    CUT_ZIP = "a zip archive that was cut off"
    TAR = "a tar archive"
    ARCHIVE = "an archive"
    """7z, xz, bzip2, zstd, RAR."""
    PDF = "a PDF"
    TEXT = "a text file"
    BINARY = "a binary file of a kind that is not known here"


REMEDIES: dict[FileKind, str] = {
    FileKind.EMPTY: "fetch it again",
    FileKind.HTML: "the download went to a page about the file; fetch the file itself",
    FileKind.LFS_POINTER: "run `git lfs pull` where it came from, or fetch the file itself",
    FileKind.CUT_ZIP: "it is not whole; fetch it again",
    FileKind.GZIP: "unpack it first",
    FileKind.ZIP: "unpack it first",
    FileKind.TAR: "unpack it first",
    FileKind.ARCHIVE: "unpack it first",
    FileKind.ARROW: "write it as Parquet: datasets.load_from_disk(...).to_parquet(...)",
    FileKind.PICKLE: "pickled Python objects are not read: they can run any program",
}
"""What to do about a file of a kind that cannot be read."""

_STARTS: tuple[tuple[bytes, FileKind], ...] = (
    (b"version https://git-lfs", FileKind.LFS_POINTER),
    (b"\x93NUMPY", FileKind.NPY),
    (b"PAR1", FileKind.PARQUET),
    (b"ARROW1\x00\x00", FileKind.ARROW),
    (b"\x89HDF\r\n\x1a\n", FileKind.HDF5),
    (b"GGUF", FileKind.GGUF),
    (b"\x1f\x8b", FileKind.GZIP),
    (b"7z\xbc\xaf\x27\x1c", FileKind.ARCHIVE),
    (b"\xfd7zXZ\x00", FileKind.ARCHIVE),
    (b"BZh", FileKind.ARCHIVE),
    (b"\x28\xb5\x2f\xfd", FileKind.ARCHIVE),
    (b"Rar!\x1a\x07", FileKind.ARCHIVE),
    (b"%PDF-", FileKind.PDF),
    (b"\x89PNG\r\n\x1a\n", FileKind.IMAGE),
    (b"\xff\xd8\xff", FileKind.IMAGE),
    (b"GIF87a", FileKind.IMAGE),
    (b"GIF89a", FileKind.IMAGE),
    (b"II*\x00", FileKind.IMAGE),
    (b"MM\x00*", FileKind.IMAGE),
    (b"\x00\x00\x00\x0cjP  \r\n", FileKind.IMAGE),  # JPEG 2000
    (b"\xff\x4f\xff\x51", FileKind.IMAGE),
    (b"qoif", FileKind.IMAGE),
)
_SUFFIXES = {
    ".parquet": FileKind.PARQUET,
    ".npz": FileKind.NPZ,
    ".npy": FileKind.NPY,
    **dict.fromkeys((".pkl", ".pickle", ".p"), FileKind.PICKLE),  # protocol 0 has no mark
}
_PAGES = (b"<!doctype html", b"<html", b"<head", b"<script")
_BOMS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")
_TORCH_MAGIC = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")  # torch.serialization.MAGIC_NUMBER
_TAR_AT = 257
_BMP_HEADERS = (12, 40, 52, 56, 64, 108, 124)  # bytes, of its versions
_ARROW_STREAM = re.compile(rb"\xff{4}..\x00\x00\x10\x00\x00\x00", re.DOTALL)
"""Mark, length of the schema's message (below 64 KiB), its flatbuffer's usual root."""
_PNM = re.compile(
    rb"P[1-6]\s+(?:#[^\n]*\n\s*)*[0-9]+\s+(?:#[^\n]*\n\s*)*[0-9]+\s|P[fF]\s[0-9]+ [0-9]+\s"
)


def file_kind(path: str | os.PathLike[str]) -> FileKind:
    """The kind of an existing regular file.

    Reads the first few kilobytes, and the directory of a zip archive; nothing is unpickled.

    Raises:
        OSError: it cannot be read.
    """
    place = Path(path)
    with place.open("rb") as file:
        head = file.read(HEAD)
    if not head:
        return FileKind.EMPTY
    if head.startswith(b"PK\x03\x04") or head.startswith(b"PK\x05\x06"):
        return _archive(place)
    for start, kind in _STARTS:
        if head.startswith(start):
            return kind
    if image_head(head):
        return FileKind.IMAGE
    if _ARROW_STREAM.match(head):
        return FileKind.ARROW
    if head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] < 1 << 40:
        return FileKind.SAFETENSORS
    if head[:1] == b"\x80":
        # torch's legacy files are a series of pickles, of which the first is a magic number.
        return FileKind.TORCH_LEGACY if _TORCH_MAGIC in head[:32] else FileKind.PICKLE
    if head[_TAR_AT : _TAR_AT + 5] == b"ustar":
        return FileKind.TAR
    text = head.removeprefix(_BOMS[0]).lstrip().lower()
    if text.startswith(_PAGES) or (text.startswith(b"<?xml") and b"<html" in text):
        return FileKind.HTML
    if head.startswith(_BOMS) or not any(byte < 9 or 13 < byte < 27 for byte in head):
        return FileKind.TEXT
    # No magic number: pickles of protocol 0, files without their beginning.
    return FileKind.BINARY


def presumed_kind(path: str | os.PathLike[str]) -> FileKind:
    """As `file_kind`; by the suffix where the content is ambiguous."""
    kind = file_kind(path)
    if kind not in (FileKind.BINARY, FileKind.TEXT):
        return kind
    return _SUFFIXES.get(Path(path).suffix.lower(), kind)


def image_head(head: bytes) -> bool:
    """Whether some bytes are the beginning of an image."""
    if any(head.startswith(start) for start, kind in _STARTS if kind is FileKind.IMAGE):
        return True
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return True
    if head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis", b"heic", b"heix", b"mif1"):
        return True
    if head[:2] == b"BM" and len(head) >= 18:
        return struct.unpack("<I", head[14:18])[0] in _BMP_HEADERS
    return _PNM.match(head) is not None


def described(path: str | os.PathLike[str]) -> str:
    """The kind of a file and, if it cannot be read, what to do: "a web page; the download …". An
    unknown kind is described by its first bytes."""
    kind = file_kind(path)
    if kind is FileKind.BINARY:
        with Path(path).open("rb") as file:
            head = file.read(8)
        return f"a file that begins with {head!r}; is it whole, and is it the right one?"
    remedy = REMEDIES.get(kind)
    return f"{kind.value}; {remedy}" if remedy else kind.value


def _archive(place: Path) -> FileKind:
    try:
        with zipfile.ZipFile(place) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, struct.error, EOFError, RuntimeError):
        return FileKind.CUT_ZIP  # RuntimeError: a damaged number asks for another version of zip
    # torch puts everything below one folder, whose name is that of the file it first wrote.
    inside = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inside or any(part.startswith("code/") for part in inside):
        return FileKind.TORCHSCRIPT
    if "data.pkl" in inside:
        return FileKind.TORCH
    arrays = sum(name.endswith(".npy") for name in names)
    named = place.suffix.lower() == ".npz"
    if (arrays and (named or arrays == len(names))) or (named and not names):
        return FileKind.NPZ
    return FileKind.ZIP
