"""Captions measured from the digits: weight, slant, and their cuts."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from cluster.errors import DataError
from learner.data.datasets import image_captions
from learner.data.digit_captions import (
    Cuts,
    all_attributes,
    attributes_of,
    captions_of,
    measure,
    numbers_of,
    training_cuts,
)
from learner.data.digits import digits


def bar(shear: float, width: float) -> np.ndarray:
    """A soft bar on 32 x 32 pixels, moved right by `shear` a row upwards."""
    rows, columns = np.mgrid[0:32, 0:32].astype(float)
    centre = 15.5 + shear * (15.5 - rows)
    inside = (rows > 7) & (rows < 24)
    return np.clip(width - np.abs(columns - centre), 0, 1) * inside


@pytest.mark.parametrize("shear", [-0.3, 0.0, 0.2])
def test_the_slant_is_the_shear_that_was_drawn(shear: float) -> None:
    _, found = measure(np.stack([bar(shear, 2), bar(shear, 4)]))
    assert np.abs(found - shear).max() < 0.01


def test_the_weight_is_the_mean_ink() -> None:
    images = np.stack([np.zeros((4, 4)), np.eye(4), np.ones((4, 4))])
    ink, shear = measure(images)
    assert ink.tolist() == [0, 0.25, 1]
    assert shear[[0, 2]].tolist() == [0, 0]  # of no ink: none
    assert shear[1] == pytest.approx(-1)  # from the upper left to the lower right
    assert (np.diff(measure(np.stack([bar(0, w) for w in (1, 2, 3)]))[0]) > 0).all()


def test_a_single_row_of_ink_leans_nowhere() -> None:
    image = np.zeros((1, 4, 4))
    image[0, 2, 1:] = 1
    assert measure(image)[1].tolist() == [0]


@pytest.mark.parametrize("images", [np.zeros((4, 4)), np.full((1, 4, 4), 255), np.empty((0, 4, 4))])
def test_what_cannot_be_measured_is_refused(images: np.ndarray) -> None:
    with pytest.raises(DataError, match="ink from 0 to 1, found"):
        measure(images)


def test_the_training_images_fall_into_terciles() -> None:
    """Weight over all digits, slant within each."""
    found = attributes_of("train")
    assert abs(np.bincount(found[:, 1]) - 1000 / 3).max() <= 2
    for digit in range(10):
        slants = np.bincount(found[found[:, 0] == digit, 2], minlength=3)
        assert np.ptp(slants) <= 2
    assert np.array_equal(found[:, 0], digits("train")[1])


def test_a_mirrored_digit_leans_the_other_way() -> None:
    images, labels = digits("train")
    ink, shear = measure(images.mean(-1) / 255)
    mirrored = measure(images[:, :, ::-1].mean(-1) / 255)
    assert np.allclose(mirrored[0], ink)
    assert np.allclose(mirrored[1], -shear)
    assert Cuts.of(images.mean(-1) / 255, labels).slant == pytest.approx(training_cuts().slant)


def test_captions_keep_the_frequencies_of_the_images() -> None:
    texts = image_captions("digits:train")
    assert len(texts) == 1000
    assert set(texts) == set(captions_of(all_attributes()))
    assert len(set(texts)) == 90
    assert texts[0] == "a bold digit one leaning left"
    held_out = Counter(image_captions("digits:held-out"))
    assert set(held_out) <= set(texts)
    assert max(Counter(texts).values()) < 30  # no caption is rare or rules


def test_numbers_are_places_among_all_attributes() -> None:
    every = all_attributes()
    assert np.array_equal(numbers_of(every), np.arange(90))
    some = attributes_of("held-out")
    assert np.array_equal(every[numbers_of(some)], some)


def test_other_images_have_no_captions() -> None:
    with pytest.raises(DataError, match="images without captions"):
        image_captions("photos")
    with pytest.raises(DataError, match="split must be"):
        image_captions("digits:test")
