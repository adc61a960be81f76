"""Seconds of phases against the arithmetic that they were first estimated with (LlamaGen-L 256, 144
images in 12 groups of 12, guidance, H200), and the directions in which settings move them."""

from __future__ import annotations

import dataclasses

import pytest

from actors.models.llamagen import LlamaGenConfig
from actors.models.vq import VQConfig
from cluster.errors import ConfigError
from learner.capacity import seconds
from learner.capacity.cards import CARDS, card_named, recognised
from learner.capacity.seconds import Learning, Sampling, Transformer
from learner.capacity.workload import image_flops, transformer
from rewards.base import ImageWork
from rewards.networks.open_clip_check import clip_work

CARD = CARDS["h200"]
DIM, HIDDEN = 1024, 2816
L = Transformer(
    layers=24, dim=DIM, cached=DIM, tokens=256, vocabulary=16384,
    block=4 * DIM**2 + 3 * DIM * HIDDEN, parameters=343_000_000,
)  # fmt: skip
SAMPLING = Sampling(
    groups=12, rows=24, drawn=12, max_groups=1, width=2, fused=False, image_flops=253e9,
    image_bf16=False,
)  # fmt: skip
LEARNING = Learning(
    rollouts=144, rows=2, microbatch=12, passes_before=1, updates=2, checkpointing=True, bf16=True,
    compiled=False,
)  # fmt: skip
WITHIN = 0.2


def sample(**changes: object) -> float:
    return seconds.sample(L, dataclasses.replace(SAMPLING, **changes), CARD).seconds


def learn(**changes: object) -> float:
    return seconds.learn(L, dataclasses.replace(LEARNING, **changes), CARD).seconds


def test_sampling() -> None:
    assert sample() == pytest.approx(5.4, rel=WITHIN)  # one group after another: launches
    assert seconds.sample(L, SAMPLING, CARD).bound == "launches"
    assert sample(max_groups=8) == pytest.approx(1.3, rel=WITHIN)
    assert 0.4 < sample(max_groups=8, fused=True) < 0.75  # with own kernels


def test_decoding_of_512_rows() -> None:
    """256 images under guidance: a floor of 0.49 s, of which 70 % are aimed at."""
    together = {"groups": 1, "rows": 512, "drawn": 256}
    assert sample(**together) == pytest.approx((1.25 + 1.5) / 2, rel=WITHIN)
    assert sample(**together, fused=True) == pytest.approx(0.493 / 0.75, rel=WITHIN)
    found = seconds.sample(L, dataclasses.replace(SAMPLING, **together, fused=True), CARD)
    assert found.bound == "memory"


def test_kv_reads_are_those_of_the_roofline() -> None:
    """With free launches and weights, what is left is the cache: 385 ms for 512 rows."""
    cache = sum(2 * 512 * filled * DIM * 2 * 24 for filled in range(1, 257))
    assert cache / 4.3e12 == pytest.approx(0.385, rel=0.01)
    tall = dataclasses.replace(L, block=1, vocabulary=1)
    whole = dataclasses.replace(SAMPLING, groups=1, rows=512, drawn=256, fused=True)
    found = seconds.sample(tall, whole, CARD).seconds
    launches = 256 * 24 * (seconds.FUSED_KERNELS - 1) * seconds.LAUNCH
    expected = cache / (seconds.MEMORY * CARD.bandwidth * seconds.FUSED_ATTENTION)
    assert found - launches == pytest.approx(expected, rel=0.03)


def test_images_scores_and_features() -> None:
    images = seconds.decode_images
    assert images(SAMPLING, CARD).seconds == pytest.approx(0.4, rel=WITHIN)
    assert images(dataclasses.replace(SAMPLING, image_bf16=True), CARD).seconds == pytest.approx(
        0.12, rel=WITHIN
    )
    for precision, expected in (("fp32", 1.5), ("bf16", 0.2)):
        towers = [clip_work(name, precision) for name in ("ViT-H-14", "ViT-L-14-quickgelu")]
        scored = seconds.score(
            "score", "reward-server", 144, [each for each in towers if each], CARD
        )
        assert scored.seconds == pytest.approx(expected, rel=WITHIN)
    inception = ImageWork(flops=11.4e9, convolutions=True)
    rest = seconds.score("features", "reward-server", 144, [inception], CARD).seconds
    assert rest + seconds.moments(144, [(2048, True)]).seconds < 0.2


