"""The command that lists a cluster's nodes and waits for them."""

from __future__ import annotations

import pytest

import cluster.deploy.nodes
from cluster.deploy.nodes import main
from cluster.errors import FleetError
from cluster.placement.nodes import Node
from cluster.ray_session.session import RayConfig

NODES = [Node("10.0.0.1", 8, 2), Node("10.0.0.2", 7.5, 1.25), Node("10.0.0.3", 0)]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Addresses that were asked; a cluster gains a node with each."""
    addresses: list[str] = []

    def free_nodes(config: RayConfig) -> list[Node]:
        addresses.append(config.address)
        return NODES[: len(addresses)]

    monkeypatch.setattr(cluster.deploy.nodes, "free_nodes", free_nodes)
    monkeypatch.setattr(cluster.deploy.nodes, "POLL_S", 0.01)
    return addresses


def test_nodes_are_listed_with_what_is_free(
    asked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--address", "10.0.0.1:6379"]) == 0
    assert asked == ["10.0.0.1:6379"]
    assert capsys.readouterr().out.split() == ["10.0.0.1", "free:", "8", "CPUs,", "2", "GPUs"]


def test_it_waits_for_the_number(asked: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--wait", "3", "--within", "60"]) == 0
    assert asked == ["auto"] * 3
    assert "10.0.0.2" in capsys.readouterr().out


def test_too_few_are_an_error_that_names_them(
    asked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--wait", "2", "--within", "0"]) == 1
    said = capsys.readouterr().err
    assert "error: 1 of 2 nodes joined within 0 s: 10.0.0.1. On the others" in said


def test_no_cluster_is_an_error_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(config: RayConfig) -> list[Node]:
        raise FleetError("no Ray cluster answers")

    monkeypatch.setattr(cluster.deploy.nodes, "free_nodes", none)
    assert main(["--wait", "2"]) == 1
    assert capsys.readouterr().err == "error: no Ray cluster answers\n"
