"""Distribution rewards in several feature spaces, from the configuration to the records."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from cluster.errors import ConfigError
from cluster.fleet import InlineFleet
from cluster.messages import MAIN_SPACE
from learner.capacity.seconds import moments
from learner.capacity.simulation import simulate
from learner.config import dump, parse_yaml, to_dict
from learner.experiment import Experiment
from learner.fleet_plan import fleet_plan
from learner.loop import Iteration
from learner.monitoring.console import RunConsole
from learner.monitoring.metrics import read_metrics, repeatable
from learner.preflight import preflight
from learner.runs.run_dir import RunDirectory
from rewards.config import NETWORKS, RewardServerConfig
from rewards.preflight import server_work
from tests.small_run import fingerprint, run_training, small_config
from tests.unit.learner.capacity.test_simulation import cluster, times

PIXELS = {"features": {"network": "pixels"}, "seed_images": 40, "weight": 2.0}
CLIP = {
    "features": {"network": "clip", "model": f"{NETWORKS}/clip"},
    "seed_images": 80,
    "weight": 0.0,
    "covariance": "diagonal",
    "decay": 0.25,
}
FURTHER = {"pixels": PIXELS, "clip": CLIP}
FIGURES = {"ema", "batch", "effective_size", "gap", "bias", "lag", "positive_share"}


def recorded(run: RunDirectory, count: int) -> bool:
    return run.metrics.is_file() and len(read_metrics(run.metrics)) >= count


def trained(iterations: int = 2, **rewards: Any) -> list[Iteration]:
    config = small_config(rewards=rewards, iterations=iterations)
    with InlineFleet(fleet_plan(config)) as fleet:
        return run_training(config, fleet)


@pytest.fixture(scope="module")
def three() -> list[Iteration]:
    return trained(further=FURTHER)


def test_every_space_has_a_reward_and_metrics(three: list[Iteration]) -> None:
    first, last = three[0], three[1].metrics
    assert [*first.advantages.rewards][-3:] == ["loo_fid", "loo_fid/pixels", "loo_fid/clip"]
    for prefix in ("fid/", "fid/pixels/", "fid/clip/"):
        assert {f"{prefix}{name}" for name in FIGURES} < last.keys()
    assert {"reward/loo_fid/pixels", "reward_std/loo_fid/clip", "moments/version"} < last.keys()
    assert last["fid/clip/effective_size"] < last["fid/effective_size"]
    size = {space: group.shape for space, group in first.groups[0].scores.features.items()}
    assert size == {MAIN_SPACE: (4, 64), "pixels": (4, 64), "clip": (4, 32)}


def test_a_space_without_a_weight_changes_nothing_else(three: list[Iteration]) -> None:
    """The first iteration's rewards in one space do not depend on the others; with weight 0 nothing
    of the run does."""
    alone = trained()
    logged = trained(further={"clip": CLIP | {"seed_images": 40}})
    for ours, theirs in zip(fingerprint(alone), fingerprint(logged)):
        assert ours[0] == {name: theirs[0][name] for name in ours[0]}
        assert ours[1] == theirs[1]
    ours, theirs = alone[0].advantages, three[0].advantages
    np.testing.assert_array_equal(ours.rewards["loo_fid"], theirs.rewards["loo_fid"])
    weighed = ours.values + 2.0 * theirs.normalised["loo_fid/pixels"]
    np.testing.assert_allclose(theirs.values, weighed, rtol=1e-5, atol=1e-6)


def test_a_space_twice_is_a_weight_twice() -> None:
    """The main space's network and settings as a further space: the same rewards, to the bit."""
    twice = trained(1, further={"again": to_dict(small_config())["rewards"]["loo_fid"]})
    double = trained(1, loo_fid={"weight": 2 * small_config().rewards.loo_fid.weight})
    for one, other in zip(twice, double):
        rewards = one.advantages.rewards
        np.testing.assert_array_equal(rewards["loo_fid"], rewards["loo_fid/again"])
        np.testing.assert_allclose(one.advantages.values, other.advantages.values, atol=1e-5)


