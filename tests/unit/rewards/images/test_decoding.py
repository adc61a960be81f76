"""One image to 8-bit RGB: nothing turns white or black, what is left out is said."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cluster.errors import DataError
from rewards.images.decoding import ALPHA, DEEP, FIRST, decode
from rewards.images.sources import open_source
from rewards.reference import main
from tests.file_rows import reads
from tests.unit.reference_sources import CLASSES, IMAGES

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@reads("rewards/README.md", "16-bit grey PNG, TIFF, PGM, JPEG 2000")
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
@pytest.mark.parametrize("factor", [257, 256])
def test_16_bit_grey_is_scaled(kind: str, factor: int) -> None:
    """Pillow's own conversion clips at 255: all white, but for black."""
    values = (GREY.astype(np.uint16) * factor).astype(np.uint16)
    data = b"P5 16 16 65535\n" + values.astype(">u2").tobytes()
    if kind != "PPM":  # which older Pillows do not write
        data = encoded(Image.fromarray(values), kind)
    found = decode("a", data)
    assert found.pixels is not None, found.error
    for channel in range(3):
        np.testing.assert_array_equal(found.pixels[..., channel], GREY)
    assert found.notes == (DEEP,)


@pytest.mark.parametrize("order", ["I;16", "I;16B"])
def test_16_bit_tiff_of_either_byte_order(order: str) -> None:
    deep = GREY.astype(np.uint16) * 257
    image = Image.frombytes(
        order, (16, 16), deep.astype("<u2" if order == "I;16" else ">u2").tobytes()
    )
    found = decode("a", encoded(image, "TIFF"))
    np.testing.assert_array_equal(found.pixels[..., 0], GREY)  # type: ignore[index]
    if order == "I;16B":  # Pillow does not read it the other way round
        return
    inverted = encoded(image, "TIFF", tiffinfo={262: 0})  # white is zero, as scanners write it
    with Image.open(io.BytesIO(inverted)) as again:
        assert again.tag_v2[262] == 0  # type: ignore[attr-defined]
    found = decode("a", inverted)
    np.testing.assert_array_equal(found.pixels[..., 0], 255 - GREY)  # type: ignore[index]


def test_12_bit_tiff() -> None:
    """As microscopes write it; Pillow leaves the numbers at 12 bits."""
    values = GREY.astype(int) * 16 + 15
    pairs = values.reshape(-1, 2)
    packed = np.stack(
        [pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], 1
    )
    tags = ((256, 16), (257, 16), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 16))
    entries = b"".join(struct.pack("<HHII", tag, 3, 1, value) for tag, value in tags)
    entries += struct.pack("<HHII", 279, 4, 1, packed.size)
    data = packed.astype(np.uint8).tobytes()
    file = b"II*\0" + struct.pack("<I", 8 + len(data)) + data
    found = decode("a", file + struct.pack("<H", 9) + entries + bytes(4))
    assert found.pixels is not None, found.error
    np.testing.assert_array_equal(found.pixels[..., 0], GREY)


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        (Image.fromarray(np.linspace(0, 1, 256).reshape(16, 16).astype(np.float32)), "TIFF"),
        (Image.fromarray(np.arange(256).reshape(16, 16).astype(np.float32)), "TIFF"),
        (Image.fromarray(np.arange(256).reshape(16, 16).astype(np.int32) * 65536), "TIFF"),
        (Image.fromarray(np.linspace(0, 1, 256).reshape(16, 16).astype(np.float32)), "PPM"),
    ],
    ids=["float", "float255", "int32", "pfm"],
)
def test_grey_of_unknown_scale_is_refused(image: Image.Image, kind: str, tmp_path: Path) -> None:
    found = decode("a", encoded(image, kind))
    assert found.pixels is None
    assert "without a known white: write it with 8 bits" in found.error


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "LAB", "LA", "RGBA"])
def test_other_modes_are_as_pillow_converts_them(mode: str) -> None:
    """As the FID tools load them: published numbers are made so."""
    rgb = Image.fromarray(np.kron(IMAGES[0], np.ones((4, 4, 1), np.uint8)))
    image = rgb.convert(mode)
    kind = "TIFF" if mode in ("CMYK", "LAB") else "PNG"
    data = encoded(image, kind)
    with Image.open(io.BytesIO(data)) as again:
        expected = np.asarray(again.convert("RGB"))
    found = decode("a", data)
    np.testing.assert_array_equal(found.pixels, expected)
    assert found.notes == ()


