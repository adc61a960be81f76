"""Figures against published implementations and plain restatements, on the same features."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from prdc import compute_prdc
from vendi_score import vendi

from cluster.messages import MAIN_SPACE
from cluster.model_files.torchvision_ops import ensure_torchvision
from rewards.distribution.reference import Reference
from rewards.metrics.evaluation import MetricSettings, evaluate
from rewards.metrics.frechet import frechet_estimate
from rewards.metrics.inception_score import inception_score
from rewards.metrics.neighbours import neighbourhoods
from rewards.metrics.samples import LOGITS, SPATIAL, RealImages, Samples
from rewards.metrics.vendi import vendi_estimate, vendi_score

PLAIN = MetricSettings(bootstrap=0)


@pytest.fixture(autouse=True)
def torchvision() -> None:
    ensure_torchvision()  # torch-fidelity and clean-fid import it


def statistics_of(features: np.ndarray) -> dict[str, np.ndarray]:
    """mu and sigma as torch-fidelity computes them."""
    from torch_fidelity.metric_fid import fid_features_to_statistics

    found = fid_features_to_statistics(torch.from_numpy(features))
    return {name: array.astype(np.float64) for name, array in found.items()}


def fidelitys_fid(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> float:
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    return float(fid_statistics_to_metric(first, second, verbose=False)[KEY_METRIC_FID])


def like_inception(images: int, dim: int, seed: int, shift: float = 0.0) -> np.ndarray:
    """(N, D) float32 positive features of decaying spread, correlated as a network's are."""
    generator = np.random.default_rng(seed)
    mix = np.random.default_rng(99).normal(size=(dim, dim)) / dim**0.5
    x = generator.normal(shift, size=(images, dim)) * np.exp(-3 * np.arange(dim) / dim)
    return np.maximum(x @ mix + 0.3, 0).astype(np.float32)


@pytest.mark.parametrize("space", [MAIN_SPACE, SPATIAL])
def test_fid_and_sfid_with_a_reference_are_those_of_fid_tools(space: str) -> None:
    from cleanfid.fid import frechet_distance as clean_fid

    name = "sfid" if space == SPATIAL else "fid"
    real, generated = like_inception(700, 64, 0), like_inception(500, 64, 1, 0.2)
    ours, theirs = statistics_of(generated), statistics_of(real)
    file = RealImages(moments={space: Reference(theirs["mu"], theirs["sigma"])})
    found, of_images = (
        evaluate(Samples({space: generated}, {}), each, PLAIN)[name].value
        for each in (file, RealImages({space: real}))
    )
    assert of_images == pytest.approx(fidelitys_fid(ours, theirs), rel=1e-6)
    assert found == pytest.approx(fidelitys_fid(ours, theirs), rel=1e-6)
    clean = clean_fid(ours["mu"], ours["sigma"], theirs["mu"], theirs["sigma"])
    assert found == pytest.approx(clean, rel=1e-6)


def test_fid_of_fewer_images_than_dimensions_is_that_of_fid_tools() -> None:
    real, generated = like_inception(300, 128, 0), like_inception(60, 128, 1)
    ours, theirs = statistics_of(generated), statistics_of(real)
    reference = Reference(theirs["mu"], theirs["sigma"])
    found = frechet_estimate(generated, reference, ddof=1, influences=False).value
    # its eigenvalues are of a singular product, which is not symmetric
    assert found == pytest.approx(fidelitys_fid(ours, theirs), rel=1e-5)


@pytest.mark.parametrize(("images", "splits"), [(1000, 10), (503, 10), (200, 1)])
def test_the_inception_score_is_torch_fidelitys(images: int, splits: int) -> None:
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = 3 * np.random.default_rng(0).normal(size=(images, 1008)).astype(np.float32)
    found = inception_score(logits, splits).value
    theirs = isc_features_to_metric(torch.from_numpy(logits), splits)
    assert found == pytest.approx(theirs["inception_score_mean"], rel=1e-12)


def in_order(logits: np.ndarray, images: int) -> float:
    """The ADM evaluator's Inception Score, whose splits are ranges of (5,000) images."""
    chances = np.exp(logits.astype(np.float64))
    chances /= chances.sum(1, keepdims=True)
    scores = []
    for start in range(0, len(logits), images):
        part = chances[start : start + images]
        gaps = part * (np.log(part) - np.log(part.mean(0)))
        scores.append(np.exp(gaps.sum(1).mean()))
    return float(np.mean(scores))


