"""When a broadcast group is formed, left and given up; without Ray."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cluster.ray_backend import collective, publisher
from cluster.ray_backend.publisher import Publisher
from cluster.ray_backend.relays import relay
from cluster.ray_backend.transports import COLLECTIVE, OBJECT_STORE


class Handle(str):
    """Of the learner: its name, with the method that is called by itself."""

    snapshot = SimpleNamespace(remote=lambda: "snapshot")


class Actors:
    """Records what actors are asked; `answers` are there at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[str, str]] = []
        self.given: list[tuple[Any, ...]] = []  # to those that pass weights on
        self.answers: dict[object, Any] = {}
        self.failure = ""
        self.answered = True
        fake = SimpleNamespace(
            ready=self.ready,
            get=self.answers.__getitem__,
            nodes_of=lambda handles: [self.nodes.get(str(handle), "") for handle in handles],
        )
        monkeypatch.setattr(publisher, "backend", fake)
        monkeypatch.setattr(publisher, "call_inside", self.call_inside)
        self.nodes: dict[str, str] = {}
        self.learner = Handle("learner")

    def ready(self, refs: list[object], **_: Any) -> tuple[list[object], list[object]]:
        return (refs, []) if self.answered else ([], refs)

    def left(self) -> list[str]:
        return [who for who, what in self.asked if what == "leave"]

    def call_inside(
        self, handle: Any, function: Any, *arguments: Any, group: str = "", num_returns: int = 1
    ) -> Any:
        self.asked.append((handle, function.__name__))
        if function is relay.pack:
            return "header", "size"
        if function in (relay.piece, relay.pass_on, relay.load):
            self.given.append((handle, function.__name__, *arguments))
            return f"{handle} {sum(who == handle for who, *_ in self.given)}"
        ref, fails = object(), handle == "two" and function is collective.receive
        self.answers[ref] = self.failure if fails else ""
        return ref if num_returns == 1 else ("snapshot", ref)

    def formed(self) -> int:
        return self.asked.count(("learner", "open_rendezvous"))


def test_a_group_is_formed_anew_when_its_members_change(monkeypatch: pytest.MonkeyPatch) -> None:
    actors, publishing = Actors(monkeypatch), Publisher(COLLECTIVE)
    for members, formed in ((["one"], 1), (["one"], 1), (["one", "two"], 2), (["two"], 3)):
        weights = publishing.publish([actors.learner], members)
        assert (weights.snapshot, weights.members) == ("snapshot", tuple(members))
        assert actors.formed() == formed
    publishing.forget()  # another learner
    assert publishing.publish([actors.learner], ["two"]).number == 5
    assert actors.formed() == 4
    assert publishing.publish([actors.learner], []).number == 0  # none serves yet


def test_who_was_in_a_group_leaves_it_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the end of a broadcast that goes on would be taken for a failure of the next group."""
    actors, publishing = Actors(monkeypatch), Publisher(COLLECTIVE)
    actors.answered, actors.failure = False, "too late"
    publishing.publish([actors.learner], ["one", "two"])
    assert actors.left() == []
    publishing.publish([actors.learner], ["one"])
    assert actors.left() == ["learner", "one", "two"]
    actors.answered = True
    publishing.look()
    assert actors.left() == ["learner", "one", "two"]  # what "two" answers is of no concern
    publishing.forget()  # another learner
    assert actors.left() == ["learner", "one", "two", "one"]


def test_members_of_a_node_are_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    actors = Actors(monkeypatch)
    on = {"learner": "b", "one": "c", "two": "a", "three": "b", "four": "c", "five": "a"}
    actors.nodes = on
    samplers = [*list(on)[1:], "unknown"]
    Publisher(COLLECTIVE).publish([actors.learner], samplers)
    received = [who for who, what in actors.asked if what == "receive"]
    assert received == ["three", "unknown", "two", "five", "one", "four"]


def test_one_that_fails_twice_with_the_same_members_is_given_up(
    monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    actors, publishing = Actors(monkeypatch), Publisher(COLLECTIVE)

    def publish(*members: str, failure: str = "") -> int:
        actors.failure = failure
        number = publishing.publish([actors.learner], members).number
        publishing.look()
        return number

    assert publish("one", "two", failure="no route to host") == 1
    assert actors.left() == ["learner", "one", "two"]
    assert publish("one", "two") == 2  # it succeeds: that was no habit
    assert publish("one", "two", failure="no route to host") == 3
    assert publish("one", "two", "three", failure="no route to host") == 4
    assert publish("one", "two", "three", failure="no route to host") == 5
    assert publish("one", "two", "three") == 0
    assert [line.rpartition("store, ")[2] for line in logged if "(no route to host)" in line] == [
        *["and the next one forms a new group"] * 3,
        "as all later ones: that was 2 times in succession",
    ]


MB = 1 << 20


@pytest.mark.parametrize(
    ("nbytes", "count"),
    [(0, 32), (1, 1), (4 * MB - 1, 1), (4 * MB, 2), (100 * MB, 50), (14_000 * MB, 64)],
)
def test_how_many_pieces(nbytes: int, count: int) -> None:
    assert relay.pieces_of(nbytes) == count


def test_weights_are_passed_on_from_node_to_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every node but the learner's and the last one has one sampler that copies each piece of the
    node before; the others of a node read what it made."""
    actors, publishing = Actors(monkeypatch), Publisher(OBJECT_STORE)
    actors.answers["size"] = 4 * MB
    on = {"learner": "b", "one": "c", "two": "a", "three": "b", "four": "c", "five": "a"}
    actors.nodes = {**on, "six": "d"}
    samplers = [*list(on)[1:], "six", "unknown"]
    publishing.publish([actors.learner], samplers)  # in as many pieces as an unknown size has
    actors.given.clear()
    weights = publishing.publish([actors.learner], samplers)
    learners, a, c = (
        tuple(f"{who} {number}" for number in (1, 2)) for who in ("learner", "two", "one")
    )
    assert (weights.snapshot, weights.pieces) == ("header", learners)
    assert weights.copies == {"a": a, "c": c, "d": c}
    assert [call for call in actors.given if call[1] == "pass_on"] == [
        ("two", "pass_on", [*learners]),
        ("two", "pass_on", [learners[1]]),
        ("one", "pass_on", [*a]),
        ("one", "pass_on", [a[1]]),
    ]
    actors.given.clear()
    for who, nearest in (("five", a), ("six", c), ("three", ()), ("unknown", ()), ("late", ())):
        publishing.load(who, weights)
        assert actors.given.pop() == (who, "load", ["header"], [*nearest], [*learners])


@pytest.mark.parametrize("on", [{}, {"one": "home", "learner": "home", "two": "home"}])
def test_on_one_node_weights_are_one_object(
    on: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    actors, publishing = Actors(monkeypatch), Publisher(OBJECT_STORE)
    actors.nodes = on
    weights = publishing.publish([actors.learner], ["one", "two"])
    assert (weights.snapshot, weights.pieces, actors.asked) == ("snapshot", (), [])


def test_small_weights_are_one_object(monkeypatch: pytest.MonkeyPatch) -> None:
    actors, publishing = Actors(monkeypatch), Publisher(OBJECT_STORE)
    actors.nodes, actors.answers["size"] = {"learner": "a", "one": "b", "two": "c"}, 3 * MB
    assert publishing.publish([actors.learner], ["one", "two"]).pieces
    assert not publishing.publish([actors.learner], ["one", "two"]).pieces
    publishing.forget()  # another learner
    assert publishing.publish([actors.learner], ["one", "two"]).pieces
