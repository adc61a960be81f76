"""A node is lost with everything on it: the rest continues, and grows again with a new node."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.fleet import InlineFleet
from learner.fleet_plan import fleet_plan
from tests.distributed.failures.node_loss import GROUPS, changed_options, facts, stub_plan
from tests.distributed.failures.test_lost_workers import run_whole
from tests.distributed.stubs import requests
from tests.small_run import recorded, small_config

LIMIT_S = 400.0


def program(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.distributed.failures.node_loss", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_node_is_lost_in_mid_batch_and_another_one_comes() -> None:
    """Every group is answered, as it would have been without the loss."""
    found = program("batches")
    assert sorted(name.rpartition("-")[0] for name in found["lost"]) == ["reward-server", "sampler"]
    assert found["busy"], "no worker of the node had a group in hand"
    assert found["nodes"] == [[0, 1], [1, 1]]  # each with its own CPUs and GPUs
    assert found["serving_without"] == [1, 1]
    assert found["serving_at_last"] == [2, 2]
    assert found["restarts"] >= 2  # Ray may still choose the node until it takes it for lost
    with InlineFleet(stub_plan(seconds=0.0)) as fleet:
        fleet.broadcast(1)
        expected = facts(fleet.collect(fleet.submit(requests(GROUPS))))
    for batch in ("before", "during", "after"):
        assert found[batch] == expected, batch


@pytest.mark.slow  # with stubs: the test above
def test_a_whole_run_loses_a_node_and_gets_another_one(tmp_path: Path) -> None:
    found = program("run", str(tmp_path))
    assert found["lost"], "nothing was on the node"
    assert found["serving_at_last"] == [2, 2]
    config = small_config(**changed_options())
    with InlineFleet(fleet_plan(config)) as fleet:
        expected = run_whole(config, fleet, tmp_path / "unharmed")
    assert recorded(tmp_path / "run") == expected
