"""Folders and tables of real images as data sets are published, unpacked and cached."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import DataError
from cluster.model_files.file_kinds import FileKind, file_kind
from rewards.images.class_labels import class_numbers, read_class_names
from rewards.images.folder import walk
from rewards.images.sources import open_source
from rewards.reference import main
from tests.file_rows import reads
from tests.unit.reference_sources import CLASSES, COUNT, IMAGES, png


def write(place: Path, number: int = 0) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(png(IMAGES[number]))
    return place


def build(source: Path, out: Path, *options: str) -> int:
    arguments = ["--images", str(source), "--out", str(out), "--features.network", "pixels"]
    return main([*arguments, *options])


# Folders


@pytest.mark.parametrize("splits", [("train", "val"), ("Training", "Testing"), ("train",)])
def test_splits_are_no_classes(splits: tuple[str, ...], tmp_path: Path, capsys) -> None:
    for split in splits:
        for kind in ("cat", "dog"):
            write(tmp_path / "set" / split / kind / "a.png")
    (tmp_path / "set" / "annotations").mkdir()  # empty: no class beside splits either
    assert build(tmp_path / "set", tmp_path / "r.npz", "--labels") == 2
    assert f"splits of a data set ({', '.join(sorted(splits))})" in capsys.readouterr().err
    assert build(tmp_path / "set" / splits[0], tmp_path / "r.npz", "--labels") == 0
    assert "2 classes: 0 'cat' (1 images), 1 'dog' (1 images)" in capsys.readouterr().out
    told = "".join(open_source(str(tmp_path / "set")).remarks)
    assert ("splits together" in told) == (len(splits) > 1)
    if len(splits) > 1:
        assert (
            told == f"images of 2 splits together: {sorted(splits)[0]} (2), {sorted(splits)[1]} (2)"
        )


def test_classes_that_lie_deeper_are_named(tmp_path: Path) -> None:
    for number, kind in enumerate(("cats", "dogs")):
        write(tmp_path / "data" / kind / "a.png", number)
    write(tmp_path / "__MACOSX" / "data" / "cats" / "._a.png")  # as macOS packs a zip
    with pytest.raises(DataError, match=r"below it meant \(cats, dogs\)\? Then name .*/data$"):
        open_source(str(tmp_path)).classes()
    assert open_source(str(tmp_path / "data")).classes().names == ("cats", "dogs")
    assert open_source(str(tmp_path)).classes(("data",)).count == 1  # the user says so


@reads("rewards/README.md", "a snapshot in the Hugging Face hub's cache")
def test_the_hubs_cache(tmp_path: Path) -> None:
    """Files of the same content share a blob; two images of a data set are two all the same."""
    cache = tmp_path / "datasets--me--pictures"
    for name, number in {"0/a.png": 0, "0/b.png": 1, "1/a.png": 1, "1/c.png": 2}.items():
        blob, link = cache / "blobs" / f"{number:064x}", cache / "snapshots" / "1f3a" / name
        write(blob, number)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path("../../../blobs", blob.name))
    snapshot = cache / "snapshots" / "1f3a"
    contents = walk(snapshot)
    assert [*contents.images] == ["0/a.png", "0/b.png", "1/a.png", "1/c.png"]
    assert (contents.left_out, contents.again) == ([], ["1/a.png"])
    source = open_source(str(snapshot))
    assert source.classes().indices.tolist() == [0, 0, 1, 1]
    assert "1 images are links to files that others link to as well" in "".join(source.remarks)
    pixels = [image.pixels for image in source.read(0, 4)]
    np.testing.assert_array_equal(np.stack(pixels), IMAGES[[0, 1, 1, 2]])  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"name one of its snapshots, .*/snapshots/1f3a$"):
        walk(cache)


def test_a_link_to_a_file_that_is_there_adds_nothing(tmp_path: Path) -> None:
    root, pool = tmp_path / "set", tmp_path / "pool"
    write(pool / "x.png")
    write(root / "real.png", 1)
    (root / "a_pool").symlink_to(pool)
    for name in ("A.png", "z.png"):
        (root / name).symlink_to(pool / "x.png")  # which is found through the linked folder
    (root / "alias.png").symlink_to("real.png")
    contents = walk(root)
    assert [*contents.images] == ["a_pool/x.png", "real.png"]
    assert contents.left_out == [
        "A.png (the same file as a_pool/x.png)",
        "alias.png (the same file as real.png)",
        "z.png (the same file as a_pool/x.png)",
    ]


def test_what_is_left_out_is_reported_by_reason(tmp_path: Path) -> None:
    for number in range(8):
        write(tmp_path / f"{number:09d}.png", number)
        (tmp_path / f"{number:09d}.txt").write_text("a caption")  # as img2dataset writes them
    (tmp_path / "z.ico").write_bytes(b"\x00\x00\x01\x00" + bytes(range(16)))
    (remark,) = open_source(str(tmp_path)).remarks
    assert remark == (
        "left out 9: 000000000.txt (a text file) and 7 more like it, z.ico (a binary file of a "
        "kind that is not known here)"
    )


# Tables


def test_shards_of_archives_beside_what_is_known_of_them(tmp_path: Path) -> None:
    """img2dataset's webdataset format: 00000.tar, 00000.parquet, 00000_stats.json."""
    with tarfile.open(tmp_path / "00000.tar", "w") as archive:
        member = tarfile.TarInfo("0.png")
        member.size = len(data := png(IMAGES[0]))
        archive.addfile(member, io.BytesIO(data))
    pq.write_table(pa.table({"url": ["u"], "caption": ["c"]}), tmp_path / "00000.parquet")
    (tmp_path / "00000_stats.json").write_text("{}")
    with pytest.raises(DataError, match=r"found 00000.tar \(a tar archive\); unpack them first"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("form", ["stream", "file"])
def test_arrow_files_are_named(form: str, tmp_path: Path) -> None:
    """What the datasets library's save_to_disk writes, and Feather."""
    table = pa.table({"image": [png(IMAGES[0])], "label": [0]})
    table = table.replace_schema_metadata({"huggingface": "x" * 5000})
    file = tmp_path / "data-00000-of-00001.arrow"
    writer = pa.ipc.new_stream if form == "stream" else pa.ipc.new_file
    with file.open("wb") as sink, writer(sink, table.schema) as into:
        into.write_table(table)
    (tmp_path / "state.json").write_text("{}")
    assert file_kind(file) is FileKind.ARROW
    for place in (tmp_path, file):
        with pytest.raises(
            DataError, match=r"an Arrow file.*; write it as Parquet: datasets\.load"
        ):
            open_source(str(place))


def test_summaries_of_parquet_files_are_left_out(tmp_path: Path) -> None:
    """Spark's and Dask's `_metadata` describes rows of other files as its own."""
    table = pa.table({"image": [png(pixels) for pixels in IMAGES[:4]]})
    described: list = []
    pq.write_table(table, tmp_path / "part-0.parquet", metadata_collector=described)
    described[0].set_file_path("part-0.parquet")
    pq.write_metadata(table.schema, tmp_path / "_metadata", described)
    pq.write_metadata(table.schema, tmp_path / "_common_metadata")
    (tmp_path / "_SUCCESS").write_text("")
    source = open_source(str(tmp_path))
    assert len(source) == 4
    assert "_metadata (a summary of Parquet files)" in source.remarks[0]


@pytest.mark.parametrize("kind", ["large", "view", "fixed", "dictionary"])
def test_every_type_of_bytes_and_names(kind: str, tmp_path: Path) -> None:
    cells, names = [png(pixels) for pixels in IMAGES[:4]], ["b", "a", "b", "a"]
    size = max(map(len, cells))
    columns = {
        "large": (pa.array(cells, pa.large_binary()), pa.array(names, pa.large_string())),
        "view": (pa.array(cells, pa.binary_view()), pa.array(names, pa.string_view())),
        "fixed": (pa.array([x.ljust(size, b"\0") for x in cells], pa.binary(size)), names),
        "dictionary": (pa.array(cells).dictionary_encode(), pa.array(names).dictionary_encode()),
    }
    image, label = columns[kind]
    pq.write_table(pa.table({"image": image, "label": label}), tmp_path / "p.parquet")
    source = open_source(str(tmp_path / "p.parquet"))
    pixels = [loaded.pixels for loaded in source.read(0, 4)]
    np.testing.assert_array_equal(np.stack(pixels), IMAGES[:4])  # type: ignore[arg-type]
    assert source.classes().indices.tolist() == [1, 0, 1, 0]


def test_a_named_column_whose_bytes_begin_late(tmp_path: Path) -> None:
    cells = [*[None] * 1500, png(IMAGES[3])]
    pq.write_table(pa.table({"image": pa.array(cells, pa.binary())}), tmp_path / "p.parquet")
    with pytest.raises(DataError, match="no bytes: are the images in files of their own"):
        open_source(str(tmp_path / "p.parquet"))
    (last,) = open_source(str(tmp_path / "p.parquet"), "image").read(1500, 1501)
    np.testing.assert_array_equal(last.pixels, IMAGES[3])  # type: ignore[arg-type]


# Names of classes


@pytest.mark.parametrize(
    "found",
    [
        ["class1_x", "class2_x", "class10_x"],
        ["v1.2", "v1.9", "v1.10"],
        ["1.0", "2.0", "10.0"],
        ["kind ٢", "kind ١٠"],
    ],
)
def test_numbers_anywhere_in_names(found: list[str]) -> None:
    with pytest.raises(DataError, match="by their numbers after it"):
        class_numbers(found, "here")


@pytest.mark.parametrize(
    "found",
    [
        ["001.Black", "002.Laysan", "100.Brown"],
        ["n01440764", "n02085620"],
        ["DC-10", "DC-3", "A310"],
    ],
)
def test_names_in_their_alphabetical_order(found: list[str]) -> None:
    assert class_numbers(found, "here")[1] == tuple(sorted(found))


def test_decimal_names_of_other_scripts() -> None:
    assert class_numbers(["٠", "٢", "١٠"], "here")[0] == {"٠": 0, "٢": 2, "١٠": 10}


def test_accents_in_their_letters_and_apart() -> None:
    """macOS writes file names with accents apart."""
    apart, together = "e\u0301cole", "\u00e9cole"
    assert class_numbers([apart, "zoo"], "here", ["zoo", together])[0][apart] == 1
    with pytest.raises(DataError, match="with accents in their letters and apart"):
        class_numbers([apart, together], "here")


def test_names_of_classes_in_files_of_old_macs(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_bytes(b"b\ra\r")
    assert read_class_names(tmp_path / "names.txt") == ("b", "a")


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--label-column", "x"), "--label-column needs --labels or --joint classes"),
        (("--num-classes", "10"), "--num-classes needs --labels or --joint classes"),
        (("--labels", "--joint-dim", "4"), "--joint-dim needs --joint classes"),
        (("--joint-weight", "2"), "--joint-weight needs --joint"),
        (("--image-column", "x"), "column 'x' is of Parquet files, which it is not"),
        (("--labels", "--label-column", "x"), "column 'x' is of Parquet files, which it is not"),
    ],
)
def test_options_of_what_is_not_asked_for(
    options: tuple[str, ...], message: str, tmp_path: Path, capsys
) -> None:
    np.savez(tmp_path / "s.npz", arr_0=IMAGES, arr_1=CLASSES)
    assert build(tmp_path / "s.npz", tmp_path / "r.npz", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "r.npz").exists()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.full((COUNT, 2), "a"), "expected an array of numbers, found <U1"),
        (np.ones((COUNT, 2), complex), "expected an array of numbers, found complex128"),
        (np.where(np.arange(COUNT * 2).reshape(-1, 2) == 7, np.nan, 1.0), "images 0 to 29 is not"),
    ],
)
def test_embeddings_that_are_none(rows: np.ndarray, message: str, tmp_path: Path, capsys) -> None:
    np.savez(tmp_path / "s.npz", arr_0=IMAGES)
    np.save(tmp_path / "e.npy", rows)
    options = ("--joint", "embeddings", "--embeddings", str(tmp_path / "e.npy"))
    assert build(tmp_path / "s.npz", tmp_path / "r.npz", *options) == 2
    assert message in capsys.readouterr().err
