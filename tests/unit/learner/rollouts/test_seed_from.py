"""The history that starts from a file of moments instead of sampled images."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.errors import ConfigError, DataError
from cluster.fleet import InlineFleet
from cluster.messages import MAIN_SPACE
from learner.config import merge, validate
from learner.fleet_plan import fleet_plan
from learner.loop import Iteration, prepare, train
from learner.preflight import preflight
from learner.rollouts.feature_space import RewardSpace, set_reference
from learner.run_target import RunTarget
from rewards.config import LooFidTerm
from rewards.distribution.config import MomentsConfig
from rewards.distribution.moments import Moments
from rewards.distribution.reference import Reference, read_stored, write_reference
from rewards.servers.space_history import SpaceHistory
from tests.small_run import fingerprint, plain_miniature, run_training, small_config
from tests.unit.learner.test_loop import Drawing

DIM = 6
GENERATOR = np.random.default_rng(5)
BASE = GENERATOR.normal(size=(300, DIM)) @ GENERATOR.normal(size=(DIM, DIM)) + 3
REAL = Reference.from_features(GENERATOR.normal(size=(400, DIM)) + 2)
BATCHES = [GENERATOR.normal(size=(20, DIM)) + 2.5 for _ in range(4)]


def written(path: Path, features: np.ndarray = BASE, **changes: Any) -> str:
    """As the public code's make_gen_stats.py writes it."""
    arrays: dict[str, Any] = {
        "mu": features.mean(0),
        "sigma": np.cov(features, rowvar=False),
        "sigma_diagonal": features.var(0, ddof=1),
        "count": np.array([len(features)]),
        "dims": np.array([features.shape[1]]),
    } | changes
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return str(path)


def server(**settings: Any) -> SpaceHistory:
    made = SpaceHistory(MomentsConfig(**{"decay": 0.9, **settings}))
    made.set_reference(REAL, "net")
    return made


@pytest.mark.parametrize(
    "settings", [{}, {"covariance": "diagonal"}, {"window": 100.0}, {"rebuild_every": 2}]
)
@pytest.mark.parametrize("ours", [False, True])
def test_it_is_the_start_that_sampling_the_same_images_gives(
    tmp_path: Path, settings: dict, ours: bool
) -> None:
    path = written(tmp_path / "g.npz")
    if ours:
        write_reference(path, Reference.from_features(BASE), images=len(BASE))
    sampled, read = server(**settings), server(**settings)
    fid = sampled.seed(BASE)
    covariance = settings.get("covariance", "full")
    assert read.seed(read_stored(path, covariance=covariance).moments()) == pytest.approx(fid, 1e-9)
    for iteration, batch in enumerate(BATCHES):
        for each in (sampled, read):
            each.refresh()
        valid = np.ones(len(batch), bool)
        expected, found = (each.commit(iteration, batch, valid) for each in (sampled, read))
        np.testing.assert_allclose(found.rewards, expected.rewards, rtol=1e-6, atol=1e-10)
        assert found.fid == pytest.approx(expected.fid, rel=1e-9)
        assert found.effective_size == expected.effective_size


def test_variances_alone_start_the_diagonal_form(tmp_path: Path) -> None:
    path = written(tmp_path / "g.npz", sigma=None)
    sampled, read = server(covariance="diagonal"), server(covariance="diagonal")
    fid = sampled.seed(BASE)
    moments = read_stored(path, covariance="diagonal").moments()
    assert read.seed(moments) == pytest.approx(fid, rel=1e-9)
    valid = np.ones(20, bool)
    expected, found = (each.commit(0, BATCHES[0], valid) for each in (sampled, read))
    np.testing.assert_allclose(found.rewards, expected.rewards, rtol=1e-9)


def test_a_checkpoint_needs_the_file_no_more(tmp_path: Path) -> None:
    path = Path(written(tmp_path / "g.npz"))
    first, again = server(), server()
    first.seed(pickle.loads(pickle.dumps(read_stored(path).moments())))  # as on Ray
    path.unlink()
    again.restore(first.state())
    valid = np.ones(20, bool)
    answers = [each.commit(0, BATCHES[0], valid) for each in (first, again)]
    np.testing.assert_array_equal(answers[0].rewards, answers[1].rewards)
    assert first.state() == again.state()


