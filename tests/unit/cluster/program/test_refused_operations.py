"""No role uses an operation that torch refuses on a GPU under deterministic algorithms.

The operations of a CPU stand for a GPU's: `actors.running_sums` computes as on one. The list is
that of `torch.use_deterministic_algorithms` in torch 2.13, under the names of its operators.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from actors import running_sums
from actors.decoding.decode import decode_tokens, token_likelihoods
from cluster.messages import Condition, SamplingSpec
from rewards.config import JudgeConfig, RewardsConfig, RewardServerConfig
from rewards.networks.inception import fid_pixels, torchvision_pixels
from rewards.networks.preprocessing import fit_floats
from rewards.servers.reward_server import build_panels
from tests.unit.helpers import SPECS, TINY, random_policy
from tests.unit.learner_cases import batch_of, make, tiny_policy_file

REFUSED = {
    *("avg_pool3d_backward", "_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward"),
    *("adaptive_max_pool2d_backward", "fractional_max_pool2d_backward", "max_unpool2d"),
    *("fractional_max_pool3d_backward", "max_unpool3d", "upsample_linear1d_backward"),
    *("upsample_bilinear2d_backward", "_upsample_bilinear2d_aa_backward"),
    *("upsample_bicubic2d_backward", "_upsample_bicubic2d_aa_backward"),
    *("upsample_trilinear3d_backward", "reflection_pad1d_backward", "reflection_pad2d_backward"),
    *("reflection_pad3d_backward", "nll_loss_forward", "nll_loss2d_forward", "_ctc_loss_backward"),
    *("_embedding_bag_dense_backward", "put_", "put", "histc", "bincount", "median", "nanmedian"),
    *("grid_sampler_2d_backward", "grid_sampler_3d_backward", "scatter_reduce"),
}
FLOATS_ONLY = {"cumsum", "cumsum_"}


class Operations(TorchDispatchMode):
    """Notes the operators that run, and refuses those that a GPU would."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        self.seen.add(name)
        assert name not in REFUSED, name
        assert name not in FLOATS_ONLY or not args[0].is_floating_point(), name
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running_sums, "_refused", lambda x: True)


def test_the_list_is_looked_at() -> None:
    with pytest.raises(AssertionError, match="cumsum"), Operations():
        torch.ones(3).cumsum(0)
    with pytest.raises(AssertionError, match="nll_loss"), Operations():
        torch.nn.functional.cross_entropy(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize("name", ["guided, filtered", "all filters"])
def test_decoding_and_learning_on_captions(name: str) -> None:
    """Forward and back, with a gradient of every weight."""
    config = TINY.__class__(**{**TINY.__dict__, "caption_dim": 6, "caption_tokens": 5})
    policy = random_policy(config).requires_grad_(True)
    features = [np.ones((3, 6), np.float32), np.ones((5, 6), np.float32)]
    asked = [Condition(text=str(each), features=each) for each in features]
    with Operations() as operations:
        given = policy.encode(asked)
        uniforms = torch.full((2, policy.num_tokens), 0.5, dtype=torch.float64)
        tokens = decode_tokens(policy, given, uniforms, SPECS[name]).tokens.clone()
        found = token_likelihoods(policy, tokens, given, SPECS[name])
        (found.unfiltered.sum() + found.entropies.sum()).backward()
    assert {"sort", "embedding_dense_backward"} <= operations.seen


def test_a_learners_step(tmp_path: Path) -> None:
    learner = make(tiny_policy_file(tmp_path))
    batch = batch_of(learner, spec=SamplingSpec())
    with Operations() as operations:
        learner.step(batch)
    assert "embedding_dense_backward" in operations.seen


def test_scorers_and_features() -> None:
    """The miniature's networks; preprocessing of the others."""
    config = RewardServerConfig(rewards=RewardsConfig(), judge=JudgeConfig())
    panels = build_panels(config, None)
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    asked = [Condition(text="a three", class_index=3)] * 3
    with Operations() as operations:
        for panel in panels.values():
            assert panel.score(images, asked).errors == (None,) * 3
        pixels = torch.from_numpy(images)
        fit_floats(pixels, 24)
        fid_pixels(pixels.permute(0, 3, 1, 2))
        torchvision_pixels(pixels.permute(0, 3, 1, 2))
    assert {"convolution", "_upsample_bicubic2d_aa"} & operations.seen
