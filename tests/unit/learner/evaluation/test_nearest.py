"""Real images nearest to a policy's: found, drawn, and left out where there are none."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cluster.messages import MAIN_SPACE, GroupScores, SampleRequest
from learner.data.datasets import load_images
from learner.evaluation.nearest import NEIGHBOURS, SHOWN, no_neighbours, write_nearest
from learner.monitoring.gallery import contact_sheet
from rewards.metrics.neighbours import nearest
from rewards.metrics.samples import RealImages
from tests.small_run import small_config

SOURCE = "digits:held-out"


def pixels(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1).astype(np.float32)


class Copier:
    """A fleet whose policy draws real images, by their number; the last row cannot be scored."""

    def __init__(self, numbers: list[int]) -> None:
        self._numbers, self._images = numbers, load_images(SOURCE)

    def sample_images(self, requests: list[SampleRequest]) -> list[np.ndarray]:
        assert all(request.panel == "judge" for request in requests)
        return [self._images[number : number + request.num_rollouts]
                for number, request in zip(self._numbers, requests, strict=True)]  # fmt: skip

    def score_images(
        self, batches: Iterable[tuple[SampleRequest, np.ndarray]]
    ) -> Iterator[GroupScores]:
        for row, (request, images) in enumerate(batches):
            assert len(images) == request.num_rollouts == 1
            error = "no score" if row == len(self._numbers) - 1 else None
            features = {MAIN_SPACE: pixels(images)}
            yield GroupScores(key=request.key, scores={}, features=features, errors=(error,))

    def serve_while(self, work: Callable[[], Any]) -> Any:
        return work()


def test_a_policy_that_copies_is_found_out(tmp_path: Path) -> None:
    config = small_config(output={"gallery_columns": 2})
    real = RealImages({MAIN_SPACE: pixels(load_images(SOURCE))})
    numbers = [10 * row for row in range(SHOWN)]
    file = tmp_path / "nearest.png"
    write_nearest(config, Copier(numbers), real, 4, file)  # type: ignore[arg-type]

    about = json.loads(file.with_suffix(".json").read_text())
    assert (about["step"], about["columns"]) == (4, 1 + NEIGHBOURS)
    assert [row["real"][0] for row in about["rows"]] == numbers[:-1]
    assert len({row["number"] for row in about["rows"]}) == SHOWN - 1
    for (own, *distances), row in zip(about["scores"]["distance"], about["rows"], strict=True):
        assert own is None
        assert distances[0] == 0 < distances[1] <= distances[2]
        copied, third = (real.features[MAIN_SPACE][row["real"][at]] for at in (0, 2))
        assert np.isclose(distances[2], np.linalg.norm(np.float64(copied) - np.float64(third)))
    sheet, (width, height) = np.asarray(Image.open(file)), about["cell"]
    left, top = int(about["left"]), int(about["top"] + height)  # the second row
    cells = sheet[top : top + int(height), left : left + 2 * int(width)]
    np.testing.assert_array_equal(cells[:, : int(width)], cells[:, int(width) :])
    plain = contact_sheet([load_images(SOURCE)[10:11]])
    np.testing.assert_array_equal(cells[1:-1, 1:33], plain.pixels[2:34, 2:34])


def test_without_a_judge_or_images_it_is_said() -> None:
    config = small_config()
    without = replace(config, evaluation=replace(config.evaluation, num_images=0))
    assert "there is no judge" in no_neighbours(without, None)
    assert "moments alone" in no_neighbours(config, RealImages())
    assert not no_neighbours(config, RealImages({MAIN_SPACE: np.zeros((4, 2), np.float32)}))


def test_nearest_are_those_of_all_distances() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(300, 5)).astype(np.float32) + 100
    queries = np.concatenate([features[7:9], rng.normal(size=(6, 5)).astype(np.float32) + 100])
    gaps = np.linalg.norm(np.float64(queries)[:, None] - np.float64(features)[None], axis=2)
    rows, distances = nearest(features, queries, 3)
    np.testing.assert_array_equal(rows, np.argsort(gaps, axis=1)[:, :3])
    np.testing.assert_allclose(distances, np.sort(gaps, axis=1)[:, :3], rtol=1e-12)
    assert distances[0, 0] == distances[1, 0] == 0
    assert nearest(features[:2], queries, 3)[0].shape == (8, 2)
