"""The walk through a folder: every image once, everything else named, nothing hangs."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cluster.errors import DataError
from rewards.images import folder
from rewards.images.folder import walk
from rewards.images.sources import open_source
from rewards.reference import main, read_stored
from tests.file_rows import reads
from tests.unit.reference_sources import IMAGES, parquet, png


def write(place: Path, number: int = 0, kind: str = "PNG") -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(png(IMAGES[number], kind))
    return place


def names(root: Path) -> list[str]:
    return [*walk(root).images]


def build(source: Path, out: Path, *options: str) -> int:
    arguments = ["--images", str(source), "--out", str(out), "--features.network", "pixels"]
    return main([*arguments, *options])


LOSSLESS = {
    "a.png": "PNG",
    "b.BMP": "BMP",
    "c.tif": "TIFF",
    "d.TIFF": "TIFF",
    "e.ppm": "PPM",
    "f.pnm": "PPM",
    "g.dib": "DIB",
    "h.tga": "TGA",
    "i.Png": "PNG",
    "j.qoi": "QOI",
}
LOSSY = {
    "k.jpg": "JPEG",
    "l.JPEG": "JPEG",
    "m.jpe": "JPEG",
    "n.jfif": "JPEG",
    "o.gif": "GIF",
    "p.webp": "WEBP",
    "q.jp2": "JPEG2000",
    "r.avif": "AVIF",
}


def saves(kind: str) -> bool:
    Image.init()
    return kind in Image.SAVE


@reads("rewards/README.md", "PNG, JPEG, WebP, BMP, GIF, TIFF, PPM, JPEG 2000, AVIF, QOI, TGA")
def test_every_format_that_pillow_reads(tmp_path: Path) -> None:
    """Of twenty-five images five were used: .bmp, .tif, .gif and .ppm were left out silently."""
    kinds = {name: kind for name, kind in {**LOSSLESS, **LOSSY}.items() if saves(kind)}
    for number, (name, kind) in enumerate(kinds.items()):
        write(tmp_path / name, number, kind)
    source = open_source(str(tmp_path))
    assert len(source) == len(kinds)
    assert source.remarks == ()
    for number, image in enumerate(source.read(0, len(source))):
        assert image.pixels is not None, image
        if Path(image.name).name in LOSSLESS:
            np.testing.assert_array_equal(image.pixels, IMAGES[number])
        else:
            assert image.pixels.shape == IMAGES[number].shape


def test_content_decides_where_the_name_does_not(tmp_path: Path, capsys) -> None:
    root = tmp_path / "photos"
    write(root / "a")  # no suffix
    write(root / "b.dat", 1, "BMP")
    write(root / "c.jpg", 2)  # a PNG
    write(root / "d.txt", 3, "PPM")
    (root / "notes.txt").write_text("P5 is a format")
    (root / "list.csv").write_text("a,b")
    (root / "page.html").write_text("<html>")
    (root / "empty").write_bytes(b"")
    (root / "w.npz").write_bytes(b"PK\x05\x06" + bytes(18))
    write(root / "raw.dng", 4, "TIFF")
    source = open_source(str(root))
    found = [image.pixels for image in source.read(0, 9)]
    np.testing.assert_array_equal(np.stack(found), IMAGES[:4])
    (remark,) = source.remarks
    assert remark.startswith(
        "left out 6: empty (an empty file), list.csv (a text file) and 1 more like it, page.html "
    )
    assert build(root, tmp_path / "r.npz") == 0
    assert remark in capsys.readouterr().out
    assert read_stored(tmp_path / "r.npz").images == 4


def test_a_name_of_an_image_with_something_else_in_it(tmp_path: Path, capsys) -> None:
    """It is an error, not left out: most likely the download failed."""
    root = tmp_path / "photos"
    write(root / "a.png")
    write(root / "b.png", 1)
    (root / "c.jpg").write_text("<html>")
    (root / "d.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(20))
    (root / "e.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (root / "f.tga").write_bytes(b"")
    assert build(root, tmp_path / "r.npz") == 1
    assert f"{root}/c.jpg: cannot be read (no image that Pillow reads, but a web page" in (
        capsys.readouterr().err
    )
    assert build(root, tmp_path / "r.npz", "--skip-unreadable") == 0
    said = capsys.readouterr().out
    assert f"left out 4 images that could not be read: {root}/c.jpg, {root}/d.heic" in said
    errors = [image.error for image in open_source(str(root)).read(0, 9)]
    assert "HEIC is not read: convert it" in errors[3]


# Links


def test_links_in_a_ring_count_once(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    for number in range(3):
        write(root / "a" / "b" / f"{number}.png", number)
    (root / "ring").symlink_to(root)
    (root / "a" / "up").symlink_to("..")
    (root / "a" / "b" / "here").symlink_to(".")
    (root / "a" / "b" / "self").symlink_to("self")
    (root / "out").symlink_to(tmp_path)  # a folder that holds this one
    (root / "one").symlink_to("two")
    (root / "two").symlink_to("one")
    contents = walk(root)
    assert [*contents.images] == [f"a/b/{number}.png" for number in range(3)]
    assert contents.folders == ["a"]
    assert len(contents.left_out) == 7
    assert "a/b/here/ (the same folder as a/b)" in contents.left_out
    assert "out/ (a link to a folder that contains it)" in contents.left_out


def test_each_real_image_counts_once(tmp_path: Path) -> None:
    root, pool = tmp_path / "photos", tmp_path / "pool"
    write(root / "z.png", 0)
    write(pool / "in" / "x.png", 1)
    write(pool / "y.png", 2)
    (root / "a.png").symlink_to("z.png")  # before the real one in the alphabet
    (root / "hard.png").hardlink_to(root / "z.png")
    (root / "b").symlink_to(pool / "in")
    (root / "c").symlink_to(pool)  # holds what b leads to
    (root / "d.png").symlink_to(pool / "y.png")
    blob = write(tmp_path / "blobs" / "0123", 3)  # as the hub's cache has it
    (root / "blob.png").symlink_to(blob)
    contents = walk(root)
    assert [*contents.images] == ["b/x.png", "blob.png", "c/y.png", "hard.png"]
    assert contents.left_out == [
        "a.png (the same file as hard.png)",
        "c/in/ (the same folder as b)",
        "d.png (the same file as c/y.png)",
        "z.png (the same file as hard.png)",
    ]
    assert contents.folders == ["b", "c"]


def test_a_dangling_link_can_be_skipped(tmp_path: Path, capsys) -> None:
    root = tmp_path / "photos"
    for number in range(3):
        write(root / f"{number}.png", number)
    (root / "gone.png").symlink_to("nowhere.png")
    (root / "loop.png").symlink_to("loop.png")
    (root / "folder").symlink_to("nowhere")
    assert build(root, tmp_path / "r.npz") == 1
    told = capsys.readouterr()
    assert f"{root}/gone.png: cannot be read (FileNotFoundError" in told.err
    assert "folder (a dangling link: No such file or directory)" in told.out
    assert build(root, tmp_path / "r.npz", "--skip-unreadable") == 0
    assert f"left out 2 images that could not be read: {root}/gone.png, {root}/loop.png" in (
        capsys.readouterr().out
    )
    assert read_stored(tmp_path / "r.npz").images == 3


# What is no data, or cannot be read


def test_hidden_files_are_no_data(tmp_path: Path) -> None:
    write(tmp_path / "cat" / "a.png")
    for hidden in (".hidden.png", "cat/._a.png", ".git/b.png", "__MACOSX/c.png", "cat/.x/d.png"):
        write(tmp_path / hidden)
    for junk in ("cat/Thumbs.db", "cat/.DS_Store", "desktop.ini"):
        (tmp_path / junk).write_text("x")
    contents = walk(tmp_path)
    assert [*contents.images] == ["cat/a.png"]
    assert contents.folders == ["cat"]
    assert contents.left_out == [
        ".git/ (hidden)",
        ".hidden.png (hidden)",
        "__MACOSX/ (hidden)",
        "cat/.x/ (hidden)",
    ]


def test_names_that_are_not_utf_8(tmp_path: Path, capsys) -> None:
    root = tmp_path / "photos"
    for number, name in enumerate((b"caf\xe9", b"\xff\xfe", "叶".encode())):
        write(root / os.fsdecode(name) / os.fsdecode(name + b".png"), number)
        (root / os.fsdecode(name) / os.fsdecode(name + b".txt")).write_text("x")
    assert build(root, tmp_path / "r.npz", "--labels", "--joint", "classes") == 0
    said = capsys.readouterr().out
    assert "caf\\udce9.txt (a text file)" in said
    stored = read_stored(tmp_path / "r.npz")
    assert stored.class_names == ("caf\\udce9", "叶", "\\udcff\\udcfe")
    assert stored.class_counts.tolist() == [1, 1, 1]
    (root / os.fsdecode(b"caf\xe9") / os.fsdecode(b"bad\xe9.png")).write_bytes(b"\x89PNG\r\n\x1a\n")
    assert build(root, tmp_path / "s.npz") == 1
    assert "bad\\udce9.png: cannot be read" in capsys.readouterr().err
    assert build(root, tmp_path / "s.npz", "--skip-unreadable") == 0
    assert "bad\\udce9.png" in capsys.readouterr().out


def test_a_folder_that_cannot_be_listed_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    write(tmp_path / "a" / "a.png")
    write(tmp_path / "b" / "b.png")
    scandir = os.scandir

    def failing(place: Path):
        if Path(place).name == "b":
            raise OSError(5, "Input/output error")
        return scandir(place)

    monkeypatch.setattr(folder.os, "scandir", failing)
    for more in ((), ("--skip-unreadable",)):
        assert build(tmp_path, tmp_path / "r.npz", *more) == 2
        told = capsys.readouterr().err
        assert f"{tmp_path}/b: the folder cannot be listed (Input/output error)" in told
        assert "Traceback" not in told


def test_files_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.png")
    write(tmp_path / "b.png", 1)
    write(tmp_path / "c", 2)
    plain = Path.open

    def refused(self: Path, *given, **named):
        if self.name in ("b.png", "c"):
            raise PermissionError(13, "Permission denied")
        return plain(self, *given, **named)

    monkeypatch.setattr(Path, "open", refused)
    monkeypatch.setattr("builtins.open", lambda p, *a, **k: refused(Path(p), *a, **k))
    source = open_source(str(tmp_path))
    assert source.remarks == ("left out 1: c (cannot be read: Permission denied)",)
    good, bad = source.read(0, 2)
    assert good.pixels is not None
    assert "Permission denied" in bad.error


@pytest.mark.timeout(60)
def test_pipes_and_sockets_are_not_opened(tmp_path: Path, monkeypatch) -> None:
    write(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "null.png").symlink_to("/dev/zero")
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as heard:
        heard.bind("socket.jpg")
        contents = walk(tmp_path)
    assert [*contents.images] == ["a.png"]
    assert contents.left_out == [
        f"{name} (no regular file)" for name in ("null.png", "pipe", "pipe.png", "socket.jpg")
    ]


# Parquet and archives in a folder


def test_a_stray_parquet_does_not_win(tmp_path: Path, capsys) -> None:
    """Of images, it is refused; of what is known of the images, or of hashes, it is left out."""
    root = tmp_path / "photos"
    write(root / "cat" / "a.png")
    write(root / "cat" / "b.png", 1)
    for name in ("stray.parquet", "STRAY.PARQUET", "stray"):
        file = root / name
        parquet(file, [png(IMAGES[3])] * 9)
        assert build(root, tmp_path / "r.npz") == 2
        told = capsys.readouterr().err
        assert f"2 images (cat/a.png, cat/b.png) and 1 Parquet files ({name}): which" in told
        for columns in ({"md5": [b"0123456789abcdef"] * 9}, {"url": ["x"]}, {"none": [None]}):
            pq.write_table(pa.table(columns), file)
            assert build(root, tmp_path / "r.npz", "--overwrite") == 0
            said = capsys.readouterr().out
            assert f"left out 1: {name} (a Parquet file without images)" in said
            assert read_stored(tmp_path / "r.npz").images == 2
        file.unlink()
        (tmp_path / "r.npz").unlink()


def test_names_with_control_characters(tmp_path: Path, capsys) -> None:
    """Messages stay one line, and move no cursor."""
    root = tmp_path / "photos"
    write(root / "a.png")
    (root / "b\n\x1b[2J.png").write_text("version https://git-lfs.github.com/spec/v1\noid")
    assert build(root, tmp_path / "r.npz") == 1
    (told,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert (
        f"{root}/b\\n\\x1b[2J.png: cannot be read (no image that Pillow reads, but a Git LFS"
        in told
    )
    assert "git lfs pull" in told


@reads("rewards/README.md", "Parquet of images in binary")
def test_a_column_of_hashes_is_not_taken_for_images(tmp_path: Path) -> None:
    file, cells = tmp_path / "p.parquet", [png(pixels) for pixels in IMAGES]
    parquet(file, cells, md5=[b"\x01" * 16] * len(cells), thumb=[None] * len(cells))
    source = open_source(str(file))
    np.testing.assert_array_equal(np.stack([i.pixels for i in source.read(0, 30)]), IMAGES)
    with pytest.raises(DataError, match=r"column 'md5' .* holds no encoded images .*begins with b"):
        open_source(str(file), "md5")
    parquet(file, [None, b"", None, *cells[3:]])  # the first that hold anything decide
    assert len(open_source(str(file))) == 30
    pq.write_table(pa.table({"md5": [b"\x01" * 16] * 9}), file)
    with pytest.raises(DataError, match=r"column 'md5' .* holds no encoded images"):
        open_source(str(file))


def test_shards_of_which_one_has_no_images(tmp_path: Path) -> None:
    root = tmp_path / "shards"
    root.mkdir()
    parquet(root / "a.parquet", [png(IMAGES[0])])
    (root / "README.md").write_text("a dataset")
    pq.write_table(pa.table({"text": ["x"]}), root / "b.parquet")
    with pytest.raises(DataError, match=r"b.parquet: no column 'image' of images, as a.parquet"):
        open_source(str(root))
    parquet(root / "b.parquet", [png(IMAGES[1])])
    remarks = open_source(str(root)).remarks
    assert remarks == (
        "2 rows of 2 Parquet files, a.parquet to b.parquet, column 'image'",
        "left out 1: README.md (a text file)",
    )


def test_archives_are_refused(tmp_path: Path) -> None:
    import tarfile
    import zipfile

    image, root = write(tmp_path / "a.png"), tmp_path / "packed"
    root.mkdir()
    with tarfile.open(root / "00000.tar", "w") as tar:
        tar.add(image)
    with tarfile.open(root / "00001.tar.gz", "w:gz") as tar:
        tar.add(image)
    with zipfile.ZipFile(root / "00002.zip", "w") as archive:
        archive.write(image)
    for file in sorted(root.iterdir()):
        with pytest.raises(DataError, match=r"expected a folder of images, .* unpack it first"):
            open_source(str(file))
    with pytest.raises(DataError, match=r"no images in it or below; found 00000.tar .* unpack"):
        open_source(str(root))
    with pytest.raises(DataError, match="one image: name the folder"):
        open_source(str(image))
