"""Placement groups on a cluster of three nodes: where workers are, what they reserve, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

LIMIT_S = 300.0


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.distributed.placement.placing"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def test_workers_are_where_their_options_say(found: dict[str, Any]) -> None:
    assert found["placed"]["nodes"] == {
        "learner": "learner",  # H100
        "moments-server": "head",  # tessera-role=!gpu
        "sampler-0": "gpu",
        "sampler-1": "gpu",
        "reward-server-0": "gpu",
        "reward-server-1": "gpu",
    }


def test_they_reserve_what_the_plan_says_and_once(found: dict[str, Any]) -> None:
    placed = found["placed"]
    assert placed["groups"] == 4  # learner, moments server, two pairs
    assert placed["reserved"] == [[0.1, 0.0], [1.4, 2.0], [0.1, 1.0]]


def test_a_replacement_takes_the_place_of_its_predecessor(found: dict[str, Any]) -> None:
    placed = found["placed"]
    assert placed["replaced"] == "gpu"
    assert placed["reserved again"] == placed["reserved"]
    assert placed["groups again"] == placed["groups"]


def test_an_added_worker_that_does_not_fit_says_so_at_once(found: dict[str, Any]) -> None:
    *fit, waits = found["placed"]["waits"]
    assert fit == ["", "", ""]
    assert found["placed"]["added"] == "gpu"  # a reward server
    assert found["placed"]["said"] == [f"sampler-3 waits for room: {waits}"]
    assert waits.startswith("no node has room for sampler-3 (0.5 CPU, 0.75 GPU)")
    assert "(0.9 CPUs, 0 GPUs): no GPU has 0.75 free" in waits  # of the node with three


def test_what_leaves_gives_its_room_back(found: dict[str, Any]) -> None:
    placed = found["placed"]
    assert placed["scaled back"] == placed["reserved"]
    assert placed["at the end"] == [[0.0, 0.0]] * 3
    assert placed["groups left"] == 0


def test_what_no_node_has_is_refused_within_seconds(found: dict[str, Any]) -> None:
    refused = found["no label"]
    assert "no node has room for sampler-0" in refused["why"]
    assert refused["why"].count("needed is tessera-role=gpus") == 3  # nodes
    assert (refused["groups"], refused["seconds"] < 5) == (0, True)
    together = found["no pair"]["why"]
    assert "asks for 5 GPUs, but there are 4" in together


def test_what_others_take_meanwhile_is_refused_in_time(found: dict[str, Any]) -> None:
    taken = found["taken"]
    assert taken["others"] == []
    assert "was not placed within 2 s (--placement.wait-s)" in taken["why"]
    assert "no node has room for" in taken["why"]
    assert (taken["groups"], 2 <= taken["seconds"] < 10) == (2, True)  # those of the others


def test_a_killed_driver_leaves_nothing_reserved(found: dict[str, Any]) -> None:
    assert found["killed"] == {"late": "[]", "held": 1.0, "left": [[0.0, 0.0]] * 3}


@pytest.mark.slow
def test_the_autoscaler_starts_what_is_missing_and_is_not_kept_at_it() -> None:
    command = [sys.executable, "-m", "tests.distributed.placement.autoscaled"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["nodes"], found["asked"]) == ([1, 2], True)
    assert (found["held"], found["withdrawn"]) == ([], [[], []])
    assert "5.3 CPUs are asked for by name" in found["refused"]
    assert "the autoscaler was asked for nodes 10 s ago" in found["refused"]
