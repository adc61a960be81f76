"""A node is lost with everything on it: the run goes on on what is left, and grows again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from cluster.fleet import InlineFleet
from learner.fleet_plan import fleet_plan
from tests.distributed.failures.node_loss import changed_options
from tests.distributed.failures.test_lost_workers import run_whole
from tests.small_run import recorded, small_config

LIMIT_S = 400.0


def test_a_node_is_lost_and_another_one_comes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.distributed.failures.node_loss", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["lost"], "nothing was on the node"
    assert found["serving_at_last"] == [2, 2]
    config = small_config(**changed_options())
    with InlineFleet(fleet_plan(config)) as fleet:
        expected = run_whole(config, fleet, tmp_path / "unharmed")
    assert recorded(tmp_path / "run") == expected
