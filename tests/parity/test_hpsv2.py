"""HpsReward against the hpsv2 package's own `score`, on the same checkpoint with random weights."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from cluster.messages import Condition
from rewards.scorers.clip import ClipConfig, ClipReward
from tests.parity import text_image
from tests.parity.text_image import TINY

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("hpsv2") is None, reason="the extra tessera-rl[hpsv2] is not installed"
)
BOUND = 1e-4
FREE = 8 * 2**30  # bytes that one side with the true architecture needs at most


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """A checkpoint of the small architecture, and the package's scores with it."""
    folder = tmp_path_factory.mktemp("hpsv2")
    text_image.register_tiny(folder)
    checkpoint = folder / "tiny.pt"
    text_image.make_checkpoint(TINY, checkpoint)
    module = text_image.prepare_package(TINY, folder, folder / "root")
    return checkpoint, text_image.package_scores(module, checkpoint)


@pytest.mark.parametrize("backend", ["open_clip", "package"])
def test_scores_equal_the_package(tiny: tuple[Path, list[float]], backend: str) -> None:
    checkpoint, expected = tiny
    scores = text_image.our_scores(TINY, checkpoint, backend)
    assert np.std(expected) > 100 * BOUND
    np.testing.assert_allclose(scores, expected, atol=BOUND, rtol=0)


def test_another_preprocessing_would_show(tiny: tuple[Path, list[float]]) -> None:
    """The same weights after open_clip's own transform: equal where nothing is resized, only."""
    checkpoint, expected = tiny
    clip = ClipReward(ClipConfig(model=TINY, pretrained=str(checkpoint)))
    images, texts = zip(*text_image.pairs())
    scores = clip(images, [Condition(text=text) for text in texts])
    apart = np.abs(scores - expected).reshape(len(text_image.PROMPTS), len(text_image.SIZES), -1)
    assert apart[:, 0].max() < BOUND
    for index in range(1, len(text_image.SIZES)):
        assert apart[:, index].max() > BOUND, text_image.SIZES[index]


@pytest.fixture(scope="module")
def huge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, np.ndarray]]:
    """A checkpoint of ViT-H-14, and the package's scores with it."""
    free = psutil.virtual_memory().available
    if free < FREE:
        pytest.skip(f"{FREE / 2**30:.0f} GiB of memory needed, {free / 2**30:.1f} free")
    checkpoint = tmp_path_factory.mktemp("vit-h-14") / "random.pt"
    _side("make", checkpoint)
    yield checkpoint, np.array(json.loads(_side("package", checkpoint)))
    checkpoint.unlink()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("backend", ["open_clip", "package"])
def test_scores_of_the_true_architecture_equal_the_package(
    huge: tuple[Path, np.ndarray], backend: str
) -> None:
    """986M weights, 4 GB: one side at a time, each in a process of its own."""
    checkpoint, expected = huge
    scores = np.array(json.loads(_side("ours", checkpoint, backend)))
    print(f"{backend}: {np.abs(scores - expected).max():.1e} apart, spread {expected.std():.1e}")
    assert expected.std() > 100 * BOUND
    np.testing.assert_allclose(scores, expected, atol=BOUND, rtol=0)


def _side(side: str, checkpoint: Path, *rest: str) -> str:
    command = [sys.executable, "-m", "tests.parity.text_image", side, "ViT-H-14", str(checkpoint)]
    done = subprocess.run([*command, *rest], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
