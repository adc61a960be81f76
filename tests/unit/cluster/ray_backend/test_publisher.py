"""When a broadcast group is formed, left and given up; without Ray."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cluster.ray_backend import collective, publisher
from cluster.ray_backend.publisher import Publisher
from cluster.ray_backend.transports import COLLECTIVE


class Actors:
    """Records what actors are asked; `answers` are there at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[str, str]] = []
        self.answers: dict[object, str] = {}
        self.failure = ""
        fake = SimpleNamespace(wait=lambda refs, **_: (refs, []), get=self.answers.__getitem__)
        monkeypatch.setattr(publisher, "ray", fake)
        monkeypatch.setattr(publisher, "call_inside", self.call_inside)
        self.learner = SimpleNamespace(snapshot=SimpleNamespace(remote=lambda: "snapshot"))

    def call_inside(
        self, handle: Any, function: Any, *_: Any, group: str = "", num_returns: int = 1
    ) -> Any:
        who = handle if isinstance(handle, str) else "learner"
        self.asked.append((who, function.__name__))
        ref = object()
        self.answers[ref] = self.failure if who == "two" and function is collective.receive else ""
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
    assert publishing.publish([actors.learner], []).number == 0  # nobody serves yet


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
    assert [who for who, what in actors.asked if what == "leave"] == ["learner", "one", "two"]
    assert publish("one", "two") == 2  # it succeeds: that was no habit
    assert publish("one", "two", failure="no route to host") == 3
    assert publish("one", "two", "three", failure="no route to host") == 4
    assert publish("one", "two", "three", failure="no route to host") == 5
    assert publish("one", "two", "three") == 0
    assert [line.rpartition("store, ")[2] for line in logged if "(no route to host)" in line] == [
        *["and the next one forms a new group"] * 3,
        "as all later ones: that was 2 times in succession",
    ]