def test_what_a_server_cannot_start_from(tmp_path: Path) -> None:
    moments = Moments.from_features(BASE)
    with pytest.raises(DataError, match="a sliding window starts from features"):
        server(kind="sliding").seed(moments)
    with pytest.raises(DataError, match="expected moments of 5 dimensions"):
        server().seed(Moments.from_features(BASE[:, :5]))
    variances = Reference(REAL.mu, np.diag(REAL.sigma.diagonal()), diagonal=True, source="f.npz")
    with pytest.raises(DataError, match=r"f.npz holds variances alone .*covariance to diagonal"):
        server().set_reference(variances, "net")
    server(covariance="diagonal").set_reference(variances, "net")


@pytest.mark.parametrize(
    ("settings", "why"),
    [({"joint": True}, "joint, which needs"), ({"kind": "sliding"}, "kind=sliding, which needs")],
)
def test_forms_that_need_the_images_are_refused(settings: dict, why: str) -> None:
    with pytest.raises(
        ValueError, match=rf"seed_from 'g.npz' does not go with {why}.*leave it emp"
    ):
        LooFidTerm(seed_from="g.npz", **settings)
    with pytest.raises(ConfigError, match=why):
        run(seed_from="g.npz", **settings)


# What is sampled, and in which space.


class Fleet(Drawing):
    """Features of two dimensions."""

    def __init__(self, dim: int = 2, fingerprint: str = "net-1") -> None:
        super().__init__()
        self._dim, self._fingerprint = dim, fingerprint
        self.moments_of: Moments | None = None

    def feature_dim(self, panel: str, space: str) -> int:
        return self._dim

    def fingerprint(self, panel: str, space: str) -> str:
        return self._fingerprint

    def seed(self, starts: Mapping[str, Any]) -> dict[str, float]:
        start = starts[MAIN_SPACE]
        assert isinstance(start, Moments)
        self.moments_of = start
        return {MAIN_SPACE: 1.5}


def run(**changes: Any) -> Any:
    return small_config(rewards={"loo_fid": {"seed_images": 10_000, **changes}})


def test_no_more_is_sampled_than_an_iterations_images(tmp_path: Path) -> None:
    """For the entropy, which controllers are anchored to."""
    path = written(tmp_path / "g.npz", BASE[:, :2])
    config, fleet = run(seed_from=path), Fleet()
    base = prepare(config, fleet, {MAIN_SPACE: RewardSpace()})  # type: ignore[arg-type]
    assert fleet.asked == config.groups_per_iteration * config.rollouts_per_group == 16
    assert (base.fids, base.images) == ({MAIN_SPACE: 1.5}, {MAIN_SPACE: 300})
    assert 0.4 < base.entropy < 0.6
    assert fleet.moments_of is not None
    np.testing.assert_allclose(fleet.moments_of.cov, np.cov(BASE[:, :2].T, ddof=0))
    assert fleet.moments_of.weight == 300


@pytest.mark.parametrize(
    ("fleet", "message"),
    [
        (Fleet(dim=64), r"g\.npz: expected moments of 64 dimensions, as .* found 2"),
        (Fleet(fingerprint="net-2"), r"g\.npz: fingerprint: expected features 'net-2'.*'net-1'"),
    ],
    ids=["dimension", "network"],
)
def test_moments_of_another_space_are_refused(tmp_path: Path, fleet: Fleet, message: str) -> None:
    path = tmp_path / "g.npz"
    write_reference(path, Reference.from_features(BASE[:, :2], "net-1"), images=300)
    spaces = {MAIN_SPACE: RewardSpace()}
    with pytest.raises(DataError, match=message):
        prepare(run(seed_from=str(path)), fleet, spaces)  # type: ignore[arg-type]
    assert fleet.asked == 0  # before anything is sampled


# The dry run.


