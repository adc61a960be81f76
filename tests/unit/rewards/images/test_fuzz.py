"""Damaged sources of images: a clear error, or images; never another library's traceback."""

from __future__ import annotations

import io
import os
import random
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cluster.errors import DataError
from rewards.images.decoding import Loaded, decode
from rewards.images.sources import open_source
from tests.fuzzing import check_reader, damaged
from tests.unit.reference_sources import CLASSES, IMAGES, parquet, png

KINDS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF", "QOI", "TGA")


def whole(images: list[Loaded]) -> bool:
    """Each is an image or says why it is none."""
    return all(
        bool(image.error)
        if image.pixels is None
        else image.pixels.dtype == np.uint8 and image.pixels.ndim == 3
        for image in images
    )


def read_all(path: Path) -> list[Loaded]:
    source = open_source(str(path))
    if not 0 < len(source) < 100_000:  # a damaged number: none are there
        with pytest.raises(DataError):
            list(source.read(len(source) - 1, len(source)))
        raise DataError("too many")
    images = list(source.read(0, len(source)))
    labels = source.classes()
    assert len(labels.indices) == len(source)
    return images


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Pillow warns of much that is damaged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_images(kind: str) -> None:
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {kind}")
    name, data = f"a.{kind.lower()}", png(np.kron(IMAGES[0], np.ones((3, 3, 1), np.uint8)), kind)
    for case, other in damaged(data, 500):
        found = decode(name, other)
        assert whole([found]), case
        assert "\n" not in found.error, case


@pytest.mark.parametrize("mode", ["I;16", "I", "F", "LA", "P", "1", "CMYK"])
def test_damaged_images_of_other_modes(mode: str) -> None:
    file = io.BytesIO()
    Image.new(mode, (9, 7)).save(file, "TIFF")
    for case, other in damaged(file.getvalue(), 200):
        assert whole([decode("a.tif", other)]), case


def test_damaged_parquet(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    parquet(path, [png(pixels) for pixels in IMAGES[:6]], [str(label) for label in CLASSES[:6]])
    check_reader(path, read_all, 600, good=whole)
    assert all(image.pixels is not None for image in read_all(path))


@pytest.mark.parametrize("kind", ["stored", "packed", "npy"])
def test_damaged_arrays(kind: str, tmp_path: Path) -> None:
    path = tmp_path / ("s.npy" if kind == "npy" else "s.npz")
    if kind == "npy":
        np.save(path, IMAGES[:3])
    else:
        save = np.savez if kind == "stored" else np.savez_compressed
        save(path, arr_0=IMAGES[:3], arr_1=CLASSES[:3])

    def read(given: Path) -> list[Loaded]:
        source = open_source(str(given))
        images = list(source.read(0, min(len(source), 1000)))
        if kind != "npy":
            source.classes()
        return images

    def good(found: list[Loaded]) -> bool:
        """An .npz has a checksum; an .npy has none."""
        pixels = [image.pixels for image in found]
        return whole(found) and (kind == "npy" or np.array_equal(np.stack(pixels), IMAGES[:3]))

    check_reader(path, read, 600, good=good)


def test_damaged_files_in_a_folder(tmp_path: Path) -> None:
    """The walk, with classes, around one file that is anything."""
    root = tmp_path / "photos"
    for number, label in enumerate("0123"):
        (root / label).mkdir(parents=True)
        (root / label / "a.png").write_bytes(png(IMAGES[number]))
    for name in ("0/b.png", "1/c"):
        path = root / name
        path.write_bytes(png(IMAGES[9], "BMP"))
        check_reader(path, lambda _: read_all(root), 500, good=whole)


def test_names_of_any_bytes(tmp_path: Path) -> None:
    draw, root = random.Random(0), os.fsencode(tmp_path)
    made = 0
    for _ in range(500):
        name = bytes(draw.choice(range(1, 256)) for _ in range(draw.randrange(1, 9)))
        if b"/" in name or name in (b".", b".."):
            continue
        try:
            os.mkdir(os.path.join(root, name))
        except FileExistsError:
            continue
        with open(os.path.join(root, name, name + b".png"), "wb") as file:
            file.write(png(IMAGES[0]))
        made += not name.startswith(b".")
    for digit in "09":
        (tmp_path / digit).mkdir(exist_ok=True)
    source = open_source(str(tmp_path))
    assert len(source) == made
    images = list(source.read(0, made))
    assert all(image.pixels is not None for image in images)
    assert all(image.name.encode() for image in images)
    with pytest.raises(DataError, match="some classes are numbers") as caught:
        source.classes()
    assert str(caught.value).encode()
