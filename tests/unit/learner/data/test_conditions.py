from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.text.features import features_of, write_caption_features
from cluster.errors import DataError
from cluster.io.files import replacing
from cluster.messages import Condition
from learner.data.conditions import ConditionsConfig, ConditionStream

CONDITIONS = ConditionsConfig(names=("a", "b", "c", "d", "e")).conditions()


def drawn(stream: ConditionStream, iterations: int) -> list[Condition]:
    return [condition for index in range(iterations) for condition in stream.draw(index)]


@pytest.mark.parametrize("per_iteration", [1, 2, 5, 7])
def test_every_class_comes_once_an_epoch(per_iteration: int) -> None:
    sequence = drawn(ConditionStream(CONDITIONS, per_iteration, seed=3), 10)
    for start in range(0, len(sequence) - 4, 5):
        assert len({condition.class_index for condition in sequence[start : start + 5]}) == 5
    counts = Counter(condition.class_index for condition in sequence)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_the_order_is_a_function_of_seed_and_iteration() -> None:
    ours = ConditionStream(CONDITIONS, 3, seed=1)
    assert ours.draw(8) == ConditionStream(CONDITIONS, 3, seed=1).draw(8)  # no state to resume
    assert drawn(ours, 8) != drawn(ConditionStream(CONDITIONS, 3, seed=2), 8)
    epochs = [
        tuple(c.class_index for c in ConditionStream(CONDITIONS, 5, 1).draw(i)) for i in range(9)
    ]
    assert len(set(epochs)) > 1


def test_texts() -> None:
    config = ConditionsConfig(names=("cat",), template="a picture of a {}")
    assert config.conditions() == [Condition(text="a picture of a cat", class_index=0)]


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one class"):
        ConditionsConfig(names=())
    with pytest.raises(ValueError, match=r"template must contain \{\}"):
        ConditionsConfig(template="a digit")


def test_a_subset_of_classes_keeps_their_indices() -> None:
    config = ConditionsConfig(names=("a", "b", "c"), template="{}", classes=(2, 0))
    assert config.conditions() == [
        Condition(text="c", class_index=2),
        Condition(text="a", class_index=0),
    ]
    assert config.class_names == ("a", "b", "c")  # the policy's table keeps its size


def test_imagenet_by_name() -> None:
    config = ConditionsConfig(names="imagenet", template="a photo of a {}", classes=(0, 999))
    texts = [condition.text for condition in config.conditions()]
    assert texts == ["a photo of a tench", "a photo of a toilet paper"]
    assert len(config.class_names) == 1000
    with pytest.raises(DataError, match="1000 is not below 1000"):
        ConditionsConfig(names="imagenet", classes=(1000,)).conditions()


def test_captions_of_a_text_file(tmp_path: Path) -> None:
    file = tmp_path / "captions.txt"
    file.write_text("a cat\n\n  two dogs \n", encoding="utf-8")
    found = ConditionsConfig(captions=str(file)).conditions()
    assert found == [Condition(text="a cat"), Condition(text="two dogs")]
    stream = ConditionStream(found, 3, seed=0)
    assert Counter(c.text for c in drawn(stream, 4)) == {"a cat": 6, "two dogs": 6}


def test_a_file_that_was_written_anew_is_read_anew(tmp_path: Path) -> None:
    file = tmp_path / "captions.txt"
    config = ConditionsConfig(captions=str(file))
    for text in ("a cat", "a dog"):
        with replacing(file) as partial:
            partial.write_text(text)
        assert [each.text for each in config.conditions()] == [text]


def test_captions_of_parquet_with_and_without_features(tmp_path: Path) -> None:
    features = [[[1.0, 2.0]], [[3.0, 4.0], [5.0, 6.0]]]
    plain = pa.table({"text": ["a", "b"], "more": [1, 2]})
    pq.write_table(plain, tmp_path / "plain.parquet")
    pq.write_table(plain.append_column("features", [features]), tmp_path / "features.parquet")
    found = ConditionsConfig(captions=str(tmp_path / "plain.parquet")).conditions()
    assert [c.features for c in found] == [None, None]
    found = ConditionsConfig(captions=str(tmp_path / "features.parquet")).conditions()
    assert [c.text for c in found] == ["a", "b"]
    for condition, expected in zip(found, features):
        np.testing.assert_array_equal(features_of(condition), np.array(expected, np.float32))


