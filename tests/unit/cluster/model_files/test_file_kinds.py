"""What a file is, by its content: names that lie, files that are cut."""

from __future__ import annotations

import io
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from cluster.model_files.file_kinds import FileKind, described, file_kind, presumed_kind

TENSORS = {"a": torch.ones(3)}


def _tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("a"), io.BytesIO())


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", b"1")


def _npz(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, mu=np.ones(3))


def _npy(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.ones(3))


def _image(format: str) -> Callable[[Path], None]:
    return lambda path: Image.new("RGB", (4, 4)).save(path, format=format)


def _bytes(data: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data) and None


WRITERS: dict[str, tuple[FileKind, Callable[[Path], object]]] = {
    "zip of torch": (FileKind.TORCH, lambda p: torch.save(TENSORS, p)),
    "legacy": (
        FileKind.TORCH_LEGACY,
        lambda p: torch.save(TENSORS, p, _use_new_zipfile_serialization=False),
    ),
    "script": (
        FileKind.TORCHSCRIPT,
        lambda p: torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(p)),
    ),
    "safetensors": (FileKind.SAFETENSORS, lambda p: save_file(TENSORS, p)),
    "safetensors with metadata": (
        FileKind.SAFETENSORS,
        lambda p: save_file(TENSORS, p, metadata={"format": "pt"}),
    ),
    "pickle": (FileKind.PICKLE, lambda p: p.write_bytes(pickle.dumps({"a": 1}))),
    "npz": (FileKind.NPZ, _npz),
    "npy": (FileKind.NPY, _npy),
    "parquet": (FileKind.PARQUET, lambda p: pq.write_table(pa.table({"a": [1]}), p)),
    "png": (FileKind.IMAGE, _image("PNG")),
    "jpeg": (FileKind.IMAGE, _image("JPEG")),
    "webp": (FileKind.IMAGE, _image("WEBP")),
    "gif": (FileKind.IMAGE, _image("GIF")),
    "tiff": (FileKind.IMAGE, _image("TIFF")),
    "tar": (FileKind.TAR, _tar),
    "zip": (FileKind.ZIP, _zip),
    "page": (FileKind.HTML, _bytes(b"\n <!DOCTYPE HTML><html>")),
    "page with a mark": (FileKind.HTML, _bytes(b"\xef\xbb\xbf<html lang='en'>")),
    "pointer": (FileKind.LFS_POINTER, _bytes(b"version https://git-lfs.github.com/spec/v1\n")),
    "empty": (FileKind.EMPTY, _bytes(b"")),
    "text": (FileKind.TEXT, _bytes("grün\n".encode())),
    "utf-16": (FileKind.TEXT, _bytes("a\n".encode("utf-16"))),
    "json": (FileKind.TEXT, _bytes(b'{"a": 1}')),
    "gguf": (FileKind.GGUF, _bytes(b"GGUF\x03\x00\x00\x00")),
    "hdf5": (FileKind.HDF5, _bytes(b"\x89HDF\r\n\x1a\n\x00")),
    "binary": (FileKind.BINARY, _bytes(b"\x00\x01\x02\x03")),
}


@pytest.mark.parametrize("name", ["any.pt", "any.safetensors", "any", "any.NPZ"])
@pytest.mark.parametrize("written", WRITERS)
def test_content_decides(tmp_path: Path, written: str, name: str) -> None:
    kind, write = WRITERS[written]
    write(tmp_path / name)
    assert file_kind(tmp_path / name) is kind


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.PARQUET", FileKind.PARQUET),
        ("a.npz", FileKind.NPZ),
        ("a.npy", FileKind.NPY),
        ("a.pickle", FileKind.PICKLE),
        ("a.pt", None),
    ],
)
def test_the_name_decides_where_the_content_leaves_it_open(
    tmp_path: Path, name: str, kind: FileKind | None
) -> None:
    path = tmp_path / name
    for written in ("text", "binary"):
        content, write = WRITERS[written]
        write(path)
        assert presumed_kind(path) is (kind or content)
    for written in ("parquet", "png", "safetensors", "empty"):
        content, write = WRITERS[written]
        write(path)
        assert presumed_kind(path) is content


@pytest.mark.parametrize("written", ["zip of torch", "npz", "zip"])
def test_an_archive_without_its_end_is_cut(tmp_path: Path, written: str) -> None:
    path = tmp_path / "x.pt"
    WRITERS[written][1](path)
    path.write_bytes(path.read_bytes()[:-30])
    assert file_kind(path) is FileKind.CUT_ZIP
    assert "not whole" in described(path)


def test_a_sentence_says_what_and_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    said = {}
    for written in ("page", "pointer", "empty", "pickle", "zip"):
        WRITERS[written][1](path)
        said[written] = described(path)
    assert "fetch the file itself" in said["page"]
    assert "git lfs pull" in said["pointer"]
    assert "fetch it again" in said["empty"]
    assert "can run any program" in said["pickle"]
    assert "unpack it" in said["zip"]
    assert len(set(said.values())) == len(said)