def test_a_run_is_recorded_and_resumed(tmp_path: Path) -> None:
    output = {"checkpoint_every": 1, "gallery_every": 0}
    config = small_config(rewards={"further": FURTHER}, evaluation={"num_images": 0}, iterations=2,
                          output=output)  # fmt: skip
    runs = []
    for name, ends in {"whole": [2], "resumed": [1, 2]}.items():
        run = RunDirectory.create(str(tmp_path / name), config)
        for end in ends:
            with InlineFleet(fleet_plan(config)) as fleet, RunConsole(2) as console:
                Experiment(config, run, fleet, console, partial(recorded, run, end)).run()
        runs.append(run)
    found = [[repeatable(row) for row in read_metrics(run.metrics)] for run in runs]
    assert len(found[0]) == 2
    assert found[0] == found[1]
    columns = pq.read_schema(sorted(runs[0].rollouts.glob("*.parquet"))[-1]).names
    assert {"reward_loo_fid", "reward_loo_fid/pixels", "reward_loo_fid/clip"} < {*columns}
    assert "loo_fid/pixels" in runs[0].report.read_text()


def test_a_simulated_run_has_them_too() -> None:
    config = small_config(rewards={"further": FURTHER})
    found = simulate(config, times(commit=0.5, score={"reward-server": 0.25}), cluster(),
                     iterations=2)  # fmt: skip
    assert found.phases["moments"] == pytest.approx(0.5)


def test_the_planner_counts_every_space() -> None:
    server = RewardServerConfig(rewards=small_config(rewards={"further": FURTHER}).rewards)
    options = [name for name in server_work(server, features=True) if "features" in name]
    assert options == [
        "rewards.features",
        *(f"rewards.further.{name}.features" for name in FURTHER),
    ]
    both = moments(144, [(2048, True), (1024, False)]).seconds
    alone = [moments(144, [space]).seconds for space in ((2048, True), (1024, False))]
    assert both == pytest.approx(sum(alone))


@pytest.mark.parametrize(
    ("further", "message"),
    [
        ({"second": PIXELS}, "further: expected names"),
        ({"a": {"weigth": 1.0}}, "did you mean 'weight'?"),
        ({"a": {"features": {"network": "pixls"}}}, r"rewards\.further\.a\.features\.network"),
        ({"a": {"seed_images": 7}}, r"rewards\.further\.a\.seed_images must be at least 8"),
        ({"a": {"kind": "sliding", "seed_from": "g.npz"}}, "does not go with kind=sliding"),
    ],
)
def test_impossible_spaces_are_refused(further: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small_config(rewards={"further": further})


def test_they_survive_a_file() -> None:
    config = small_config(rewards={"further": FURTHER})
    assert parse_yaml(dump(config), "test") == config
    assert config.rewards.sampled_for_seed == 80


def test_what_is_missing_is_found_before_a_run(tmp_path: Path) -> None:
    np.savez(tmp_path / "five.npz", mu=np.zeros(5), sigma=np.eye(5))
    spaces = {
        "gone": {"features": {"network": "convnet", "checkpoint": str(tmp_path / "no.pt")}},
        "other": PIXELS | {"reference": str(tmp_path / "five.npz")},
        "start": CLIP | {"seed_from": str(tmp_path / "none.npz")},
    }
    found = preflight(small_config(rewards={"further": spaces})).problems
    fields = {problem.split(": ")[0] for problem in found}
    assert fields == {
        "rewards.further.gone.features.checkpoint",
        "rewards.further.gone.reference",  # of which network nothing is known
        "rewards.further.other.reference",
        "rewards.further.start.seed_from",
    }
    assert any("expected moments of 64 dimensions" in problem for problem in found)
