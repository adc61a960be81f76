"""A job's figures at the endpoint that Prometheus scrapes, of a private Ray without dashboard."""

from __future__ import annotations

import re
import time
import urllib.request

import ray

from cluster.control.control_actor import Progress
from cluster.ray_backend.fleet import RayFleet
from cluster.ray_session.session import RaySession
from tests.distributed.stubs import echo_plan

LINE = re.compile(r"^(ray_tessera_\w+)\{(.*)\} (\S+)$", re.MULTILINE)
LONGEST_S = 60.0


def scraped(run: str) -> dict[tuple[str, ...], float]:
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        text = answer.read().decode()
    found = {}
    for name, written, value in LINE.findall(text):
        labels = dict(re.findall(r'(\w+)="([^"]*)"', written))
        if labels.get("run") == run:
            own = (labels[key] for key in ("role", "state", "reward", "figure") if key in labels)
            found[name, *own] = float(value)
    return found


def test_figures_arrive_at_the_endpoint(ray_session: RaySession) -> None:
    """Within two of the 10 s in which Ray's processes report."""
    metrics = {"iteration": 3, "reward/clip": 0.25, "fid/ema": 3.5, "policy/entropy": 1.5}
    with RayFleet(echo_plan(), ray_session, run="watched") as fleet:
        fleet.report_progress(Progress(stage="training", done=3, iterations=12, metrics=metrics))
        deadline, found = time.monotonic() + LONGEST_S, dict[tuple[str, ...], float]()
        while ("ray_tessera_entropy",) not in found and time.monotonic() < deadline:
            fleet.serve_while(lambda: time.sleep(1))
            found = scraped("watched")
    expected = {
        ("ray_tessera_iterations_done",): 3,
        ("ray_tessera_iterations_planned",): 12,
        ("ray_tessera_restarts",): 0,
        ("ray_tessera_reward", "clip"): 0.25,
        ("ray_tessera_fid", "ema"): 3.5,
        ("ray_tessera_entropy",): 1.5,
        ("ray_tessera_workers", "learner", "serving"): 1,
        ("ray_tessera_workers", "sampler", "serving"): 1,
    }
    assert {name: found.get(name) for name in expected} == expected
