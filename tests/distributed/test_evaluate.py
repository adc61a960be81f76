"""Evaluations on Ray: several samplers keep what one in this process does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from cluster.fleet import Fleet, InlineFleet
from cluster.ray_backend.fleet import RayFleet
from cluster.ray_session.session import RaySession
from learner.config import RunConfig
from learner.evaluation.evaluation import Evaluation
from learner.evaluation.kept import samples as kept_samples
from learner.evaluation.rows import rows_of
from learner.evaluation.targets import Target
from learner.fleet_plan import sampling_plan
from rewards.metrics.evaluation import MetricSettings
from tests.small_run import small_config


def test_four_samplers_keep_what_one_does(
    ray_session: RaySession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_samples, "PART", 40)
    config = small_config(num_samplers=4, evaluation={"num_images": 120})
    rows = rows_of([Target(name="base", policy=config.policy)], config, (2,))

    @contextmanager
    def on_ray(config: RunConfig, samples: bool) -> Iterator[Fleet]:
        with RayFleet(sampling_plan(config), ray_session) as fleet:
            yield fleet

    @contextmanager
    def inline(config: RunConfig, samples: bool) -> Iterator[Fleet]:
        with InlineFleet(sampling_plan(config)) as fleet:
            yield fleet

    for name, open_fleet in (("four", on_ray), ("one", inline)):
        configs = {row.name: config for row in rows}
        evaluation = Evaluation(config, rows, configs, tmp_path / name)
        evaluation.sample(open_fleet)
        settings = MetricSettings(bootstrap=20, splits=1)
        evaluation.results(settings, {})
    results = [(tmp_path / name / "results.json").read_text() for name in ("four", "one")]
    assert results[0] == results[1]
    parts = sorted(path.relative_to(tmp_path / "one") for path in tmp_path.glob("one/**/*.npz"))
    assert len(parts) == 3 + 1  # and the real images
    for part in parts:
        with np.load(tmp_path / "one" / part) as one, np.load(tmp_path / "four" / part) as four:
            assert one.files == four.files
            for array in one.files:
                np.testing.assert_array_equal(one[array], four[array], err_msg=f"{part} {array}")
