from __future__ import annotations

from collections import Counter

import pytest

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
