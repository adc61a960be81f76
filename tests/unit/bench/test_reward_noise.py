"""The bench of the rewards' signal to noise: its parts against their definitions, its page."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rewards.distribution.moments import Moments
from tests.bench.reward_noise.arithmetic import (
    NODES,
    Arithmetic,
    diagonal_noise,
    full_noise,
    older,
    populations,
)
from tests.bench.reward_noise.mixture import CLASSES, TUNED, Mixture, blend, faults_at, generator
from tests.bench.reward_noise.page import PAGE, with_tables
from tests.bench.reward_noise.results import RESULTS, Job, Results, Row
from tests.bench.reward_noise.simulation import (
    DIAGONAL,
    FULL,
    History,
    Scorer,
    Setting,
    Space,
    auc,
    centred,
    correlation,
    sign_share,
    simulated,
)

DIM, ROLLOUTS = 32, 12
NOW = faults_at(0.5)


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return Scorer(Mixture(DIM))


@pytest.fixture(scope="module")
def known(scorer: Scorer) -> dict[str, Arithmetic]:
    classes = np.arange(CLASSES)[::8].repeat(ROLLOUTS)
    images = scorer.mixture.sample(classes, NOW, generator("images"))
    past = populations(scorer.mixture)
    return {
        space.name: Arithmetic(scorer, space, images, ROLLOUTS, past) for space in (FULL, DIAGONAL)
    }


def test_a_populations_moments_are_those_of_many_images(scorer: Scorer) -> None:
    images = scorer.mixture.sample(np.arange(60_000) % CLASSES, TUNED, generator("many"))
    sampled = Moments.from_features(images.features)
    known = scorer.mixture.population(TUNED)
    deviations = np.sqrt(np.diag(known.cov))
    assert np.abs((sampled.mean - known.mean) / deviations).max() < 0.02
    assert np.abs((sampled.cov - known.cov) / np.outer(deviations, deviations)).max() < 0.03
    real = scorer.mixture.reference
    gap = (known.cov - real.sigma) / np.outer(deviations, deviations)
    assert np.abs(gap).max() > 0.1  # the faults are far above that error


def test_a_history_is_what_updates_in_turn_give() -> None:
    rng = np.random.default_rng(0)
    batches = rng.standard_normal((4, 6, 3)) + 2
    updated = Moments.from_features(batches[0])
    for batch in batches[1:]:
        updated = updated.update(batch, 0.7)
    history = History(np.ones(3))
    for batch, weight in zip(batches, (0.7**3, 0.3 * 0.7**2, 0.3 * 0.7, 0.3)):
        history.add(batch, weight)
    summed = history.moments()
    np.testing.assert_allclose(summed.mean, updated.mean)
    np.testing.assert_allclose(summed.cov, updated.cov)


def test_an_older_population_is_the_mean_of_those_it_had(scorer: Scorer) -> None:
    age, ages = 0.5, (np.arange(50) + 0.5) / 50
    weights = np.exp(-ages / age)
    weights *= (1 - np.exp(-1 / age)) / weights.sum()
    states = [scorer.mixture.population(faults_at((1 - a) / 2)) for a in ages]
    parts = [*zip(weights, states), (np.exp(-1 / age), scorer.mixture.population(faults_at(0)))]
    direct, found = blend(parts), older(populations(scorer.mixture), age)
    np.testing.assert_allclose(found.mean, direct.mean, atol=1e-3 * np.abs(direct.mean).max())
    np.testing.assert_allclose(found.cov, direct.cov, atol=1e-3 * np.abs(direct.cov).max())
    assert len(NODES) == 4


@pytest.mark.parametrize("space", [FULL, DIAGONAL], ids=lambda space: space.name)
def test_the_noise_is_that_of_sampled_histories(scorer: Scorer, space: Space) -> None:
    count, mixture, rng = 2000, scorer.mixture, generator("noise")
    now = mixture.population(NOW)
    classes = np.arange(CLASSES)[::20].repeat(ROLLOUTS)
    x = mixture.sample(classes, NOW, rng).features
    noise = (diagonal_noise if space == DIAGONAL else full_noise)(
        *scorer.within(space, x, now), ROLLOUTS
    )
    true = scorer.influence(space, x, now)
    errors = []
    for _ in range(40):
        drawn = mixture.sample(rng.integers(CLASSES, size=count), NOW, rng).features
        found = scorer.influence(space, x, Moments.from_features(drawn))
        errors.append(centred(found - true, ROLLOUTS))
    measured = np.mean(np.square(errors)) * ROLLOUTS / (ROLLOUTS - 1) * count
    # Faulty images and modes have heavier tails than the Gaussians of the formula.
    assert measured == pytest.approx(noise.images + noise.groups, rel=0.35)


def test_arithmetic_predicts_a_simulation(scorer: Scorer, known: dict[str, Arithmetic]) -> None:
    setting = Setting(DIM, 144, 5000, 0, batches=12)
    images, history = simulated(scorer.mixture, setting)
    truth = centred(
        scorer.influence(FULL, images.features, scorer.mixture.population(NOW)), ROLLOUTS
    )
    for space in (FULL, DIAGONAL):
        parts = [
            scorer(space, batch, history, setting.decay) for batch in np.split(images.features, 12)
        ]
        found = correlation(centred(np.concatenate(parts), ROLLOUTS), truth)
        assert found == pytest.approx(known[space.name].correlation(setting), abs=0.03)
        assert found < 0.98


def test_a_longer_window_helps_a_policy_that_stays_and_not_one_that_moves(
    known: dict[str, Arithmetic],
) -> None:
    sizes = [200, 400, 800, 1600, 3200, 6400, 12800, 25600]
    still = [known["full"].correlation(Setting(DIM, 144, size, 0)) for size in sizes]
    assert still == sorted(still)
    assert still[-1] - still[0] > 0.05
    best = {}
    for run in (100, 30):
        moving = [known["full"].correlation(Setting(DIM, 144, size, run)) for size in sizes]
        best[run] = sizes[int(np.argmax(moving))]
        assert max(moving) - moving[-1] > 0.01
    assert sizes[0] < best[30] <= best[100] < sizes[-1]


def test_the_diagonal_form_has_less_noise_and_another_limit(known: dict[str, Arithmetic]) -> None:
    full, diagonal = known["full"], known["diagonal"]
    assert full.agreement[0] == pytest.approx(1)
    assert 0.3 < diagonal.agreement[0] < 0.95
    long = Setting(DIM, 144, 100_000, 0)
    assert full.correlation(long) > 0.99
    assert diagonal.correlation(long) == pytest.approx(diagonal.agreement[0], abs=0.02)


def test_figures_by_hand() -> None:
    assert auc(np.array([2.0, 4.0]), np.array([1.0, 2.0, 3.0])) == pytest.approx(4.5 / 6)
    assert np.isnan(auc(np.array([]), np.array([1.0])))
    rewards = np.array([-1.0, 1, 2, 0, 5, 5])
    marked = np.array([True, False, True, False, True, True])
    assert sign_share(rewards, marked, 2) == 0.5  # the third group has no other image


def test_the_order_of_jobs_does_not_change_the_file(tmp_path: Path) -> None:
    jobs = [Job("simulation", 24, 1.0, batch=144, window=window) for window in (1000, 432)]
    files = []
    for order in (jobs, jobs[::-1]):
        path = tmp_path / f"{order[0].window}.csv"
        for job in order:  # read again in between, as after an interruption
            results = Results.read(path)
            results.add(job, [Row(job, "full", "correlation", job.window / 3)])
            results.write(path)
        assert all(Results.read(path).has(job) for job in jobs)
        files.append(path.read_bytes())
    assert files[0] == files[1]


def test_the_pages_tables_are_those_of_the_csv() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text.count("<!-- table ") == 7
    assert with_tables(text, Results.read(RESULTS)) == text