def planned(path: str, **changes: Any) -> tuple[list[str], list[str]]:
    """Problems and notes."""
    term = {"loo_fid": {"seed_from": path, **changes}}
    values = merge(plain_miniature(), {"rewards": term})
    findings = preflight(validate(values, "test"))
    return findings.problems, findings.notes


WIDE = np.random.default_rng(1).normal(size=(200, 64))


def test_a_dry_run_says_what_the_history_starts_from(tmp_path: Path) -> None:
    path = written(tmp_path / "g.npz", WIDE)
    problems, notes = planned(path)
    assert problems == []
    (note,) = notes
    assert f"starts from {path}, moments of 200 images in 64 dimensions" in note
    assert "believed to be of 'convnet'" in note
    assert "seed_images are not sampled" in note
    _, notes = planned(written(tmp_path / "few.npz", WIDE[:20]))
    assert any("20 images, which give no full covariance in 64 dimensions" in n for n in notes)
    _, notes = planned(path, reference=path)
    assert any("this is the reference itself" in note for note in notes)


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({"count": None}, {}, r"count: expected the number of images"),
        ({"sigma": None}, {}, r"variances alone .*covariance to diagonal"),
        ({"fingerprint": np.array("convnet-0")}, {}, r"found those of 'convnet-0'"),
        ({"mu": WIDE[:, :9].mean(0), "sigma": np.eye(9), "dims": None}, {}, r"sigma_diagonal: exp"),
    ],
    ids=["no count", "variances", "network", "another shape"],
)
def test_a_dry_run_refuses_what_the_run_would(
    tmp_path: Path, changes: dict, settings: dict, message: str
) -> None:
    path = written(tmp_path / "g.npz", WIDE, **changes)
    ((problem,), _) = planned(path, **settings)
    assert problem.startswith("rewards.loo_fid.seed_from: ")
    assert re.search(message, problem), problem


def test_a_dry_run_names_a_missing_file_and_other_dimensions(tmp_path: Path) -> None:
    ((problem,), _) = planned(str(tmp_path / "none.npz"))
    assert "seed_from: " in problem
    assert "no such file" in problem
    ((problem,), _) = planned(written(tmp_path / "g.npz", BASE))
    assert "expected moments of 64 dimensions" in problem


def test_a_run_that_resumes_does_not_need_the_file(tmp_path: Path) -> None:
    """Its checkpoints hold the history; before the first one, the file is read again."""
    config = run(seed_from=str(tmp_path / "gone.npz"))
    directory = tmp_path / "runs" / "A"
    (directory / "checkpoints").mkdir(parents=True)
    target = RunTarget(directory, config)
    assert not target.begun
    assert "no such file" in preflight(config, begun=target.begun).problems[0]
    (directory / "checkpoints" / "step_000002").mkdir()
    assert target.begun
    assert RunTarget(directory, config, b"its config.yaml, from a URL").begun
    assert preflight(config, begun=target.begun).problems == []
    assert not RunTarget(directory).begun  # a new run


def test_a_run_that_starts_from_a_file_learns_the_same(tmp_path: Path) -> None:
    """The moments that a run sampled, written to a file and started from: the same iterations."""
    config = small_config(iterations=2)
    with InlineFleet(fleet_plan(config)) as fleet:
        fleet.broadcast(0)
        space = set_reference(config, fleet)
        prepare(config, fleet, space)
        history = fleet.moments._histories[MAIN_SPACE]._history  # type: ignore[attr-defined]
        kept = Reference(history.mean, history.cov, fleet.fingerprint("rewards"))
        write_reference(tmp_path / "base.npz", kept, images=int(history.weight))
        sampled: list[Iteration] = []
        train(config, fleet, space, 0, sampled.append, lambda: False)
    loo_fid = {"seed_images": 40, "seed_from": str(tmp_path / "base.npz")}
    config = small_config(iterations=2, rewards={"loo_fid": loo_fid})
    with InlineFleet(fleet_plan(config)) as fleet:
        read = run_training(config, fleet)
    anchor = "policy/base_entropy"  # of fewer images
    for one, other in zip(fingerprint(read), fingerprint(sampled), strict=True):
        assert abs(one[0].pop(anchor) - other[0].pop(anchor)) < 0.2
        assert one == other
