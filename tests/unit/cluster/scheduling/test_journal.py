"""A role that is brought back from a journal is the one that was lost, whenever that happened."""

from __future__ import annotations

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.scheduling.journal import Journal


class Counter:
    """A role whose state tells every call it was made of, in order."""

    def __init__(self) -> None:
        self.reference, self.made = "", [0]

    def set_reference(self, name: str) -> None:
        self.reference = name

    def seed(self, start: int) -> None:
        self.made = [start]

    def commit(self, number: int, *, run: str) -> int:
        self.made.append(number * len(run))
        return sum(self.made)

    def state(self) -> bytes:
        return msgpack.packb(self.made)

    def restore(self, state: bytes) -> None:
        self.made = msgpack.unpackb(state)


def journal() -> Journal:
    return Journal(lasting=["set_reference"], beginning=["seed"], changing=["commit"])


def revived(kept: Journal) -> Counter:
    role = Counter()
    for call in kept.replay():
        getattr(role, call.method)(*call.args, **dict(call.kwargs))
    return role


STEP = st.one_of(
    st.tuples(st.just("commit"), st.integers(1, 9)),
    st.tuples(st.just("seed"), st.integers(1, 9)),
    st.tuples(st.just("set_reference"), st.sampled_from("ab")),
    st.just(("ask", 0)),  # for the state; the answer comes later
    st.just(("hear", 0)),
    st.just(("restore", 0)),  # the state that was heard last
)


@settings(max_examples=300, deadline=None)
@given(st.lists(STEP, max_size=30))
def test_what_was_lost_at_any_moment_comes_back(steps: list[tuple[str, object]]) -> None:
    role, kept, asked = Counter(), journal(), []
    heard = role.state()
    for method, value in steps:
        if method == "ask":
            asked.append((kept.position, role.state()))
        elif method == "hear" and asked:
            position, heard = asked.pop(0)
            kept.covers(position, heard)
        elif method == "restore":
            role.restore(heard)
            kept.record("restore", (heard,), {})
        elif method in ("commit", "seed", "set_reference"):
            more = {"run": "abc"} if method == "commit" else {}
            getattr(role, method)(value, **more)
            kept.record(method, (value,), more)
        back = revived(kept)
        assert (back.made, back.reference) == (role.made, role.reference)


def test_a_state_shortens_the_journal() -> None:
    kept = journal()
    for number in range(5):
        kept.record("commit", (number,), {"run": "a"})
    kept.covers(3, b"state of the first three")
    assert [call.method for call in kept.replay()] == ["restore", "commit", "commit"]
    assert kept.length == 3


def test_questions_are_not_recorded() -> None:
    kept = journal()
    kept.record("state", (), {})
    kept.record("fingerprint", (np.zeros(1),), {})
    assert kept.replay() == []


@pytest.mark.parametrize("position", [0, 7])
def test_a_state_of_before_or_beyond_is_left_aside(position: int) -> None:
    kept = journal()
    kept.record("commit", (1,), {"run": "a"})
    kept.covers(position, b"")
    assert [call.method for call in kept.replay()] == ["commit"]
