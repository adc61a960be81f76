"""The networks of captioned digits: how they are built, and those that are shipped."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from rich.progress import Progress

from actors.checkpoints.loading import load_policy
from actors.text.features import features_of, read_caption_features
from learner.config import load_preset
from learner.data.captions import peek_captions
from learner.data.datasets import image_captions, load_images
from learner.data.digit_captions import attributes_of, captions_of
from learner.miniature.build import NETWORKS, BuildConfig, Builder
from learner.miniature.systems.captions import FEATURES, POLICY, digits_by_caption
from learner.miniature.training import Batches
from rewards.config import JUDGE, RewardServerConfig
from rewards.scorers.r_precision import distinct_texts
from rewards.servers.reward_server import build_panels

SHIPPED = NETWORKS / FEATURES
PRESET = load_preset("miniature-captions")


def test_augmented_images_are_measured_anew() -> None:
    data = digits_by_caption()
    index = torch.arange(200)
    assert torch.equal(data.relabel(index, data.pixels[:200]), data.labels[:200])
    assert data.relabel(index, data.pixels[:200].flip(-1)).ne(data.labels[:200]).sum() > 100
    batches = Batches(data, torch.Generator().manual_seed(0))
    _, labels = batches.draw(500)
    batches.generator.manual_seed(0)
    drawn = torch.randint(1000, (500,), generator=batches.generator)
    kept = (labels == data.labels[drawn]).float().mean()
    assert 0.3 < kept < 0.9
    assert torch.equal(labels // 9, data.labels[drawn] // 9)  # the digit stays


def test_a_build_is_whole_and_readable(tmp_path: Path) -> None:
    """One or two steps of each network; features in the file are those of the encoder beside it."""
    pytest.importorskip("transformers")
    from actors.text.encoder import CaptionEncoder

    config = BuildConfig(system="captions", out=tmp_path, seed=3, scale=0.002, num_threads=1)
    with Progress(disable=True) as progress:
        Builder(config, progress).build()
    encoder = CaptionEncoder(str(tmp_path / "captions" / "t5"))
    conditions = read_caption_features(tmp_path / FEATURES)
    (features,) = encoder([conditions[0].text])
    assert np.allclose(features_of(conditions[0]), features, atol=1e-5)
    assert peek_captions(str(tmp_path / FEATURES)).encoder == encoder.fingerprint
    policy = load_policy(replace(PRESET.policy, checkpoint=str(tmp_path / POLICY)))
    assert policy.config.conditioning == "caption"
    assert policy.encode(conditions[:2]).values.shape[1:] == (8, encoder.width)


def test_shipped_captions_are_those_of_the_training_images() -> None:
    texts = [condition.text for condition in read_caption_features(SHIPPED)]
    assert Counter(texts) == Counter(image_captions("digits:train"))
    assert SHIPPED.stat().st_size < 5e5
    assert pq.read_schema(SHIPPED).metadata[b"encoder"].startswith(b"t5-32-")
    found = PRESET.conditions.conditions()
    assert len({id(condition) for condition in found}) == 90  # repetitions are one condition


def test_the_shipped_encoder_made_the_shipped_features() -> None:
    pytest.importorskip("transformers")
    from actors.text.encoder import CaptionEncoder

    encoder = CaptionEncoder("package://learner.miniature/networks/captions/t5")
    conditions = list({each.text: each for each in read_caption_features(SHIPPED)}.values())
    found = encoder([condition.text for condition in conditions])
    for condition, features in zip(conditions, found):
        assert np.allclose(features_of(condition), features, atol=1e-4)
    assert peek_captions(str(SHIPPED)).encoder == encoder.fingerprint


def test_the_judge_ranks_the_captions_of_real_images() -> None:
    """The ceiling of the R-precision: held-out digits with their own captions, and with those of
    others."""
    conditions = {each.text: each for each in PRESET.conditions.conditions()}
    texts = distinct_texts(list(conditions.values()))
    panel = build_panels(RewardServerConfig(judge=PRESET.judge, texts=texts), None)[JUDGE]
    images = load_images("digits:held-out")[:300]
    own = [conditions[text] for text in captions_of(attributes_of("held-out"))[:300]]
    right = panel.score(images, own).scores["r_precision"].mean()
    wrong = panel.score(images, own[1:] + own[:1]).scores["r_precision"].mean()
    assert right > 0.4
    assert wrong < 0.1
