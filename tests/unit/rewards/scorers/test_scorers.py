"""CLIP, preference, features, classifier: the production classes on the shipped networks."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cluster.errors import CheckpointError, DataError
from cluster.messages import Condition
from cluster.model_files.torchvision_ops import ensure_torchvision
from learner.data.digits import captions, digits
from rewards.base import ImageErrors
from rewards.networks.features import FeaturesConfig, load_features
from rewards.networks.open_clip_models import TextImageModel
from rewards.scorers.classifier import ClassifierAccuracy, ClassifierConfig
from rewards.scorers.clip import ClipConfig, ClipReward
from rewards.scorers.hpsv2 import HpsConfig, HpsReward
from rewards.scorers.prompts import PromptConfig

CONDITIONS = [Condition(text=text, class_index=index) for index, text in enumerate(captions())]


@pytest.fixture(scope="module")
def held_out() -> tuple[np.ndarray, list[Condition]]:
    images, labels = digits("held-out")
    return images[:200], [CONDITIONS[label] for label in labels[:200]]


@pytest.fixture(scope="module")
def clip() -> ClipReward:
    return ClipReward(ClipConfig())


def plain_open_clip(image: np.ndarray, text: str) -> float:
    """One image, one text, as open_clip's own example does it."""
    ensure_torchvision()
    import open_clip

    from cluster.model_files.tensors import locate

    directory = locate(ClipConfig().model, directory=True)
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{directory}")
    tokenizer = open_clip.get_tokenizer(
        f"local-dir:{directory}", bpe_path=str(directory / "vocabulary.txt.gz")
    )
    with torch.no_grad():
        picture = model.eval().encode_image(transform(Image.fromarray(image)).unsqueeze(0))
        words = model.encode_text(tokenizer([text]))
    return float(torch.cosine_similarity(picture, words))


@pytest.mark.parametrize("size", [(8, 8), (16, 16), (13, 9)])
def test_clip_equals_plain_open_clip(clip: ClipReward, size: tuple[int, int]) -> None:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (2, *size, 3)).astype(np.uint8)
    scores = clip(images, CONDITIONS[3:5])
    for image, condition, score in zip(images, CONDITIONS[3:5], scores):
        assert score == pytest.approx(plain_open_clip(image, condition.text), abs=1e-4)


def test_clip_tells_digits_apart(clip: ClipReward, held_out) -> None:
    images, conditions = held_out
    wrong = [CONDITIONS[(c.class_index + 3) % 10] for c in conditions]
    right_scores, wrong_scores = clip(images, conditions), clip(images, wrong)
    assert right_scores.dtype == np.float32
    assert (right_scores > wrong_scores).mean() > 0.95


def test_scores_do_not_depend_on_the_batch(clip: ClipReward, held_out) -> None:
    images, conditions = held_out
    alone = np.concatenate([clip(images[i : i + 1], conditions[i : i + 1]) for i in range(20)])
    np.testing.assert_allclose(clip(images[:20], conditions[:20]), alone, atol=1e-5)


def test_texts_are_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    encode = TextImageModel.encode_texts

    def counting(model: TextImageModel, texts: Sequence[str]) -> torch.Tensor:
        calls.append(len(texts))
        return encode(model, texts)

    monkeypatch.setattr(TextImageModel, "encode_texts", counting)
    clip = ClipReward(ClipConfig())
    images = np.zeros((3, 8, 8, 3), np.uint8)
    clip(images, [CONDITIONS[0], CONDITIONS[1], CONDITIONS[0]])
    clip(images, [CONDITIONS[1], CONDITIONS[2], CONDITIONS[2]])
    assert calls == [2, 1]


def test_images_of_several_sizes_come_back_in_order(clip: ClipReward) -> None:
    generator = np.random.default_rng(0)
    sizes = [(8, 8), (13, 9), (8, 8), (4, 40), (13, 9)]
    images = [generator.integers(0, 256, (*size, 3), np.uint8) for size in sizes]
    for scorer in (clip, HpsReward(HpsConfig())):
        alone = [float(scorer([image], [c])[0]) for image, c in zip(images, CONDITIONS)]
        np.testing.assert_allclose(scorer(images, CONDITIONS[:5]), alone, atol=1e-5)
        assert np.ptp(alone) > 1e-2


def test_images_may_lie_in_read_only_memory(clip: ClipReward) -> None:
    images = np.zeros((2, 8, 8, 3), np.uint8)
    images.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clip(images, CONDITIONS[:2])


def test_open_clips_transform_on_the_host_gives_the_same_scores(clip: ClipReward) -> None:
    host = ClipReward(ClipConfig(preprocessing="host"))
    images = np.random.default_rng(0).integers(0, 256, (4, 30, 20, 3), np.uint8)
    assert torch.equal(host.preprocess(images), clip.preprocess(images))
    scores = clip(images, CONDITIONS[:4])
    np.testing.assert_allclose(host(images, CONDITIONS[:4]), scores, atol=1e-6)


def test_bf16_digits_score_alike(clip: ClipReward, held_out) -> None:
    images, conditions = held_out
    for scorer, config in ((clip, ClipConfig), (HpsReward(HpsConfig()), HpsConfig)):
        half = ClipReward if config is ClipConfig else HpsReward
        scores = half(config(precision="bf16"))(images, conditions)
        apart = np.abs(scores - scorer(images, conditions))
        assert 0 < apart.max() < 0.03
        assert apart.mean() < 0.005


def test_warming_up_scores_something(clip: ClipReward) -> None:
    ClipReward(ClipConfig()).warm()
    imagenet = PromptConfig(classes="imagenet", templates=("a {}",), long_captions="truncate")
    HpsReward(HpsConfig(prompts=imagenet)).warm()


