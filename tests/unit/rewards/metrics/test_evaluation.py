from __future__ import annotations

import dataclasses
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from cluster.errors import DataError
from cluster.messages import MAIN_SPACE
from rewards.distribution.fid import frechet_distance
from rewards.distribution.moments import Moments
from rewards.distribution.reference import Reference
from rewards.metrics.evaluation import MetricSettings, compare, estimates, evaluate
from rewards.metrics.figures import BETTER, OF_A_SPACE, SECOND_SPACE
from rewards.metrics.intervals import intervals
from rewards.metrics.neighbours import neighbourhoods
from rewards.metrics.samples import LOGITS, SPATIAL, RealImages, Samples

SETTINGS = MetricSettings(bootstrap=200, splits=2)
FIGURES = {*BETTER, *(f"second/{name}" for name in OF_A_SPACE)} - {"hps", "accuracy", "r_precision"}


def features(images: int, shift: float, seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    sizes = {MAIN_SPACE: 8, SECOND_SPACE: 12, SPATIAL: 6, LOGITS: 10}
    return {
        space: generator.normal(shift, size=(images, dim)).astype(np.float32)
        for space, dim in sizes.items()
    }


def samples(images: int = 120, shift: float = 0.3, seed: int = 1) -> Samples:
    generator = np.random.default_rng(seed + 1000)
    return Samples(
        features(images, shift, seed),
        {"clip": generator.normal(shift, size=images).astype(np.float32)},
        generator.normal(size=images),
        np.arange(images) % 10,
    )


def real(images: int = 90) -> RealImages:
    found = features(images, 0.0, 0)
    return RealImages({space: found[space] for space in (MAIN_SPACE, SECOND_SPACE, SPATIAL)})


def test_every_figure_is_there_with_its_definition() -> None:
    ours, theirs = samples(), real()
    found = evaluate(ours, theirs, SETTINGS)
    plain = evaluate(ours, theirs, replace(SETTINGS, bootstrap=0, ddof=0))
    assert found.keys() == FIGURES
    for name, space in {"fid": MAIN_SPACE, "second/fid": SECOND_SPACE, "sfid": SPATIAL}.items():
        a, b = (Moments.from_features(x.features[space]) for x in (ours, theirs))
        expected = frechet_distance(a.mean, a.cov * 120 / 119, b.mean, b.cov * 90 / 89)
        assert found[name].value == pytest.approx(expected, rel=1e-12)
        assert plain[name].value == frechet_distance(a.mean, a.cov, b.mean, b.cov)
    near = neighbourhoods(theirs.features[SECOND_SPACE], ours.features[SECOND_SPACE], 5)
    assert found["second/density"].value == near.density
    assert found["clip"].value == float(ours.scores["clip"].mean())
    assert found["images"].value == 120
    assert math.isnan(found["images"].low)
    for name, figure in found.items():
        assert name == "images" or figure.low < figure.value < figure.high, name


def test_a_file_of_moments_counts_before_features_and_divides_by_n_minus_1() -> None:
    ours, theirs = samples(), real()
    x, y = ours.features[MAIN_SPACE], theirs.features[MAIN_SPACE] + 1
    file = Reference(y.mean(0, dtype=np.float64), np.cov(y, rowvar=False))
    found = evaluate(ours, replace(theirs, moments={MAIN_SPACE: file}), SETTINGS)
    mean, cov = x.mean(0, dtype=np.float64), np.cov(x, rowvar=False)
    fid = frechet_distance(mean, cov, file.mu, file.sigma)
    assert found["fid"].value == pytest.approx(fid, rel=1e-12)
    assert found["recall"] == evaluate(ours, theirs, SETTINGS)["recall"]


def test_figures_without_inputs_are_absent() -> None:
    ours = samples()
    alone = replace(ours, entropies=None, classes=None)
    assert evaluate(alone, RealImages(), SETTINGS).keys() == {"inception_score", "clip", "images"}
    captions = replace(ours, classes=None, conditions=np.arange(120) // 2)
    assert "vendi" in evaluate(captions, RealImages(), SETTINGS)
    single = replace(ours, classes=None, conditions=np.arange(120))
    assert "vendi" not in evaluate(single, RealImages(), SETTINGS)


def test_no_resamples_no_intervals() -> None:
    plain = replace(SETTINGS, bootstrap=0)
    found, whole = (evaluate(samples(), real(), settings) for settings in (plain, SETTINGS))
    assert {name: figure.value for name, figure in found.items()} == {
        name: figure.value for name, figure in whole.items()
    }
    assert all(math.isnan(figure.low) and math.isnan(figure.high) for figure in found.values())


def test_a_further_space_changes_no_other_figure() -> None:
    """Nor an interval: `second` under another name, beside it."""

    def with_further(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {**found, "clip": found[SECOND_SPACE]}

    ours, theirs = samples(), real()
    before = evaluate(ours, theirs, SETTINGS)
    more = replace(ours, features=with_further(dict(ours.features)))
    after = evaluate(more, replace(theirs, features=with_further(dict(theirs.features))), SETTINGS)
    added = [f"clip/{name}" for name in OF_A_SPACE]
    assert {*after} == {*before, *added}
    for name, figure in after.items():
        same = before[f"second/{name[5:]}" if name in added else name]
        expected = pytest.approx(dataclasses.astuple(same), rel=1e-9, nan_ok=True)
        assert dataclasses.astuple(figure) == expected, name


def test_differences_are_the_second_sets_minus_the_firsts() -> None:
    first, second, theirs = samples(shift=0.0), samples(shift=1.0, seed=2), real()
    found = compare(first, second, theirs, SETTINGS)
    a, b = (evaluate(each, theirs, SETTINGS) for each in (first, second))
    for name, difference in found.items():
        assert difference.value == b[name].value - a[name].value
        assert difference.paired == (name != "images")
    assert found["fid"].low > 0
    assert found["fid"].p_value < 0.05
    again = compare(first, second, theirs, SETTINGS)
    assert repr(found) == repr(again)  # the same resamples; NaN is not equal to itself


def test_other_numbers_or_conditions_are_not_paired() -> None:
    first, second, theirs = samples(120), samples(100, seed=2), real()
    found = compare(first, second, theirs, SETTINGS)
    assert not found["fid"].paired
    assert not found["clip"].paired
    assert found["vendi"].paired  # by condition
    assert not found["recall"].paired  # by real image alone
    unknown = replace(first, classes=None)
    assert not compare(unknown, unknown, theirs, SETTINGS)["clip"].paired


def test_sets_of_one_policy_rarely_differ_in_any_figure() -> None:
    """p < 0.05 in about 5 % of comparisons; with real images alone resampled, recall and coverage
    differed in 20 to 30 % of these."""
    theirs, trials = real(300), 60
    settings, found = replace(SETTINGS, neighbours=3), Counter[str]()
    for at in range(trials):
        first, second = (samples(seed=seed) for seed in (10 + at, 500 + at))
        for name, difference in compare(first, second, theirs, settings).items():
            found[name] += difference.p_value < 0.05
    assert found.keys() == FIGURES
    assert max(found.values()) <= 0.15 * trials, found


def test_recall_and_coverage_vary_with_generated_images() -> None:
    """The jackknife of coverage, by brute force; an interval of a set has both sources."""
    ours, theirs = samples(40), real()
    x, y = ours.features[MAIN_SPACE], theirs.features[MAIN_SPACE]
    found = estimates(ours, theirs, SETTINGS)
    for name in ("coverage", "recall"):
        both, own = found[name], replace(found[name], of_images=None)
        wide, narrow = (intervals({"x": each}, 500, 0)["x"] for each in (both, own))
        assert wide.high - wide.low > 1.1 * (narrow.high - narrow.low)
    without = [neighbourhoods(y, np.delete(x, at, 0), 5).coverage for at in range(40)]
    expected = 39 * (np.mean(without) - without)
    assert found["coverage"].of_images == pytest.approx(expected, abs=1e-12)


def test_bad_input_is_refused() -> None:
    ours, theirs = samples(), real()
    broken = ours.features[MAIN_SPACE].copy()
    broken[[3, 7], 2] = np.nan
    with pytest.raises(DataError, match="features 'features': values of 2 of 120 images are not"):
        evaluate(replace(ours, features={MAIN_SPACE: broken}), theirs, SETTINGS)
    scores = {"clip": np.zeros(7, np.float32)}
    with pytest.raises(DataError, match=r"scores 'clip': expected 1-dimensional values of 120"):
        evaluate(replace(ours, scores=scores), theirs, SETTINGS)
    other = RealImages({MAIN_SPACE: np.zeros((90, 5), np.float32)})
    with pytest.raises(DataError, match="real images have 5 dimensions, those of the evaluated"):
        evaluate(ours, other, SETTINGS)
    moments = RealImages(moments={SPATIAL: Reference(np.zeros(3), np.eye(3))})
    with pytest.raises(DataError, match="reference moments have 3 dimensions"):
        evaluate(ours, moments, SETTINGS)
    with pytest.raises(DataError, match="needs images"):
        evaluate(Samples({}, {}), theirs, SETTINGS)
    few = samples(5)
    with pytest.raises(DataError, match="more than 5 images, found 90 real and 5 generated"):
        evaluate(few, theirs, SETTINGS)
    with pytest.raises(DataError, match="splits = 10 needs at least 20 images, found 12"):
        evaluate(samples(12), RealImages(), MetricSettings())
    with pytest.raises(DataError, match="at least 2"):
        evaluate(samples(1), RealImages(moments={MAIN_SPACE: Reference(np.zeros(8), np.eye(8))}),
                 replace(SETTINGS, splits=1))  # fmt: skip
