from __future__ import annotations

import numpy as np
import pytest

from cluster.errors import DataError
from rewards.metrics import pairs
from rewards.metrics.neighbours import neighbourhoods


def by_definition(real: np.ndarray, generated: np.ndarray, k: int) -> dict[str, float]:
    """Plain loops over the definitions."""

    def radius(points: np.ndarray, index: int) -> float:
        return sorted(np.linalg.norm(points - points[index], axis=1))[k]  # [0] is itself

    real_radii = [radius(real, i) for i in range(len(real))]
    generated_radii = [radius(generated, j) for j in range(len(generated))]
    hits = [[np.linalg.norm(r - g) < rad for g in generated] for r, rad in zip(real, real_radii)]
    back = [
        [np.linalg.norm(r - g) < rad for g, rad in zip(generated, generated_radii)] for r in real
    ]
    return {
        "precision": np.mean([any(row[j] for row in hits) for j in range(len(generated))]),
        "recall": np.mean([any(row) for row in back]),
        "density": sum(map(sum, hits)) / (k * len(generated)),
        "coverage": np.mean([any(row) for row in hits]),
    }


def test_equals_the_definitions() -> None:
    generator = np.random.default_rng(0)
    real, generated = generator.normal(size=(30, 3)), generator.normal(0.5, 1.2, size=(25, 3))
    found = neighbourhoods(real, generated, 3)
    for name, value in by_definition(real, generated, 3).items():
        assert getattr(found, name) == pytest.approx(value)


def test_duplicates_and_ties_count_as_in_the_definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix product rounds; strict comparisons of equal distances must not see it. Far from the
    origin many digits cancel; a few rows at a time change nothing."""
    generator = np.random.default_rng(0)
    real = (1e3 + np.round(generator.normal(size=(40, 6)))).astype(np.float32)
    sets = {
        "ties": (1e3 + np.round(generator.normal(size=(30, 6)))).astype(np.float32),
        "copies": np.concatenate([real[:15], real[:15]]),
        "the same": real,
        "one point": np.repeat(real[:1], 30, axis=0),
    }
    for held in (pairs.HELD, 100):
        monkeypatch.setattr(pairs, "HELD", held)
        monkeypatch.setattr(pairs, "EXACT", 7 if held == 100 else 4096)
        for name, generated in sets.items():
            found = neighbourhoods(real, generated, 3)
            for figure, value in by_definition(real, generated, 3).items():
                assert getattr(found, figure) == pytest.approx(value, abs=1e-12), (name, figure)


def test_a_collapsed_sample_is_dense_and_covers_nothing() -> None:
    generator = np.random.default_rng(0)
    real = generator.normal(size=(200, 2))
    collapsed = real[:1] + 1e-3 * generator.normal(size=(200, 2))
    found = neighbourhoods(real, collapsed, 5)
    assert found.precision == 1
    assert found.coverage < 0.1
    assert found.recall < 0.02


def test_too_few_images_are_refused() -> None:
    with pytest.raises(DataError, match="more than 5 images, found 9 real and 5 generated"):
        neighbourhoods(np.zeros((9, 2)), np.zeros((5, 2)), 5)