def test_preference_names_images_too_narrow_to_score(held_out) -> None:
    hps = HpsReward(HpsConfig())
    images = [np.zeros((8, 8, 3), np.uint8), np.zeros((2, 90, 3), np.uint8)]
    with pytest.raises(ImageErrors) as caught:
        hps(images, CONDITIONS[:2])
    assert list(caught.value.errors) == [1]
    assert "2 x 90 pixels is too narrow" in caught.value.errors[1]


def test_preference_prefers_clean_digits(held_out) -> None:
    images, conditions = held_out
    noise = np.random.default_rng(0).normal(0, 60, images.shape)
    noisy = np.clip(images + noise, 0, 255).astype(np.uint8)
    hps = HpsReward(HpsConfig())
    assert (hps(images, conditions) > hps(noisy, conditions)).mean() > 0.95


def test_preference_pads_the_shorter_side_with_zeros() -> None:
    hps = HpsReward(HpsConfig())
    wide = np.full((1, 8, 16, 3), 200, np.uint8)
    pixels = hps.preprocess(wide)[0]
    assert pixels.shape == (3, 8, 8)
    black, gray = (0 - 0.5) / 0.5, (200 / 255 - 0.5) / 0.5  # padded before normalisation
    torch.testing.assert_close(pixels[:, :2], torch.full((3, 2, 8), black))
    torch.testing.assert_close(pixels[:, 2:6], torch.full((3, 4, 8), gray))


def test_judge_classifier_reads_held_out_digits(held_out) -> None:
    images, conditions = held_out
    assert ClassifierAccuracy(ClassifierConfig())(images, conditions).mean() > 0.95


def test_classifier_refuses_captions(held_out) -> None:
    images, _ = held_out
    with pytest.raises(DataError, match="class_index, found a caption"):
        ClassifierAccuracy(ClassifierConfig())(images[:1], [Condition(text="a cat")])


def test_features_have_unit_deviation_on_training_images() -> None:
    extract = load_features(FeaturesConfig())
    features = extract(digits("train")[0])
    assert features.shape == (1000, 64)
    assert features.dtype == np.float32
    assert features.std(0).mean() == pytest.approx(1, abs=0.02)


def test_fingerprints_tell_networks_apart() -> None:
    reward = load_features(FeaturesConfig())
    judge = load_features(FeaturesConfig(checkpoint=ClassifierConfig().checkpoint))
    assert reward.fingerprint == load_features(FeaturesConfig()).fingerprint
    assert reward.fingerprint != judge.fingerprint


def test_features_refuse_other_sizes() -> None:
    with pytest.raises(DataError, match=r"takes \(8, 8, 3\) images, found \(16, 16, 3\)"):
        load_features(FeaturesConfig())(np.zeros((1, 16, 16, 3), np.uint8))


def test_a_checkpoint_file_for_a_named_model_is_loaded_strictly(tmp_path: Path) -> None:
    """The layout of the HPSv2 files, on a small model: {"state_dict": ...}, nothing unpickled."""
    ensure_torchvision()
    import open_clip

    config = json.loads((Path(open_clip.__file__).parent / "model_configs/RN50.json").read_text())
    config["vision_cfg"].update(layers=1, width=64, patch_size=16, image_size=32, head_width=32)
    config["text_cfg"].update(layers=1, width=64, heads=2)
    (tmp_path / "tiny-test-model.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-test-model")
    file = tmp_path / "tuned.pt"
    torch.save({"state_dict": model.state_dict()}, file)
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    scores = HpsReward(HpsConfig(model="tiny-test-model", pretrained=str(file)))(
        images, CONDITIONS[:2]
    )
    with torch.no_grad():
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
        mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(3, 1, 1)
        std = torch.tensor(open_clip.OPENAI_DATASET_STD).view(3, 1, 1)
        picture = model.eval().encode_image((pixels - mean) / std)
        words = model.encode_text(open_clip.get_tokenizer("tiny-test-model")(captions()[:2]))
    expected = torch.cosine_similarity(picture, words).numpy()
    np.testing.assert_allclose(scores, expected, atol=1e-5)

    state = model.state_dict()
    state["visual.odd"] = state.pop("visual.proj")
    torch.save({"state_dict": state}, file)
    with pytest.raises(CheckpointError, match=r"missing, the first is 'visual\.proj'"):
        HpsReward(HpsConfig(model="tiny-test-model", pretrained=str(file)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ClipConfig(model="ViT-X-99", pretrained="openai"), "'ViT-X-99' cannot be loaded"),
        (ClipConfig(model="ViT-B-32"), r"'ViT-B-32' needs weights: .*openai.* checkpoint file"),
        (ClipConfig(model="ViT-B-32", pretrained="/nowhere/x.pt"), "/nowhere/x.pt: no such file"),
        (ClipConfig(model="package://learner.miniature/networks/none"), "no such directory"),
        (ClipConfig(pretrained="openai"), "comes with its own weights, .* found 'openai'"),
        (ClipConfig(model="ViT-B-32", pretrained="openai"), "set model to ViT-B-32-quickgelu"),
    ],
)
def test_models_that_cannot_be_loaded_are_named(config: ClipConfig, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        ClipReward(config)


def test_pixel_features_are_brightness() -> None:
    pixels = load_features(FeaturesConfig(network="pixels"))
    images = np.zeros((1, 2, 3, 3), np.uint8)
    images[0, 1, 2] = (255, 255, 255)
    images[0, 0, 1] = (255, 0, 0)
    np.testing.assert_allclose(pixels(images), [[0, 1 / 3, 0, 0, 0, 1]], rtol=1e-6)
    with pytest.raises(DataError, match="at most 1024 pixels, found 256 x 256"):
        pixels(np.zeros((1, 256, 256, 3), np.uint8))
