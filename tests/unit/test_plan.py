from __future__ import annotations

from pathlib import Path

import pytest

from actors.models.llamagen import LlamaGenConfig
from learner.config import load_preset, merge, to_dict, validate
from learner.plan import largest_microbatch, main, memory_of, rollouts_of

ARCHITECTURE = LlamaGenConfig(
    dim=128, num_layers=4, num_heads=2, grid=8, vocab_size=1024, num_classes=10
)  # fmt: skip


def config_of(**changes: object):
    return validate(merge(to_dict(load_preset("miniature")), changes), "test")


def test_the_largest_microbatch_is_the_last_that_fits() -> None:
    config = config_of(loss={"kl_coef": 0.1})
    limit = memory_of(config, ARCHITECTURE, 11).total
    assert largest_microbatch(config, ARCHITECTURE, limit) == 11
    assert largest_microbatch(config, ARCHITECTURE, limit - 1) == 10
    assert largest_microbatch(config, ARCHITECTURE, 1e15) == rollouts_of(config) == 160
    assert largest_microbatch(config, ARCHITECTURE, 1e3) == 0


def test_learners_share_rollouts_weights_and_optimizer() -> None:
    one, two = config_of(), config_of(num_learners=2)
    assert rollouts_of(two) == 80
    alone, shared = memory_of(one, ARCHITECTURE), memory_of(two, ARCHITECTURE)
    for name in ("weights", "gradients", "optimizer"):
        assert getattr(shared, name) == getattr(alone, name) / 2


def test_a_reference_counts_where_there_is_one() -> None:
    without = memory_of(config_of(), ARCHITECTURE)
    beside = memory_of(config_of(loss={"kl_coef": 0.1}), ARCHITECTURE)
    away = memory_of(
        config_of(loss={"kl_coef": 0.1}, learner={"reference_device": "cpu"}), ARCHITECTURE
    )
    assert (without.reference, away.reference) == (0, 0)
    assert beside.reference == beside.weights


def test_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--preset", "miniature", "--gpu-memory-gb", "1"]) == 0
    text = capsys.readouterr().out
    assert "fits 1 GB" in text
    assert "largest learner.microbatch that does: 160" in text
    assert main(["--preset", "miniatur"]) != 0
    assert "did you mean 'miniature'?" in capsys.readouterr().err
