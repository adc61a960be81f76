from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cluster.placement.config import PlacementConfig
from cluster.placement.nodes import Node
from cluster.placement.refusal import NoRoomError
from cluster.ray_session import node_autoscaler, private
from cluster.ray_session.node_autoscaler import place_with_autoscaler
from cluster.ray_session.private import NodeAutoscaler
from cluster.roles import FleetPlan, Resources, Role

SMALL = Node("head", 1.0, used={"CPU": 3.0})
LARGE = Node("new", 8.0, 2.0, {"tessera-role": "sampler"})


def plan(**options: Any) -> FleetPlan:
    def role(name: str, **resources: Any) -> Role:
        return Role(name=name, factory=object, config=None, resources=Resources(**resources))

    gpu = {"num_gpus": 1, "num_cpus": 2, "labels": {"tessera-role": "sampler"}}
    return FleetPlan(
        sampler=role("sampler", **gpu),
        reward_server=role("reward-server"),
        moments_server=role("moments-server"),
        learner=role("learner", num_gpus=0.5, accelerator_type=""),
        placement=PlacementConfig(**options),
    )


class Session:
    """Of a cluster with other nodes at each look."""

    joined = True

    def __init__(self, *looks: list[Node]) -> None:
        self._looks = list(looks)

    @property
    def nodes(self) -> list[Node]:
        return self._looks.pop(0) if len(self._looks) > 1 else self._looks[0]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list, list]]:
    """What the autoscaler is asked for; there is one, and time passes at once."""
    found: list[tuple[list, list]] = []
    now = [0.0]
    monkeypatch.setattr(private, "request_nodes", lambda *each: found.append(each))
    monkeypatch.setattr(private, "autoscaler", lambda: NodeAutoscaler(found=True))
    monkeypatch.setattr(node_autoscaler.clock, "monotonic", lambda: now[0])
    monkeypatch.setattr(node_autoscaler.clock, "sleep", lambda s: now.__setitem__(0, now[0] + s))
    return found


def test_nodes_are_asked_for_and_the_request_is_withdrawn(asked: list[tuple[list, list]]) -> None:
    there = [SMALL]
    found = place_with_autoscaler(plan(), Session(there, there, there, [SMALL, LARGE]))  # type: ignore[arg-type]
    assert {seat.worker: seat.node for seat in found.seats}["sampler"] == "new"
    (bundles, selectors), withdrawn = asked
    assert withdrawn == ([], [])
    assert bundles == [
        {"CPU": 1.0, "GPU": 0.5},  # learner
        {"CPU": 1.0},  # moments server
        {"CPU": 2.0, "GPU": 1.0},
        {"CPU": 1.0},  # reward server
        {"CPU": 3.0},  # what others have of the head
    ]
    assert selectors == [{}, {}, {"tessera-role": "sampler"}, {}, {}]


def test_what_fits_asks_for_nothing(asked: list[tuple[list, list]]) -> None:
    assert place_with_autoscaler(plan(), Session([SMALL, LARGE])).seats  # type: ignore[arg-type]
    assert asked == []


@pytest.mark.parametrize(
    ("options", "joined", "there"),
    [({"autoscale": False}, True, True), ({}, False, True), ({}, True, False)],
    ids=["not wanted", "private Ray", "no autoscaler"],
)
def test_without_an_autoscaler_it_is_refused_at_once(
    asked: list[tuple[list, list]],
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    joined: bool,
    there: bool,
) -> None:
    monkeypatch.setattr(private, "autoscaler", lambda: NodeAutoscaler(found=there))
    monkeypatch.setattr(Session, "joined", joined)
    with pytest.raises(NoRoomError, match="no node has room for sampler"):
        place_with_autoscaler(plan(**options), Session([SMALL]))  # type: ignore[arg-type]
    assert asked == []


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (NodeAutoscaler(True, infeasible=True), "has no type of node that would hold it"),
        (NodeAutoscaler(True), r"was asked for nodes 60 s ago.*autoscale-wait-s waits longer"),
    ],
)
def test_what_the_autoscaler_does_not_start_is_refused(
    asked: list[tuple[list, list]],
    monkeypatch: pytest.MonkeyPatch,
    state: NodeAutoscaler,
    message: str,
) -> None:
    monkeypatch.setattr(private, "autoscaler", lambda: state)
    with pytest.raises(NoRoomError, match=message) as caught:
        place_with_autoscaler(plan(autoscale_wait_s=60), Session([SMALL]))  # type: ignore[arg-type]
    assert "no node has room for sampler" in str(caught.value)
    assert asked[-1] == ([], [])


def test_the_request_is_withdrawn_after_an_interrupt(
    asked: list[tuple[list, list]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(node_autoscaler.clock, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        place_with_autoscaler(plan(), Session([SMALL]))  # type: ignore[arg-type]
    assert [len(bundles) for bundles, _ in asked] == [5, 0]


def test_progress_is_said(asked: list[tuple[list, list]], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    waiting = [[SMALL]] * 40
    place_with_autoscaler(replace(plan()), Session(*waiting, [SMALL, LARGE]))  # type: ignore[arg-type]
    said = [record.getMessage() for record in caplog.records]
    assert "asking the cluster's autoscaler for nodes" in said[0]
    assert sum("waiting for the autoscaler for" in line for line in said) == 2
