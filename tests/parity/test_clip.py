"""ClipReward of a true architecture against plain open_clip: its own transform, image by image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cluster.messages import Condition
from cluster.model_files.torchvision_ops import ensure_torchvision
from rewards.scorers.clip import ClipConfig, ClipReward
from tests.parity.text_image import PROMPTS, pictures, spread

MODEL = "ViT-B-32"
TAG = "laion2b_s34b_b79k"  # of its tags with GELU, which the model of this name has
SIZES = [(224, 224), (256, 256), (384, 384), (512, 384), (384, 512), (13, 9)]
BOUND = 1e-4
BF16_BOUND = 0.005

Score = Callable[[np.ndarray, str], float]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Score]:
    """A checkpoint with random weights, and the score that open_clip's examples compute with it."""
    ensure_torchvision()
    import open_clip

    torch.manual_seed(0)
    model, _, transform = open_clip.create_model_and_transforms(MODEL)
    spread(model)
    file = tmp_path_factory.mktemp("clip") / "random.pt"
    torch.save(model.state_dict(), file)
    tokenizer = open_clip.get_tokenizer(MODEL)

    @torch.no_grad()
    def score(image: np.ndarray, text: str) -> float:
        picture = model.encode_image(transform(Image.fromarray(image)).unsqueeze(0))
        return float(torch.cosine_similarity(picture, model.encode_text(tokenizer([text]))))

    return file, score


@pytest.fixture(scope="module")
def batch(plain: tuple[Path, Score]) -> tuple[list[np.ndarray], list[str], np.ndarray]:
    """Images of all sizes in one list, their texts, and plain open_clip's scores."""
    images = [image for index, size in enumerate(SIZES) for image in pictures(2, *size, seed=index)]
    texts = [PROMPTS[row % 2] for row in range(len(images))]
    return images, texts, np.array([plain[1](*pair) for pair in zip(images, texts)])


@pytest.fixture(scope="module")
def clip(plain: tuple[Path, Score]) -> ClipReward:
    """Ours, with the same weights; in batches smaller than the list of images."""
    return ClipReward(ClipConfig(model=MODEL, pretrained=str(plain[0]), tag=TAG, batch_size=5))


def test_scores_equal_plain_open_clip(clip, batch) -> None:
    images, texts, expected = batch
    scores = clip(images, [Condition(text=text) for text in texts])
    assert expected.std() > 100 * BOUND
    np.testing.assert_allclose(scores, expected, atol=BOUND, rtol=0)


@pytest.mark.slow
def test_bf16_scores_are_close(plain, batch) -> None:
    """With weights as they are initialised: those of the other tests amplify any rounding."""
    images, texts = batch[0][::2], batch[1][:6]
    state = torch.load(plain[0], weights_only=True)
    for name in (name for name in state if name.endswith("in_proj_weight")):
        state[name][: 2 * state[name].shape[1]] /= 4
    file = plain[0].with_name("mild.pt")
    torch.save(state, file)
    conditions = [Condition(text=text) for text in texts]
    full, half = (
        ClipReward(ClipConfig(model=MODEL, pretrained=str(file), tag=TAG, precision=precision))
        for precision in ("fp32", "bf16")
    )
    expected, scores = full(images, conditions), half(images, conditions)
    apart = np.abs(scores - expected)
    assert 0 < apart.max() < BF16_BOUND
    assert np.corrcoef(scores, expected)[0, 1] > 0.95
    print(f"bf16: {apart.max():.1e} apart, spread {expected.std():.1e}")


def test_an_image_alone_scores_as_in_the_batch(clip, batch) -> None:
    images, texts, _ = batch
    conditions = [Condition(text=text) for text in texts]
    alone = [float(clip([image], [c])[0]) for image, c in zip(images, conditions)]
    np.testing.assert_allclose(clip(images, conditions), alone, atol=1e-5)
