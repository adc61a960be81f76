"""R-precision: whether a CLIP ranks an image's own text first among the run's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from cluster.messages import MAIN_SPACE, Condition
from cluster.text_limits import Reading
from rewards.base import ImageErrors
from rewards.config import JUDGE, JudgeConfig, RewardServerConfig
from rewards.scorers.prompts import PromptConfig
from rewards.scorers.r_precision import MOST_TEXTS, RPrecision, distinct_texts
from rewards.scorers.text_image import TextImageScorer
from rewards.servers.reward_server import build_panels

COLOURS = {"red": 0, "green": 1, "blue": 2}


class Colours:
    """Towers that know three colours: unit vectors of an image's mean colour, and of its name."""

    device, image_size = torch.device("cpu"), (2, 2)

    def encode_images(self, pixels: Tensor) -> Tensor:
        return torch.nn.functional.normalize(pixels.mean((2, 3)), dim=-1)

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        return torch.eye(3)[[COLOURS[text] for text in texts]]

    def reading(self, text: str) -> Reading:
        return Reading(tokens=3, limit=3, known=1)


class Scorer(TextImageScorer):
    def preprocess(self, images: np.ndarray) -> Tensor:
        return torch.from_numpy(images).permute(0, 3, 1, 2).float()

    def size_fault(self, height: int, width: int) -> str | None:
        return "too large" if height > 2 else None


def image(*colour: int) -> np.ndarray:
    return np.broadcast_to(np.array(colour, np.uint8), (2, 2, 3))


TEXTS = [Condition(text=name) for name in COLOURS]


@pytest.fixture
def ranked() -> RPrecision:
    return RPrecision(Scorer(Colours(), PromptConfig()), TEXTS)


def test_the_own_text_must_be_nearer_than_every_other(ranked: RPrecision) -> None:
    images = np.stack([image(9, 1, 2), image(9, 1, 2), image(1, 5, 6), image(7, 7, 1)])
    asked = [TEXTS[0], TEXTS[1], TEXTS[2], TEXTS[0]]
    assert ranked(images, asked).tolist() == [1, 0, 1, 0]  # a tie is no first place


def test_the_same_text_is_no_competitor(ranked: RPrecision) -> None:
    """Nor with another class: prompts read the text alone."""
    assert ranked(image(9, 1, 2)[None], [Condition(text="red", class_index=4)]).tolist() == [1]


def test_images_that_cannot_be_scored_are_named(ranked: RPrecision) -> None:
    large = np.zeros((3, 3, 3), np.uint8)
    with pytest.raises(ImageErrors, match="too large"):
        ranked([image(9, 1, 2), large], TEXTS[:2])


def test_texts_are_distinct_and_not_too_many() -> None:
    features = np.ones((2, 3), np.float32)
    found = distinct_texts([Condition(text=t, features=features) for t in "abab"])
    assert [each.text for each in found] == ["a", "b"]
    assert all(each.features is None for each in found)
    many = distinct_texts([Condition(text=str(number)) for number in range(2500)])
    assert len({each.text for each in many}) == MOST_TEXTS
    assert many[-1].text == "2497"


def test_the_judge_has_it_where_it_is_asked_for() -> None:
    """Of the default run's classes: its CLIP tells digits apart."""
    from learner.config import DEFAULT_PRESET, load_preset
    from learner.data.digits import digits

    conditions = load_preset(DEFAULT_PRESET).conditions.conditions()
    server = RewardServerConfig(
        judge=JudgeConfig(r_precision=True), texts=distinct_texts(conditions)
    )
    assert server.scorer_names()[JUDGE] == ("clip", "r_precision", "accuracy")
    images, labels = digits("held-out")
    panel = build_panels(server, None)[JUDGE]
    scored = panel.score(images[:200], [conditions[label] for label in labels[:200]])
    assert scored.scores["r_precision"].mean() > 0.85
    wrong = panel.score(images[:200], [conditions[(label + 1) % 10] for label in labels[:200]])
    assert wrong.scores["r_precision"].mean() < 0.1
    assert set(scored.features) >= {MAIN_SPACE}