def test_captions_as_the_encoder_writes_them(tmp_path: Path) -> None:
    file = tmp_path / "written.parquet"
    features = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    write_caption_features(file, ["a cat"], [features])
    (found,) = ConditionsConfig(captions=str(file)).conditions()
    assert found.text == "a cat"
    np.testing.assert_array_equal(features_of(found), features)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"words": ["a"]}, "name it with --column"),
        ({"text": ["a", None]}, "column 'text', row 1: found None"),
        ({"text": ["a"], "features": [[[1.0], [2.0, 3.0]]]}, "column 'features', row 0"),
        ({"text": pa.array([], pa.string())}, "holds no caption"),
    ],
)
def test_wrong_captions_are_named(tmp_path: Path, table: dict, message: str) -> None:
    pq.write_table(pa.table(table), tmp_path / "bad.parquet")
    with pytest.raises(DataError, match=message):
        ConditionsConfig(captions=str(tmp_path / "bad.parquet")).conditions()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"classes": (10,)}, "classes reach to 10, but names has 10: 0 to 9"),
        ({"classes": (1, 1)}, "must be distinct"),
        ({"classes": (1,), "captions": "x.txt"}, "captions have no classes"),
    ],
)
def test_impossible_choices_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConditionsConfig(**fields)


def test_names_may_be_given_on_the_command_line_and_in_yaml() -> None:
    from learner.config import validate
    from learner.run import parse

    _, config, _ = parse(["--conditions.names", "imagenet"])
    assert len(config.conditions.class_names) == 1000
    _, config, _ = parse(["--conditions.names", "cat", "dog"])
    assert config.conditions.class_names == ("cat", "dog")
    assert len(validate({"conditions": {"names": "imagenet"}}, "x").conditions.class_names) == 1000


def caption_file(path: Path, kind: str, features: list[np.ndarray], group: int) -> None:
    texts = [f"caption {row}" for row in range(len(features))]
    if kind == "ours":
        write_caption_features(path, texts, features)
    else:
        table = pa.table({"text": texts, "features": [rows.tolist() for rows in features]})
        pq.write_table(table, path, row_group_size=group)


@pytest.mark.parametrize("kind", ["ours", "theirs"])
def test_features_are_read_by_row_where_they_are_used(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 1 MB each, none travels and few are kept; what is read are the bits that were written."""
    generator, path = np.random.default_rng(0), tmp_path / f"{kind}.parquet"
    width = 2048 if kind == "ours" else 16
    features = [
        generator.normal(size=(1 + row % 120, width)).astype(np.float32) for row in range(30)
    ]
    caption_file(path, kind, features, 7)
    monkeypatch.chdir(tmp_path)
    found = ConditionsConfig(captions=path.name).conditions()
    assert len(pickle.dumps(found)) < 200 * len(found)
    assert pickle.loads(pickle.dumps(found)) == found
    monkeypatch.chdir("/")
    for row in (29, 0, 13, 6, 7, 13):
        read = features_of(found[row])
        assert read.dtype == np.float32
        assert not read.flags.writeable
        np.testing.assert_array_equal(read, features[row])


@pytest.mark.parametrize("kind", ["ours", "theirs"])
@pytest.mark.parametrize("fault", ["gone", "other numbers", "fewer rows", "no features", "damaged"])
def test_a_file_that_is_gone_or_changed_is_an_error_where_it_is_read(
    tmp_path: Path, kind: str, fault: str
) -> None:
    path = tmp_path / "captions.parquet"
    features = [np.full((2, 3), row, np.float32) for row in range(4)]
    caption_file(path, kind, features, 2)
    condition = ConditionsConfig(captions=str(path)).conditions()[3]
    if fault == "gone":
        path.unlink()
    elif fault == "other numbers":
        caption_file(path, kind, [*features[:3], features[3].reshape(3, 2)], 2)
    elif fault == "fewer rows":
        caption_file(path, kind, features[:2], 2)
    elif fault == "no features":
        pq.write_table(pa.table({"text": ["a"] * 4}), path)
    else:
        path.write_bytes(path.read_bytes()[:50])
    expected = {
        "gone": "not there on .*storage that every node",
        "damaged": "not readable any more",
    }
    with pytest.raises(DataError, match=expected.get(fault, "row 3 is not what it was")):
        features_of(condition)


def test_captions_that_cannot_be_read_alone_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "captions.parquet"
    features = [np.ones((8, 64), np.float32) * row for row in range(40)]
    monkeypatch.setattr("actors.text.features.LARGEST_ROW_GROUP", 30_000)
    caption_file(path, "theirs", [rows + np.random.rand(8, 64) for rows in features], 40)
    with pytest.raises(DataError, match=r"row group 0 holds 40 captions .* row_group_size=8"):
        ConditionsConfig(captions=str(path)).conditions()
    caption_file(path, "theirs", features, 8)
    assert len(ConditionsConfig(captions=str(path), template="{}!").conditions()) == 40
