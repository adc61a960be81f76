"""Preprocessing on the device against the transforms that it stands for, pixel by pixel."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cluster.errors import CheckpointError
from cluster.model_files.torchvision_ops import ensure_torchvision
from rewards.networks import preprocessing
from rewards.networks.preprocessing import (
    Preprocess,
    fault,
    fit_floats,
    longest_size,
    preprocess,
    scaled_size,
)

SIZES = [
    *[(224, 224), (256, 256), (384, 384), (512, 384), (384, 512), (225, 223), (223, 224)],
    *[(13, 9), (9, 13), (3, 3), (2, 50), (50, 2), (1000, 30), (30, 1000), (333, 777)],
]
TARGETS: list[int | tuple[int, int]] = [224, 32, (192, 320), (33, 21)]


def open_clip_config(**fields: Any) -> Any:
    ensure_torchvision()
    import open_clip

    return open_clip.transform.PreprocessCfg(**fields)


def open_clip_pixels(image: np.ndarray, config: Any) -> torch.Tensor:
    ensure_torchvision()
    import open_clip

    return open_clip.transform.image_transform_v2(config, is_train=False)(Image.fromarray(image))


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random"])
def test_pixels_equal_open_clips_transform_exactly(resize_mode: str, interpolation: str) -> None:
    """Noise and black-and-white noise, whose overshoot is clamped: no value differs at all."""
    generator = np.random.default_rng(0)
    for number, target in enumerate(TARGETS):
        config = open_clip_config(
            size=target, resize_mode=resize_mode, interpolation=interpolation, fill_color=37
        )
        ours = Preprocess.of(asdict(config))
        for row, size in enumerate(SIZES if number == 0 else SIZES[number::3]):
            image = generator.integers(0, 256, (*size, 3), np.uint8)
            if row % 3 == 0:
                image = np.where(image > 127, 255, 0).astype(np.uint8)
            found = preprocess(torch.from_numpy(image)[None], ours)[0]
            expected = open_clip_pixels(image, config)
            assert torch.equal(found, expected), (target, size)


@pytest.mark.parametrize("filtering", ["bicubic", "bilinear"])
def test_the_order_of_the_passes_is_pillows(filtering: preprocessing.Filter) -> None:
    """Every kind of pair of sizes: growing, shrinking, both, by little and by much."""
    generator = np.random.default_rng(1)
    orders = set()
    for _ in range(60):
        height, width, new_height, new_width = generator.integers(2, 120, 4).tolist()
        config = Preprocess(
            size=(new_height, new_width), mean=(0,) * 3, std=(1,) * 3,
            resize_mode="squash", interpolation=filtering,
        )  # fmt: skip
        image = generator.integers(0, 256, (height, width, 3), np.uint8)
        found = preprocessing.fit(torch.from_numpy(image).permute(2, 0, 1)[None], config)[0]
        resample = getattr(Image.Resampling, filtering.upper())
        expected = np.asarray(Image.fromarray(image).resize((new_width, new_height), resample))
        np.testing.assert_array_equal(found.permute(1, 2, 0), expected)
        orders.add(preprocessing.first_axis(height, width, new_height, new_width, filtering))
    assert 1 in orders


def test_a_pillow_that_resizes_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocessing, "BITS", 4)  # coarser coefficients than any Pillow's
    with pytest.raises(CheckpointError, match=r"61 x 67 to 29 x 31 .* set preprocessing"):
        preprocessing.first_axis(61, 67, 29, 31, "bicubic")  # sizes of no other test: both are kept


def test_a_batch_gives_what_its_images_give() -> None:
    images = torch.randint(0, 256, (3, 40, 30, 3), dtype=torch.uint8)
    config = Preprocess(size=(24, 24), mean=(0.5,) * 3, std=(0.25,) * 3)
    alone = [preprocess(image[None], config) for image in images]
    assert torch.equal(preprocess(images, config), torch.cat(alone))


def test_bilinear_by_hand() -> None:
    """Two pixels to one: both weigh 1/2; 127.5 rounds up."""
    config = Preprocess(
        size=(1, 1), mean=(0,) * 3, std=(1,) * 3, resize_mode="squash", interpolation="bilinear"
    )
    image = torch.tensor([[[0, 10, 255], [255, 13, 255]]], dtype=torch.uint8)
    found = preprocessing.fit(image.permute(2, 0, 1)[None], config).flatten().tolist()
    assert found == [128, 12, 255]


@pytest.mark.parametrize(
    ("mode", "target", "size", "expected"),
    [
        ("shortest", (224, 224), (300, 201), (334, 224)),  # 334.3: torchvision cuts
        ("shortest", (20, 10), (30, 30), (20, 20)),
        ("longest", (224, 224), (300, 201), (224, 150)),  # 150.08
        ("longest", (10, 10), (400, 2), (10, 0)),
        ("squash", (5, 6), (100, 3), (5, 6)),
    ],
)
def test_sizes_by_hand(mode: Any, target: Any, size: Any, expected: Any) -> None:
    config = Preprocess(size=target, mean=(0,) * 3, std=(1,) * 3, resize_mode=mode)
    assert scaled_size(*size, config) == expected
    assert (fault(*size, config) is None) == (min(expected) > 0)


def test_an_image_that_shrinks_to_nothing_is_named() -> None:
    config = Preprocess(size=(10, 10), mean=(0,) * 3, std=(1,) * 3, resize_mode="longest")
    with pytest.raises(ValueError, match=r"400 x 2 pixels is too narrow.*scaled to 10"):
        preprocess(torch.zeros((1, 400, 2, 3), dtype=torch.uint8), config)
    with pytest.raises(ValueError, match=r"900 x 2 pixels is too narrow.*scaled to 224"):
        fit_floats(torch.zeros((1, 900, 2, 3), dtype=torch.uint8), 224)


@pytest.mark.parametrize(
    "field", [{"resize_mode": "stretch"}, {"interpolation": "lanczos"}, {"mode": "L"}, {"blur": 1}]
)
def test_transforms_that_are_not_reproduced_are_refused(field: dict[str, Any]) -> None:
    config = asdict(open_clip_config()) | field
    with pytest.raises(CheckpointError, match="set preprocessing to 'host'"):
        Preprocess.of(config)


def test_one_constant_serves_all_channels() -> None:
    config = Preprocess.of(asdict(open_clip_config()) | {"mean": 0.5, "std": [0.1, 0.2, 0.3]})
    assert (config.mean, config.std) == ((0.5,) * 3, (0.1, 0.2, 0.3))


def test_floats_keep_hpsv2s_order() -> None:
    """Bicubic overshoots 0..1: nothing is clamped, and the padding is 0 before scaling."""
    image = np.zeros((1, 8, 16, 3), np.uint8)
    image[:, :, 8:] = 255
    found = fit_floats(torch.from_numpy(image), 32)
    assert found.shape == (1, 3, 32, 32)
    assert (found[:, :, :8] == 0).all()
    assert (found[:, :, 24:] == 0).all()
    assert found.max() > 1.01
    assert found.min() < -0.01


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((224, 100), (224, 100)),
        ((512, 384), (224, 168)),
        ((384, 512), (168, 224)),
        ((5, 5), (224, 224)),
        ((225, 3), (224, 3)),
        ((1000, 2), (224, 0)),
    ],
)
def test_longest_sides_by_hand(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert longest_size(*size, 224) == expected