def test_the_inception_score_is_the_adm_evaluators_in_one_split_and_in_random_order() -> None:
    generator = np.random.default_rng(0)
    classes = np.arange(4000) % 80
    logits = generator.normal(size=(4000, 100)).astype(np.float32)
    logits[np.arange(4000), classes] += 9
    assert inception_score(logits, 1).value == pytest.approx(in_order(logits, 4000), rel=1e-9)
    found = inception_score(logits, 10).value
    shuffled, by_class = generator.permutation(4000), np.argsort(classes, kind="stable")
    assert found == pytest.approx(in_order(logits[shuffled], 400), rel=0.01)
    assert in_order(logits, 400) > 1.05 * found  # alternating classes
    assert in_order(logits[by_class], 400) < 0.2 * found
    assert inception_score(logits[by_class], 10).value == pytest.approx(found, rel=0.01)


@pytest.mark.parametrize(("count", "dim", "k"), [(300, 64, 3), (260, 500, 5), (150, 4, 1)])
def test_neighbours_are_prdcs_and_torch_fidelitys(count: int, dim: int, k: int) -> None:
    from torch_fidelity.metric_prc import prc_features_to_metric

    real = like_inception(count, dim, 0).astype(np.float64)
    generated = like_inception(count - 40, dim, 1, 0.1).astype(np.float64)
    found = neighbourhoods(real, generated, k)
    theirs = compute_prdc(real, generated, k)
    for name, value in theirs.items():
        assert getattr(found, name) == pytest.approx(value, abs=1e-12), name
    fidelity = prc_features_to_metric(
        torch.from_numpy(generated), torch.from_numpy(real), prc_neighborhood=k,
        prc_batch_size=100, save_cpu_ram=True, verbose=False,
    )  # fmt: skip
    assert found.precision == pytest.approx(fidelity["precision"], abs=1e-6)
    assert found.recall == pytest.approx(fidelity["recall"], abs=1e-6)
    assert 0 < found.recall < 1
    assert 0 < found.coverage <= 1


@pytest.mark.parametrize(("count", "dim"), [(50, 128), (80, 16)])
def test_the_vendi_score_is_its_packages(count: int, dim: int) -> None:
    features = like_inception(count, dim, 0)
    found = vendi_score(features)
    theirs = vendi.score_X(features.astype(np.float64))
    assert found == pytest.approx(theirs, rel=1e-6)
    assert 1 < found < count


def test_in_class_diversity_is_the_mean_of_the_conditions() -> None:
    features = like_inception(90, 32, 0)
    conditions = np.random.default_rng(0).integers(8, size=90)
    conditions[conditions == 5] = np.arange(100, 100 + (conditions == 5).sum())  # one image each
    found = vendi_estimate(features, conditions)
    groups = [features[conditions == each] for each in (0, 1, 2, 3, 4, 6, 7)]
    expected = np.mean([vendi.score_X(group.astype(np.float64)) for group in groups])
    assert found is not None
    assert found.value == pytest.approx(expected, rel=1e-6)
    assert found.influences is not None
    assert len(found.influences) == 7


def test_diversity_counts_different_images() -> None:
    generator = np.random.default_rng(0)
    same, apart = np.repeat(generator.normal(size=(1, 64)), 10, 0), np.eye(64)[:10]
    assert vendi_score(same) == pytest.approx(1)
    assert vendi_score(apart) == pytest.approx(10)
    assert vendi_score(np.concatenate([apart, apart])) == pytest.approx(10)
    assert vendi_score(3 * apart) == pytest.approx(10)
    assert np.isfinite(vendi_score(np.zeros((4, 3))))


def everything(order: np.ndarray) -> dict[str, float]:
    """All figures of images in an order, the Inception Score in one split."""
    spaces = {MAIN_SPACE: 24, "second": 40, SPATIAL: 12, LOGITS: 30}
    ours = {space: like_inception(200, dim, 1, 0.1)[order] for space, dim in spaces.items()}
    theirs = {space: like_inception(180, dim, 0) for space, dim in spaces.items()}
    scores = {"clip": np.random.default_rng(3).normal(size=200)[order]}
    samples = Samples(ours, scores, scores["clip"] + 1, (np.arange(200) % 10)[order])
    figures = evaluate(samples, RealImages(theirs), MetricSettings(bootstrap=0, splits=1, ddof=0))
    return {name: figure.value for name, figure in figures.items()}


def test_the_order_of_images_is_of_no_importance() -> None:
    straight, turned = (everything(order) for order in (np.arange(200), np.arange(200)[::-1]))
    assert turned == pytest.approx(straight, rel=1e-9)


def test_every_image_twice() -> None:
    once, twice = everything(np.arange(200)), everything(np.repeat(np.arange(200), 2))
    same = once.keys() - {name for name in once if "recall" in name or "coverage" in name}
    assert twice["images"] == 2 * once["images"]
    for name in same - {"images"}:
        assert twice[name] == pytest.approx(once[name], rel=1e-9), name
    assert twice["coverage"] == once["coverage"]
    assert twice["recall"] <= once["recall"]  # balls reach less far
