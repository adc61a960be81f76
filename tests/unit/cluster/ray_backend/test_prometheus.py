"""What Prometheus is shown of a job, without Ray; that it arrives: tests/distributed."""

from __future__ import annotations

import math
from dataclasses import replace

from cluster.control.control_actor import FleetStatus, Progress
from cluster.ray_backend.prometheus import samples
from tests.unit.cluster.test_status import STATUS

METRICS = {
    "iteration": 50,
    "reward/clip": 0.25,
    "reward_std/clip": 0.1,
    "fid/ema": 3.5,
    "policy/entropy": 1.5,
    "policy/reference_kl": math.nan,
    "time/sample": 2.0,
    "time/images_per_s": 80.0,
    "fid/lag": None,
}


def shown(status: FleetStatus) -> dict[tuple[str, ...], float]:
    found = [(s.name, *s.labels.values()) for s in samples(status)]
    assert len(set(found)) == len(found)
    return dict(zip(found, (sample.value for sample in samples(status)), strict=True))


def test_figures_of_a_run() -> None:
    status = replace(STATUS, progress=Progress(done=50, iterations=200, metrics=METRICS))
    assert shown(status) == {
        ("tessera_iterations_done",): 50,
        ("tessera_iterations_planned",): 200,
        ("tessera_restarts",): 2,
        ("tessera_workers", "learner", "serving"): 2,
        ("tessera_workers", "moments-server", "serving"): 1,
        ("tessera_workers", "sampler", "serving"): 1,
        ("tessera_workers", "sampler", "starting"): 1,
        ("tessera_workers", "sampler", "draining"): 0,
        ("tessera_queued", "sampler"): 3,
        ("tessera_reward", "clip"): 0.25,
        ("tessera_fid", "ema"): 3.5,
        ("tessera_entropy",): 1.5,
        ("tessera_phase_seconds", "sample"): 2.0,
        ("tessera_images_per_second",): 80.0,
    }


def test_a_name_has_the_same_labels_everywhere() -> None:
    labels: dict[str, tuple[str, ...]] = {}
    status = replace(STATUS, progress=Progress(done=50, iterations=200, metrics=METRICS))
    for sample in samples(status):
        assert labels.setdefault(sample.name, tuple(sample.labels)) == tuple(sample.labels)


def test_images_of_an_evaluation_and_a_learner_that_is_lost() -> None:
    (learner, *_) = STATUS.singles
    lost = replace(STATUS, singles=(replace(learner, state="lost"),), pools=())
    found = shown(replace(lost, progress=Progress(done=1000, iterations=50_000, unit="image")))
    assert found == {
        ("tessera_images_done",): 1000,
        ("tessera_images_planned",): 50_000,
        ("tessera_restarts",): 2,
        ("tessera_workers", "learner", "serving"): 0,
    }
