"""What text-image scorers read: templates, class names, and conditions that cannot be read."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cluster.errors import ConfigError, DataError
from cluster.messages import Condition
from cluster.model_files.torchvision_ops import ensure_torchvision
from cluster.text_limits import Reading, fault
from learner.config import validate
from learner.data.conditions import ConditionsConfig
from learner.preflight import preflight
from rewards.base import ImageErrors
from rewards.networks.open_clip_check import local_tokenizer
from rewards.networks.open_clip_models import TextImageModel, reading_of
from rewards.scorers.clip import ClipConfig, ClipReward
from rewards.scorers.prompts import PromptConfig, Prompts
from rewards.scorers.text_image import TextFeatures, TextImageScorer

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)


def test_captions_are_read_as_they_are() -> None:
    text = "a {} of  {cats} "
    assert Prompts(PromptConfig())(Condition(text=text)) == (text,)
    filled = Prompts(PromptConfig(templates=("see {}.", "{}!")))(Condition(text="{}x"))
    assert filled == ("see {}x.", "{}x!")


def test_imagenet_names_and_templates_are_open_clips() -> None:
    config = PromptConfig(classes="imagenet", templates=("openai-imagenet",))
    sentences = Prompts(config)(Condition(text="unread", class_index=1))
    assert len(sentences) == 80
    assert sentences[0] == "a bad photo of a goldfish."
    simple = Prompts(PromptConfig(templates=("simple-imagenet",)))(Condition(text="dog"))
    assert len(simple) == 7
    assert "itap of a dog." in simple


@pytest.mark.parametrize("index", [None, -1, 1000])
def test_a_class_without_a_name_is_named(index: int | None) -> None:
    prompts = Prompts(PromptConfig(classes="imagenet"))
    with pytest.raises(DataError, match=rf"unknown class {index}: .* in 0\.\.999"):
        prompts(Condition(text="a cat", class_index=index))


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        ((), "at least one sentence"),
        (("a photo",), r"contain \{\} once, found 'a photo'"),
        (("{} and {}",), "once"),
        (("openai-imagenet", "{}"), "stand alone"),
    ],
)
def test_templates_that_are_none_are_refused(templates: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PromptConfig(templates=templates)


def test_templates_average_as_in_zero_shot_classification() -> None:
    """Against open_clip's own zero-shot head."""
    ensure_torchvision()
    from open_clip.zero_shot_classifier import build_zero_shot_classifier

    templates = ("{}", "a {}", "{} of the digits")
    clip = ClipReward(ClipConfig(prompts=PromptConfig(templates=templates)))
    names = ["three", "seven", "zero"]
    scores = clip(IMAGES, [Condition(text=name) for name in names])
    plainly = TextImageModel(ClipConfig().model, "", "cpu", "fp32")
    with torch.inference_mode():
        head = build_zero_shot_classifier(
            plainly.model,
            plainly.tokenizer,
            names,
            [lambda text, t=t: t.replace("{}", text) for t in templates],
        )
        features = plainly.encode_images(clip.preprocess(IMAGES))
        expected = (features @ head).diagonal()
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    plain = ClipReward(ClipConfig())(IMAGES, [Condition(text=name) for name in names])
    assert np.abs(scores - plain).max() > 1e-3


def test_rows_that_cannot_be_read_are_named_together() -> None:
    clip = ClipReward(ClipConfig())
    conditions = [Condition(text=" "), Condition(text="three"), Condition(text="three " * 300)]
    with pytest.raises(ImageErrors) as caught:
        clip(IMAGES, conditions)
    errors = caught.value.errors
    assert list(errors) == [0, 2]
    assert "text is empty" in errors[0]
    # The miniature's vocabulary has the word as one token: 300, a start and an end.
    assert "has 302 tokens, but the model reads 16" in errors[2]
    assert "prompts.long_captions to truncate" in errors[2]
    assert clip(IMAGES[:1], conditions[1:2]).shape == (1,)


def test_long_captions_are_cut_where_that_is_asked_for() -> None:
    clip = ClipReward(ClipConfig(prompts=PromptConfig(long_captions="truncate")))
    long = clip(IMAGES, [Condition(text="three " * 300)] * 3)
    fitting = clip(IMAGES, [Condition(text=" ".join(["three"] * n)) for n in (14, 40, 20)])
    np.testing.assert_allclose(long, fitting, atol=1e-6)


class Reads(TextImageScorer):
    """A scorer whose text tower has a given tokenizer; its scores are of nothing."""

    def __init__(self, tokenizer: Any, long_captions: str = "error") -> None:
        towers = SimpleNamespace(
            device=torch.device("cpu"),
            image_size=(8, 8),
            encode_images=lambda pixels: torch.ones(len(pixels), 2),
            encode_texts=lambda texts: torch.ones(len(texts), 2),
            reading=lambda text: reading_of(tokenizer, text),
        )
        super().__init__(towers, PromptConfig(long_captions=long_captions))  # type: ignore[arg-type]

    def preprocess(self, images: np.ndarray) -> torch.Tensor:
        return torch.zeros(len(images), 3, 8, 8)

    def size_fault(self, height: int, width: int) -> None:
        return None

    def fault(self, text: str) -> str:
        """Why a caption is refused; empty if it is read."""
        try:
            self(IMAGES[:1], [Condition(text=text)])
        except ImageErrors as error:
            return error.errors[0]
        return ""


