from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import DataError
from rewards.distribution.fid import covariance_factor, frechet_distance, noise, significant
from rewards.distribution.moments import Moments
from rewards.distribution.reference import Reference, distance_to_reference, features_to_reference


def gaussian(dim: int, seed: int, rank: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(4 * dim, rank or dim)) @ generator.normal(size=(rank or dim, dim))
    return x.mean(0), np.cov(x.T)


def textbook(mu_a, cov_a, mu_b, cov_b) -> float:
    """The formula of the FID tools, with the square root of a product."""
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    return float((mu_a - mu_b) @ (mu_a - mu_b) + np.trace(cov_a + cov_b - 2 * root))


@pytest.mark.parametrize("dim", [2, 12, 64])
def test_agrees_with_the_usual_formula(dim: int) -> None:
    a, b = gaussian(dim, 0), gaussian(dim, 1)
    assert frechet_distance(*a, *b) == pytest.approx(textbook(*a, *b), rel=1e-8)


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**16),
    ranks=st.tuples(st.integers(0, 8), st.integers(0, 8)),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
)
def test_a_real_number_on_singular_covariances(
    seed: int, ranks: tuple[int, int], scale: float
) -> None:
    """Down to rank 0, where `sqrtm` warns and answers with complex numbers or NaN."""
    generator = np.random.default_rng(seed)
    covs = []
    for rank in ranks:
        root = generator.normal(size=(8, rank))
        covs.append(scale * root @ root.T)
    distance = frechet_distance(np.zeros(8), covs[0], np.ones(8), covs[1])
    assert isinstance(distance, float)
    assert np.isfinite(distance)
    # tr S_a + tr S_b bounds the traces' part; it is never below zero.
    bound = 8 + np.trace(covs[0]) + np.trace(covs[1])
    assert 8 * (1 - 1e-9) - 1e-6 * scale <= distance <= bound * (1 + 1e-12)


def test_noise_does_not_count_as_variance() -> None:
    values = np.array([-3e-15, 0.0, 2e-16, 1e-14, 1e-9, 1.0])
    assert significant(values).tolist() == [False, False, False, False, True, True]
    assert not significant(np.zeros(3)).any()
    assert noise(values) == pytest.approx(3e-15)


def test_is_symmetric_and_zero_on_itself() -> None:
    a, b = gaussian(12, 0), gaussian(12, 1)
    assert frechet_distance(*a, *b) == pytest.approx(frechet_distance(*b, *a), rel=1e-10)
    assert frechet_distance(*a, *a) == pytest.approx(0, abs=1e-10)


def test_one_dimension_by_hand() -> None:
    distance = frechet_distance(
        np.array([1.0]), np.array([[4.0]]), np.array([3.0]), np.array([[9.0]])
    )
    assert distance == pytest.approx((1 - 3) ** 2 + (2 - 3) ** 2)


def test_singular_covariances_are_right_not_only_finite() -> None:
    """Both live in the same 3 dimensions of 10: the distance is that of the 3-dimensional ones."""
    basis = np.linalg.qr(np.random.default_rng(2).normal(size=(10, 3)))[0]
    (mu_a, cov_a), (mu_b, cov_b) = gaussian(3, 3), gaussian(3, 4)
    inside = frechet_distance(mu_a, cov_a, mu_b, cov_b)
    outside = frechet_distance(
        basis @ mu_a, basis @ cov_a @ basis.T, basis @ mu_b, basis @ cov_b @ basis.T
    )
    assert outside == pytest.approx(inside, rel=1e-7)


def test_factor_drops_noise() -> None:
    _, cov = gaussian(10, 0, rank=4)
    factor = covariance_factor(cov)
    assert factor.shape == (10, 4)
    np.testing.assert_allclose(factor @ factor.T, cov, atol=1e-9)


def test_reference_from_a_file(tmp_path: Path) -> None:
    mu, sigma = gaussian(6, 0)
    other = gaussian(6, 1)
    np.savez(tmp_path / "stats.npz", mu=mu, sigma=sigma, mu_s=mu, sigma_s=sigma)  # as ADM's
    reference = Reference.from_npz(tmp_path / "stats.npz")
    distance = distance_to_reference(*other, reference)
    assert distance == pytest.approx(frechet_distance(*other, mu, sigma))


def test_bad_reference_files_are_named(tmp_path: Path) -> None:
    file = tmp_path / "stats.npz"
    mu, sigma = gaussian(6, 0)
    cases = {
        r"needs arrays 'mu' and 'sigma', found \['arr_0'\]": {"arr_0": mu},
        r"mu \(D,\) and sigma \(D, D\), found \(6,\) and \(5, 5\)": {
            "mu": mu,
            "sigma": sigma[:5, :5],
        },
        "not finite": {"mu": mu * np.nan, "sigma": sigma},
        "not symmetric": {"mu": mu, "sigma": sigma + np.triu(np.ones((6, 6)), 1)},
    }
    for message, arrays in cases.items():
        np.savez(file, **arrays)
        with pytest.raises(DataError, match=message) as error:
            Reference.from_npz(file)
        assert "stats.npz" in str(error.value)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DataError, match="not a readable"):
        Reference.from_npz(file)


def test_reference_of_images_in_memory() -> None:
    class Brightness:
        fingerprint = "brightness"

        def __call__(self, images: np.ndarray) -> np.ndarray:
            return images.reshape(len(images), -1)[:, :3].astype(np.float32)

    images = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 3), dtype=np.uint8)
    reference = Reference.from_images(images, Brightness(), batch=7)
    whole = Reference.from_features(Brightness()(images))
    assert reference.fingerprint == "brightness"
    np.testing.assert_allclose(reference.sigma, whole.sigma)


@pytest.mark.parametrize(("count", "real"), [(300, 200), (12, 200), (300, 10), (1, 200)])
def test_distance_of_features_is_that_of_their_moments(count: int, real: int) -> None:
    generator = np.random.default_rng(count)
    mixing = generator.normal(size=(24, 24))
    x = generator.normal(size=(count, 24)) @ mixing
    reference = Reference.from_features(generator.normal(size=(real, 24)) @ mixing + 1)
    moments = Moments.from_features(x)
    expected = distance_to_reference(moments.mean, moments.cov, reference)
    assert features_to_reference(x, reference) == pytest.approx(expected, rel=1e-7)