def test_learning() -> None:
    assert seconds.learning_flops(L, LEARNING) == pytest.approx(431e12, rel=0.05)
    without = dataclasses.replace(LEARNING, checkpointing=False)
    assert seconds.learning_flops(L, without) == pytest.approx(336e12, rel=0.05)
    assert learn() == pytest.approx(1.7, rel=0.1)
    assert learn(checkpointing=False, microbatch=48) == pytest.approx(1.2, rel=WITHIN)
    assert learn(checkpointing=False, microbatch=48, compiled=True) == pytest.approx(0.9, rel=0.1)
    assert seconds.learn(L, LEARNING, CARD).bound == "compute"
    small = dataclasses.replace(L, dim=128, block=200_000, vocabulary=512, parameters=5_000_000)
    tiny = dataclasses.replace(LEARNING, microbatch=2)
    assert seconds.learn(small, tiny, CARD).bound == "launches"


def test_two_learners_take_half_and_send_gradients() -> None:
    half = dataclasses.replace(LEARNING, rollouts=72, learners=2)
    alone = seconds.learn(L, dataclasses.replace(LEARNING, rollouts=72), CARD).seconds
    assert seconds.learn(L, half, CARD).seconds <= alone  # sent meanwhile
    slow = dataclasses.replace(CARD, link=1e9)
    found = seconds.learn(L, half, slow)
    assert found.bound == "copies"
    assert found.seconds == pytest.approx(2 * (2 + 4) * L.parameters / 1e9, rel=0.01)
    large = dataclasses.replace(L, parameters=2_000_000_000)  # gathered in every pass
    assert seconds.learn(large, half, slow).seconds > 5 * found.seconds


def test_weights() -> None:
    whole = seconds.publish(L, 2, CARD).seconds + seconds.load(L, 2, CARD).seconds
    assert whole == pytest.approx(0.15, rel=WITHIN)


@pytest.mark.parametrize(
    ("groups", "most", "calls"),
    [(12, 8, [8, 4]), (12, 1, [1] * 12), (12, 64, [8, 4]), (7, 4, [4, 2, 1]), (32, 32, [32])],
)
def test_groups_go_together_as_the_dispatcher_has_it(
    groups: int, most: int, calls: list[int]
) -> None:
    assert dataclasses.replace(SAMPLING, groups=groups, max_groups=most).calls == calls


def test_operations_are_counted() -> None:
    assert image_flops(VQConfig(), 16) == pytest.approx(253e9, rel=0.01)
    assert image_flops(VQConfig(), 24) > 2.2 * image_flops(VQConfig(), 16)
    large = clip_work("ViT-H-14", "bf16")
    assert large is not None
    assert large.flops == pytest.approx(334e9, rel=0.01)


def test_cached_keys_are_padded() -> None:
    large = LlamaGenConfig(grid=16, dim=3200, num_layers=24, num_heads=32)  # 100 numbers a head
    assert transformer(large).cached == 104 * 32


def test_cards() -> None:
    assert card_named("H200").memory == 141e9
    with pytest.raises(ConfigError, match=r"--gpu: expected one of h200, .* found 'h300'.*'h"):
        card_named("h300")
    found = recognised("NVIDIA H100 80GB HBM3", 79e9)
    assert found is not None
    assert (found.memory, found.bandwidth) == (79e9, CARDS["h100"].bandwidth)
    for other in ("NVIDIA GeForce GTX 1080", "NVIDIA GH200 480GB"):
        assert recognised(other, 8e9) is None
    for name in ("NVIDIA A100-SXM4-80GB", "NVIDIA L40S", "NVIDIA GeForce RTX 4090"):
        assert recognised(name, 8e9) is not None


def test_a_faster_card_is_faster() -> None:
    for name in ("a100", "l40s", "4090"):
        slower = CARDS[name]
        whole = dataclasses.replace(SAMPLING, max_groups=8)
        assert seconds.sample(L, whole, slower).seconds > seconds.sample(L, whole, CARD).seconds
        assert seconds.learn(L, LEARNING, slower).seconds > seconds.learn(L, LEARNING, CARD).seconds