def test_a_caption_of_77_tokens_fits_and_one_of_78_does_not() -> None:
    """open_clip's own vocabulary: "a" is one token, start and end take two."""
    ensure_torchvision()
    import open_clip

    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    assert reading_of(tokenizer, "a " * 75) == Reading(tokens=77, limit=77, known=75)
    assert reading_of(tokenizer, "a " * 76) == Reading(tokens=78, limit=77, known=76)
    scorer = Reads(tokenizer)
    assert scorer.fault("a " * 75) == ""
    assert "has 78 tokens, but the model reads 77" in scorer.fault("a " * 76)


class Words:
    """A tokenizer as transformers', of which open_clip wraps one: words, some of them known."""

    unk_token_id, all_special_ids = 2, [1, 2]

    def __call__(self, text: str, add_special_tokens: bool = True) -> SimpleNamespace:
        ids = [7 if word in ("a", "cat") else 2 for word in text.split()]
        return SimpleNamespace(input_ids=[*ids, 1] if add_special_tokens else ids)

    def convert_ids_to_tokens(self, tokens: list[int]) -> list[str]:
        return [{7: "word"}[token] for token in tokens]


def test_texts_that_a_tower_does_not_read_are_named() -> None:
    """One rule with captions (test_captions.py): cut, unknown, or emptied by cleaning."""
    ensure_torchvision()
    import open_clip

    scorer = Reads(open_clip.get_tokenizer("ViT-B-32"), "truncate")  # of bytes: knows everything
    assert scorer.fault("一只猫") == ""
    assert "nothing left" in scorer.fault("&nbsp;")
    clean = open_clip.tokenizer.get_clean_fn("canonicalize")
    for inner in (
        SimpleNamespace(tokenizer=Words(), clean_fn=clean, context_length=5),
        SimpleNamespace(tokenizer=Words(), context_length=5),  # SigLIP's own class
        SimpleNamespace(
            tokenizer=Words(), clean_fn=clean, context_length=5, tokenizer_mode="clips"
        ),
    ):
        scorer = Reads(inner, "truncate")
        assert scorer.fault("a cat") == ""
        assert scorer.fault("a zebra") == ""
        assert "unknown to the encoder, whole (2" in scorer.fault("ein Bär")
        assert "nothing left" in scorer.fault("!?")
        assert scorer.fault("a a a a a a") == ""
        assert "but the model reads 5" in Reads(inner).fault("a a a a a a")


@pytest.mark.parametrize("text", ["\u200b", "\x1a", "\u202b \u202c", "\u2060\ufeff"])
def test_texts_without_a_visible_character_are_named(text: str) -> None:
    """A tokenizer of bytes has tokens for them, which count as known."""
    found = Reading(tokens=5, limit=77, known=3)
    assert "has nothing in it that shows: leave it out" in fault(text, found, "truncate", "x")
    assert fault(f"{text}🏳️‍🌈{text}", found, "error", "x") == ""


def test_prompts_are_looked_at_before_a_run() -> None:
    config = {"rewards": {"clip": {"prompts": {"templates": ["{}"]}}}}
    names = {"names": ["one", "two " * 40], "template": "{}"}
    told = preflight(validate({**config, "conditions": names}, "here")).problems
    found = preflight(validate({}, "here"))  # what is shipped needs no tokenizer to be known
    assert not [each for each in found.problems if "prompts" in each]
    reads = local_tokenizer(ClipConfig().model)
    for condition in ConditionsConfig().conditions():
        reading = reading_of(reads, condition.text)
        assert reading.known
        assert reading.tokens <= reading.limit
    (problem,) = [each for each in told if "rewards.clip" in each and "prompts" in each]
    assert "1 of 2 are not read as written; the first is number 2" in problem
    assert "set rewards.clip.prompts.long_captions to truncate" in problem
    config["rewards"]["clip"]["prompts"]["long_captions"] = "truncate"
    found = preflight(validate({**config, "conditions": names}, "here"))
    assert not any("rewards.clip" in each and "prompts" in each for each in found.problems)
    assert any("rewards.clip" in note and "1 of 2 captions are cut" in note for note in found.notes)


def test_text_features_are_kept_within_a_bound() -> None:
    encoded: list[str] = []

    def encode(texts: list[str]) -> torch.Tensor:
        encoded.extend(texts)
        rows = [[float(len(text)), 1.0] for text in texts]
        return torch.nn.functional.normalize(torch.tensor(rows), dim=-1)

    features = TextFeatures(encode, limit=2)
    a, b, c = ("a",), ("bb",), ("ccc", "c")
    features([a, b, a])
    features([a])  # b is now the oldest
    features([c])
    assert encoded == ["a", "bb", "ccc", "c"]
    assert (a in features, b in features, c in features) == (True, False, True)
    rows = features([a, b, c, a])  # more than the bound, at once
    assert rows.shape == (4, 2)
    torch.testing.assert_close(rows.norm(dim=-1), torch.ones(4))
    mean = (encode(["ccc"]) + encode(["c"]))[0]
    torch.testing.assert_close(rows[2], mean / mean.norm())


def test_many_texts_are_encoded_in_chunks() -> None:
    chunks: list[int] = []

    def encode(texts: list[str]) -> torch.Tensor:
        chunks.append(len(texts))
        return torch.ones(len(texts), 2)

    TextFeatures(encode)([(str(n), f"{n}!") for n in range(50)])
    assert chunks == [64, 36]
