"""Where real images come from: folders, Parquet files, arrays."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import DataError
from rewards.images.sources import open_source
from tests.unit.reference_sources import CLASSES, IMAGES, SOURCES, make_source, parquet, png


@pytest.mark.parametrize("kind", SOURCES)
def test_sources_are_read_from_anywhere(kind: str, tmp_path: Path) -> None:
    source = open_source(str(make_source(kind, tmp_path)))
    again = pickle.loads(pickle.dumps(source))  # as it reaches a process
    assert again.fingerprint == source.fingerprint
    for start, stop in ((25, 30), (3, 19), (0, 1), (28, 40)):
        pixels = [image.pixels for image in again.read(start, stop)]
        np.testing.assert_array_equal(np.stack(pixels), IMAGES[start:stop])


@pytest.mark.parametrize("kind", ["folder", "parquet", "npy"])
def test_names_that_are_not_utf_8_are_read(kind: str, tmp_path: Path) -> None:
    name, other = os.fsdecode(b"caf\xe9"), os.fsdecode(b"caf\xe8")
    fingerprints = []
    for folder in (tmp_path / name, tmp_path / other):
        folder.mkdir()
        file = folder / f"{folder.name}.{'png' if kind == 'folder' else kind}"
        if kind == "folder":
            file.write_bytes(png(IMAGES[0]))
        elif kind == "npy":
            np.save(file, IMAGES[:1])
        else:
            parquet(tmp_path / "p.parquet", [png(IMAGES[0])])
            (tmp_path / "p.parquet").rename(file)
        if kind == "parquet":
            with pytest.raises(DataError, match="pyarrow reads no file of such a name"):
                open_source(str(folder))
            return
        source = open_source(str(file if kind == "npy" else folder))
        (image,) = source.read(0, 1)
        np.testing.assert_array_equal(image.pixels, IMAGES[0])
        fingerprints.append(source.fingerprint)
    assert len(set(fingerprints)) == 2


def test_sources_that_hold_no_images_are_refused(tmp_path: Path) -> None:
    def npz(**arrays: np.ndarray) -> Path:
        np.savez(tmp_path / "s.npz", **arrays)
        return tmp_path / "s.npz"

    def table(**columns: list) -> Path:
        pq.write_table(pa.table(columns), tmp_path / "p.parquet")
        return tmp_path / "p.parquet"

    def raw(name: str, data: bytes) -> Path:
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    def array(name: str, values: np.ndarray) -> Path:
        np.save(tmp_path / name, values)
        return tmp_path / name

    cells = [png(IMAGES[0])]
    cases = [
        (lambda: npz(mu=np.zeros(3)), "", r"needs an array 'arr_0' of images, found \['mu'\]"),
        (lambda: npz(arr_0=np.zeros((2, 3, 4, 3))), "", "uint8, found float64 of shape"),
        (lambda: npz(arr_0=IMAGES[:0]), "", r"found uint8 of shape \(0, 3, 4, 3\)"),
        (lambda: raw("s.npz", b"PK"), "", "not a readable array of images"),
        (lambda: raw("s.npy", b"\x93NUMPY\x09\x00"), "", "array file format"),
        (lambda: array("f.npy", np.asfortranarray(IMAGES)), "", "in Fortran order"),
        (lambda: raw("p.parquet", b"PAR1"), "", "not a whole Parquet file .*: fetch it again"),
        (lambda: table(text=["a"]), "", r"no column of encoded images, .* found text \(string\)"),
        (lambda: table(a=cells, b=cells), "", "2 columns could hold .* name one with --image-col"),
        (lambda: table(a=cells, b=["x"]), "b", r"column 'b' holds no encoded images .*: \['a'\]"),
        (lambda: table(a=pa.array([], pa.binary())), "", "no rows"),
        (lambda: raw("images.tar", b"x"), "", "expected a folder of images, .* found a text file"),
        (lambda: table(a=[b"0123"]), "", r"column 'a' .* holds no .* begins with b'0123'"),
    ]
    for make, column, message in cases:
        with pytest.raises(DataError, match=message):
            open_source(str(make()), column)


def test_bad_classes_are_refused(tmp_path: Path) -> None:
    def classes(values: np.ndarray | None) -> np.ndarray:
        arrays = {} if values is None else {"arr_1": values}
        np.savez(tmp_path / "c.npz", arr_0=IMAGES, **arrays)
        return open_source(str(tmp_path / "c.npz")).classes()

    for values, message in {
        "none": "no classes, array 'arr_1'; found",
        "short": r"arr_1 must hold \(30,\) integers, found int64 of shape \(29,\)",
        "float": r"must hold \(30,\) integers, found float64",
        "negative": "classes are numbered from 0, found -1",
    }.items():
        made = {
            "none": None,
            "short": CLASSES[1:],
            "float": CLASSES / 1,
            "negative": CLASSES - 1,
        }[values]
        with pytest.raises(DataError, match=message):
            classes(made)

    cells = [png(pixels) for pixels in IMAGES[:2]]
    parquet(tmp_path / "p.parquet", cells, [1, None])
    with pytest.raises(DataError, match="column 'label' must hold integers or names, all rows"):
        open_source(str(tmp_path / "p.parquet")).classes()
    with pytest.raises(DataError, match=r"no column 'kind' of labels: .* found \['image', 'label'"):
        open_source(str(tmp_path / "p.parquet"), label_column="kind").classes()


def test_an_array_that_was_cut_off_is_named(tmp_path: Path) -> None:
    np.save(tmp_path / "s.npy", IMAGES)
    data = (tmp_path / "s.npy").read_bytes()
    (tmp_path / "s.npy").write_bytes(data[:-50])
    with pytest.raises(DataError, match="cut off: 30 images announced, 28 there"):
        list(open_source(str(tmp_path / "s.npy")).read(20, 30))
