"""What recording costs: at most 3 % of an iteration of the miniature."""

from __future__ import annotations

from cluster.fleet import InlineFleet
from learner.config import load_preset, merge, to_dict, validate
from learner.fleet_plan import fleet_plan
from tests.bench.iteration import recording_seconds
from tests.small_run import run_training

SHARE = 0.03


def test_recording_costs_little_of_an_iteration_of_the_miniature() -> None:
    """Processor time, the least of several passes, against the quickest iteration: a busy machine
    changes neither much."""
    changes = {"iterations": 3, "rewards": {"loo_fid": {"seed_images": 64}}}
    config = validate(merge(to_dict(load_preset("miniature")), changes), "test")
    with InlineFleet(fleet_plan(config)) as fleet:
        iterations = run_training(config, fleet)
    quickest = min(done.metrics["time/iteration"] for done in iterations)
    recording = recording_seconds(config, iterations[-1])
    print(f"recording {recording * 1000:.1f} ms of {quickest * 1000:.0f} ms")
    assert recording < SHARE * quickest
