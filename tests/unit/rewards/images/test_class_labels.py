"""Class numbers from names: numbers are numbers, names are sorted, what is a guess is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import ConfigError, DataError
from cluster.program.streams import escaped
from learner.data.conditions import DIGITS
from rewards.distribution.fid import frechet_distance
from rewards.images.class_labels import (
    ClassLabels,
    class_numbers,
    contradiction,
    described,
    read_class_names,
)
from rewards.images.sources import open_source
from rewards.reference import main, read_stored
from tests.file_rows import reads
from tests.fuzzing import check_reader
from tests.small_run import moments_of_main, small_config
from tests.unit.reference_sources import png

COUNT = 60
IMAGES = np.random.default_rng(5).integers(0, 256, (COUNT, 2, 2, 3), dtype=np.uint8)
CLASSES = np.sort(np.random.default_rng(6).integers(0, 12, COUNT))
"""Of twelve classes; sorted, as images in folders 00 to 11 are."""
IMAGES[:, 0, 0] = CLASSES[:, None] * 20  # images that go with their classes


def folder(root: Path, names: dict[int, str] | None = None) -> Path:
    """The images in folders named after their classes."""
    for index, (pixels, label) in enumerate(zip(IMAGES, CLASSES)):
        place = root / (str(label) if names is None else names[label])
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{index:03d}.png").write_bytes(png(pixels))
    return root


def samples(path: Path) -> Path:
    np.savez(path, arr_0=IMAGES, arr_1=CLASSES)
    return path


def build(source: Path, out: Path, *options: str) -> int:
    arguments = ["--images", str(source), "--out", str(out), "--features.network", "pixels"]
    return main([*arguments, *options])


def joint(out: Path) -> Any:
    return read_stored(out, "pixels", joint=True)


@pytest.mark.parametrize(
    ("found", "names"),
    [
        ([str(n) for n in range(12)], [str(n) for n in range(12)]),
        ([f"{n:02d}" for n in range(12)], [f"{n:02d}" for n in range(12)]),
        (["3", "1", "0"], ["0", "1", "", "3"]),  # a number that is missing is a class
        (["1", "2"], ["", "1", "2"]),
        (["007"], ["", "", "", "", "", "", "", "007"]),
        (["n02", "n01", "n10"], ["n01", "n02", "n10"]),  # synsets, by name
        (["dog", "cat", "Ant"], ["Ant", "cat", "dog"]),
        (["école", "zoo", "叶"], ["zoo", "école", "叶"]),
        (["class_1", "class_2", "class_9"], ["class_1", "class_2", "class_9"]),
        (["class_01", "class_10", "class_02"], ["class_01", "class_02", "class_10"]),
        (["707-320", "A300B4"], ["707-320", "A300B4"]),
    ],
)
def test_names_and_their_numbers(found: list[str], names: list[str]) -> None:
    for order in (found, found[::-1]):
        numbers, known = class_numbers(order, "here")
        assert list(known) == names
        assert numbers == {name: number for number, name in enumerate(names) if name}


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (["7", "07"], "'07' and '7' are one number"),
        (["0", "1", "cat"], r"some classes are numbers and some are names \('0', 'cat'\)"),
        (["0", "-1"], "some are names"),
        (["0", "1.5"], "some are names"),
        (["class_1", "class_2", "class_10"], "'class_10' comes before 'class_2'"),
        (["1_cat", "2_dog", "10_ox"], "'10_ox' comes before '1_cat'|by their numbers after it"),
        (["20240131"], "is no class number"),
        (["9" * 400], "is no class number"),
    ],
)
def test_names_that_would_be_a_guess(found: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        class_numbers(found, "here")
    assert str(caught.value).startswith("here: ")
    order = [*found, "more"]
    assert class_numbers(found, "here", order)[0] == {name: n for n, name in enumerate(order)}
    with pytest.raises(DataError, match="are not among the 1 of --class-names"):
        class_numbers(found, "here", ["other"])


def test_the_mapping_is_reported_in_short() -> None:
    few = described(np.array([0, 0, 2]), 3, ("cat", "dog", "ox"))
    assert few == (
        "3 classes (1 without images): 0 'cat' (2 images), 1 'dog' (0 images), 2 'ox' (1 images)"
    )
    many = described(np.arange(1000), 1000, ())
    assert many.startswith("1000 classes: 0 (1 images), 1 (1 images), 2 (1 images), ..., 997 ")


def test_identifiers_are_no_classes() -> None:
    with pytest.raises(DataError, match="class number 5000000 is none"):
        ClassLabels(np.array([5_000_000]))


@pytest.mark.parametrize(
    ("ours", "theirs", "told"),
    [
        (("cat", "dog"), ("dog", "cat"), "class 0 is 'cat' here, and number 1 there"),
        (("Great_White", "x"), ("y", "great white"), "class 0 is 'great white' here"),
        (("cat", "dog"), ("cat", "dog"), ""),
        (("n01440764", "n01443537"), ("tench", "goldfish"), ""),  # nobody can tell
        (("0", "1"), ("1", "0"), ""),
        (("crane", "ox", "crane"), ("ox", "crane", "crane"), "class 1 is 'ox' here"),
        ((), ("cat",), ""),
    ],
)
def test_two_lists_of_classes(ours: tuple, theirs: tuple, told: str) -> None:
    assert contradiction(ours, theirs).startswith(told)
    assert bool(contradiction(ours, theirs)) == bool(told)


# Folders


@reads("rewards/README.md", "folder of images")
@pytest.mark.parametrize(
    "names",
    [
        {n: str(n) for n in range(12)},
        {n: f"{n:02d}" for n in range(12)},
        {n: chr(97 + n) for n in range(12)},
    ],
    ids=["0", "00", "a"],
)
def test_a_folder_and_a_file_of_the_same_images(names: dict[int, str], tmp_path: Path) -> None:
    """Their joint FID is 0; with folders in alphabetical order, 0, 1, 10, 11, 2, it was .322."""
    source = folder(tmp_path / "photos", names)
    assert build(source, tmp_path / "a.npz", "--joint", "classes") == 0
    assert build(samples(tmp_path / "s.npz"), tmp_path / "b.npz", "--joint", "classes") == 0
    ours, theirs = joint(tmp_path / "a.npz"), joint(tmp_path / "b.npz")
    np.testing.assert_array_equal(ours.class_counts, theirs.class_counts)
    a, b = ours.reference, theirs.reference
    assert frechet_distance(a.mu, a.sigma, b.mu, b.sigma) < 1e-8
    shuffled = CLASSES.copy()
    shuffled[CLASSES == 2], shuffled[CLASSES == 10] = 10, 2
    np.savez(tmp_path / "t.npz", arr_0=IMAGES, arr_1=shuffled)
    assert build(tmp_path / "t.npz", tmp_path / "c.npz", "--joint", "classes") == 0
    c = joint(tmp_path / "c.npz").reference
    assert frechet_distance(a.mu, a.sigma, c.mu, c.sigma) > 1e-3


def test_the_mapping_is_printed_and_stored(tmp_path: Path, capsys) -> None:
    names = {n: f"n{1440764 + n:08d}" for n in range(12)}
    source = folder(tmp_path / "photos", names)
    (source / "n09999999").mkdir()  # a class without images
    assert build(source, tmp_path / "a.npz", "--labels") == 0
    said = capsys.readouterr().out
    assert "13 classes (1 without images): 0 'n01440764' (" in said
    assert "12 'n09999999' (0 images)" in said
    stored = read_stored(tmp_path / "a.npz")
    assert stored.class_names == (*names.values(), "n09999999")
    assert len(stored.class_counts) == 13
    assert stored.class_counts[12] == 0


def test_empty_classes_hidden_folders_and_gaps(tmp_path: Path) -> None:
    source = folder(tmp_path / "photos", {n: str(2 * n) for n in range(12)})
    for name in (".ipynb_checkpoints", "__MACOSX", ".git", "30"):
        (source / name).mkdir()
        if name != "30":
            (source / name / "x.png").write_bytes(png(IMAGES[0]))
    labels = open_source(str(source)).classes()
    in_order = sorted(str(2 * n) for n in CLASSES)
    np.testing.assert_array_equal(labels.indices, [int(name) for name in in_order])
    assert labels.count == 31
    assert labels.names[30] == "30"
    assert labels.names[29] == ""


@reads("rewards/README.md", "text file of `--class-names`")
def test_the_order_may_be_given(tmp_path: Path, capsys) -> None:
    words = {n: f"class_{n}" for n in range(12)}
    source, order = folder(tmp_path / "photos", words), tmp_path / "order.txt"
    assert build(source, tmp_path / "a.npz", "--labels") == 2
    assert "give the order in a file with --class-names" in capsys.readouterr().err
    order.write_bytes("\ufeff".encode() + "\r\n".join(words.values()).encode() + b"\r\n")
    assert build(source, tmp_path / "a.npz", "--labels", "--class-names", str(order)) == 0
    np.testing.assert_array_equal(
        read_stored(tmp_path / "a.npz").class_counts, np.bincount(CLASSES, minlength=12)
    )
    assert build(source, tmp_path / "b.npz", "--class-names", str(order)) == 2
    assert "--class-names needs --labels" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "an empty line"),
        (b"a\n\nb\n", "an empty line"),
        (b"a\na\n", "'a' twice"),
        (b"\xff", ""),
    ],
)
def test_files_of_names_that_are_none(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_bytes(data)
    with pytest.raises(DataError, match=f"expected names of classes, one a line.*{message}"):
        read_class_names(tmp_path / "names.txt")


# Parquet


def table(path: Path, labels: Any, features: dict | None = None) -> Path:
    cells = [{"bytes": png(pixels), "path": f"{i}.png"} for i, pixels in enumerate(IMAGES)]
    made = pa.table({"image": cells, "label": labels})
    if features:
        info = {"info": {"features": {"image": {"_type": "Image"}, "label": features}}}
        made = made.replace_schema_metadata({"huggingface": json.dumps(info)})
    pq.write_table(made, path, row_group_size=17)
    return path


@reads("rewards/README.md", "Parquet of Hugging Face datasets")
def test_labels_of_hugging_face(tmp_path: Path) -> None:
    """Integers with the classes' names in the schema's metadata, as `datasets` writes them."""
    words = [chr(97 + n) for n in range(13)]
    known = {"names": words, "_type": "ClassLabel"}
    labels = open_source(str(table(tmp_path / "p.parquet", CLASSES, known))).classes()
    np.testing.assert_array_equal(labels.indices, CLASSES)
    assert labels.names == tuple(words)  # the thirteenth is a class without images
    assert labels.count == 13
    # its reader of folders numbers 0 to 11 in alphabetical order: the names are the classes
    sorted_names = sorted(str(n) for n in range(12))
    theirs = [sorted_names.index(str(label)) for label in CLASSES]
    known = {"names": sorted_names, "_type": "ClassLabel"}
    labels = open_source(str(table(tmp_path / "q.parquet", theirs, known))).classes()
    np.testing.assert_array_equal(labels.indices, CLASSES)
    assert labels.names == tuple(str(n) for n in range(12))


@pytest.mark.parametrize("pack", [list, lambda v: pa.array(v).dictionary_encode()])
def test_string_labels(pack: Any, tmp_path: Path) -> None:
    for names in ([str(n) for n in range(12)], [chr(97 + n) for n in range(12)]):
        source = table(tmp_path / "p.parquet", pack([names[label] for label in CLASSES]))
        labels = open_source(str(source)).classes()
        np.testing.assert_array_equal(labels.indices, CLASSES)
        assert labels.names == tuple(names)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (CLASSES / 1, "must hold integers or names, found double"),
        (CLASSES > 3, "found bool"),
        ([[1]] * COUNT, "found list<"),
        ([*CLASSES[1:], None], f"all rows: row {COUNT - 1} has none"),
        ([*map(str, CLASSES[1:]), None], f"row {COUNT - 1} has none"),
        (CLASSES - 1, "numbered from 0, found -1 .* without a label"),
        (["7", "07"] * (COUNT // 2), "are one number"),
        (["7", "cat"] * (COUNT // 2), "some are names"),
        (np.full(COUNT, 1 << 63, np.uint64), "is no class"),
        (np.full(COUNT, 1 << 40), "is none"),
    ],
)
def test_labels_that_are_no_classes(labels: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        open_source(str(table(tmp_path / "p.parquet", labels))).classes()


def test_labels_beyond_their_names(tmp_path: Path) -> None:
    known = {"names": ["a", "b"], "_type": "ClassLabel"}
    with pytest.raises(DataError, match="label 11, but 2 names of classes"):
        open_source(str(table(tmp_path / "p.parquet", CLASSES, known))).classes()


def test_files_whose_labels_differ(tmp_path: Path) -> None:
    place = tmp_path / "shards"
    place.mkdir()
    for other, message in {
        ("b", "a"): "has other class names than in 0.parquet",
        None: "has other class names",
    }.items():
        table(place / "0.parquet", [0] * COUNT, {"names": ["a", "b"]})
        table(place / "1.parquet", [1] * COUNT, other and {"names": list(other)})
        with pytest.raises(DataError, match=message):
            open_source(str(place)).classes()
    table(place / "0.parquet", [0] * COUNT)
    table(place / "1.parquet", ["1"] * COUNT)
    with pytest.raises(DataError, match="holds numbers in some files, names in others"):
        open_source(str(place)).classes()
    # names of two files are numbered together
    table(place / "0.parquet", ["cat"] * COUNT)
    table(place / "1.parquet", ["ant"] * COUNT)
    assert open_source(str(place)).classes().indices.tolist() == [1] * COUNT + [0] * COUNT


def test_given_names_of_labels(tmp_path: Path) -> None:
    order = tuple(chr(108 - n) for n in range(12))
    source = table(tmp_path / "p.parquet", [order[label] for label in CLASSES])
    np.testing.assert_array_equal(open_source(str(source)).classes(order).indices, CLASSES)
    known = {"names": sorted(order), "_type": "ClassLabel"}
    ours = [sorted(order).index(order[label]) for label in CLASSES]
    source = table(tmp_path / "q.parquet", ours, known)
    np.testing.assert_array_equal(open_source(str(source)).classes(order).indices, CLASSES)
    for made in (table(tmp_path / "r.parquet", CLASSES), samples(tmp_path / "s.npz")):
        with pytest.raises(DataError, match=r"11, but --class-names has 2"):
            open_source(str(made)).classes(("a", "b"))
        assert open_source(str(made)).classes(order).names == order


def test_names_in_another_order_than_the_policys(tmp_path: Path) -> None:
    digits = {n: DIGITS[n] for n in range(10)}
    order = sorted(DIGITS)
    root = tmp_path / "photos"
    for index in range(40):
        place = root / digits[index % 10]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{index}.png").write_bytes(png(IMAGES[index]))
    out = tmp_path / "r.npz"
    run = small_config(rewards={"loo_fid": {"reference": str(out), "joint": True}})
    assert build(root, out, "--joint", "classes") == 0
    assert read_stored(out).class_names == tuple(order)
    with pytest.raises(ConfigError, match="classes in another order"):
        moments_of_main(run)
    (tmp_path / "order.txt").write_text("\n".join(DIGITS))
    options = ["--joint", "classes", "--class-names", str(tmp_path / "order.txt"), "--overwrite"]
    assert build(root, out, *options) == 0
    space, _ = moments_of_main(run)
    assert space.added == 10


# Anything


def test_any_names_have_one_number_each_or_none() -> None:
    draw, refused = random.Random(0), 0
    parts = ["0", "1", "7", "07", "10", "a", "class_", "é", " ", "\udcff", "\n", "٣", "-", "_"]
    for _ in range(1000):
        found = ["".join(draw.choices(parts, k=draw.randrange(1, 4))) for _ in range(4)]
        try:
            numbers, names = class_numbers(found, "here")
        except DataError as error:
            refused += 1
            str(error).encode()  # as a message it can be printed
            continue
        assert set(numbers) == set(found)
        assert len(set(numbers.values())) == len(numbers)
        decimal = all(name.isascii() and name.isdecimal() for name in found)
        for name, number in numbers.items():
            assert names[number] == escaped(name)
            assert not decimal or int(name) == number
    assert 0 < refused < 1000


def test_damaged_files_of_names(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_text("\n".join(f"n{1440764 + n:08d} é" for n in range(9)), encoding="utf-8")

    def good(found: tuple[str, ...]) -> bool:
        return len(set(found)) == len(found) > 0 and all(found)

    check_reader(path, read_class_names, 500, good=good)