def test_transparency_is_said() -> None:
    rgba = np.dstack([IMAGES[0], np.full(IMAGES[0].shape[:2], 255, np.uint8)])
    assert decode("a", encoded(Image.fromarray(rgba), "PNG")).notes == ()
    rgba[0, 0, 3] = 254
    for image in (Image.fromarray(rgba), Image.fromarray(rgba).convert("LA")):
        assert decode("a", encoded(image, "PNG")).notes == (ALPHA,)
    palette = Image.fromarray(IMAGES[0]).convert("P")
    clear = palette.getpixel((0, 0))
    assert decode("a", encoded(palette, "PNG", transparency=0)).notes == (ALPHA,)
    assert decode("a", encoded(palette, "GIF", transparency=clear)).notes == (ALPHA,)


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP", "PNG"])
def test_the_first_of_several_pictures(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    found = decode("a", data)
    assert found.pixels is not None
    assert found.pixels[0, 0].tolist() == [255, 0, 0]
    assert found.notes == (FIRST,)
    assert decode("a", encoded(frames[0], kind)).notes == ()


def test_16_bit_colour_is_said(tmp_path: Path) -> None:
    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    row = b"\0" + np.array([[256, 32768, 65535], [0, 1, 2]], ">u2").tobytes()
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row))
    found = decode("a", data + chunk(b"IEND", b""))
    assert found.pixels is not None, found.error
    assert found.pixels.tolist() == [[[1, 128, 255], [0, 0, 0]]]
    assert found.notes == (DEEP,)


def test_what_was_converted_is_reported_at_the_end(tmp_path: Path, capsys) -> None:
    root = tmp_path / "photos"
    root.mkdir()
    for number in range(9):
        grey = Image.fromarray(GREY.astype(np.uint16) * 257 + number)
        (root / f"{number}.png").write_bytes(encoded(grey, "PNG"))
    arguments = ["--images", str(root), "--out", str(tmp_path / "r.npz"), "--batch", "4"]
    assert main([*arguments, "--features.network", "pixels"]) == 0
    assert f"9 images, the first {root}/0.png: {DEEP}" in capsys.readouterr().out


def test_formats_that_run_programs_are_not_opened() -> None:
    found = decode("a.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    assert "cannot identify" in found.error
    assert decode("a", b"\x00" * 18 + b"junk" * 99).pixels is None  # a TGA by its name alone


# Arrays


@reads("rewards/README.md", "ADM's `.npz` batches")
def test_batches_of_the_adm_evaluator(tmp_path: Path) -> None:
    for name, save in {"s.npz": np.savez, "P.NPZ": np.savez_compressed}.items():
        with (tmp_path / name).open("wb") as file:
            save(file, arr_0=IMAGES, arr_1=CLASSES)
        source = open_source(str(tmp_path / name))
        np.testing.assert_array_equal(np.stack([i.pixels for i in source.read(0, 30)]), IMAGES)
        np.testing.assert_array_equal(source.classes().indices, CLASSES)


@reads("rewards/README.md", "`.npy` of samples")
def test_an_array_by_its_content(tmp_path: Path) -> None:
    for name in ("s.npy", "S.NPY", "samples"):
        with (tmp_path / name).open("wb") as file:
            np.save(file, IMAGES)
        source = open_source(str(tmp_path / name))
        np.testing.assert_array_equal(np.stack([i.pixels for i in source.read(0, 30)]), IMAGES)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (
            IMAGES / 255,
            r"found float64 .*: write it with \(255 \* x\).round\(\).astype\(np.uint8\)",
        ),
        (IMAGES.astype(np.int64), r"found int64 .*: write it with x.astype\(np.uint8\)"),
        (IMAGES.astype(np.uint16), r"found uint16 .*: write it with \(x >> 8\).astype\(np.uint8\)"),
        (IMAGES.astype(np.float16), "found float16"),
        (np.zeros((5, 3, 8, 8), np.uint8), r"x.transpose\(0, 2, 3, 1\) of channels first"),
        (IMAGES[..., 0].copy(), r"x.reshape\(N, H, W, 1\), 3, -1\) of grey"),
        (IMAGES[..., :1].copy(), "of grey"),
        (np.concatenate([IMAGES, IMAGES[..., :1]], -1), r"x\[..., :3\] of RGBA"),
        (IMAGES > 9, "found bool"),
        (IMAGES[:0], r"shape \(0, 3, 4, 3\)"),
    ],
)
@pytest.mark.parametrize("kind", ["npz", "npy"])
def test_arrays_of_something_else(
    array: np.ndarray, message: str, kind: str, tmp_path: Path
) -> None:
    file = tmp_path / f"s.{kind}"
    if kind == "npz":
        np.savez(file, arr_0=array)
    else:
        np.save(file, array)
    with pytest.raises(DataError, match=message):
        open_source(str(file))
