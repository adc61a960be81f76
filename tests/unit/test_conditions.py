from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.caption_files import write_caption_features
from cluster.errors import DataError
from cluster.messages import Condition
from learner.conditions import ConditionsConfig, ConditionStream

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
        np.testing.assert_array_equal(condition.features, np.array(expected, np.float32))


def test_captions_as_the_encoder_writes_them(tmp_path: Path) -> None:
    file = tmp_path / "written.parquet"
    features = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    write_caption_features(file, ["a cat"], [features])
    (found,) = ConditionsConfig(captions=str(file)).conditions()
    assert found.text == "a cat"
    np.testing.assert_array_equal(found.features, features)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"words": ["a"]}, "needs a column 'text'"),
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
