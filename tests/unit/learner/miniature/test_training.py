"""Training functions of the miniature, a few steps each."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from actors.checkpoints.loading import init_policy
from actors.models.llamagen import LlamaGenConfig
from actors.models.taming import TamingConfig
from actors.models.vq import VQTokenizer
from cluster.messages import Condition
from learner.miniature.systems import vqgan
from learner.miniature.systems.digits import SMALL_AUTOENCODER, digits_by_class
from learner.miniature.training import (
    LLAMAGEN_LOSS,
    TAMING_LOSS,
    Batches,
    LabelledImages,
    TokenizerLoss,
    train_autoencoder,
    train_policy,
    train_tokenizer,
)


def batches(data: LabelledImages | None = None) -> Batches:
    torch.manual_seed(0)
    return Batches(data or digits_by_class(), torch.Generator().manual_seed(0))


def test_tamings_loss_is_the_absolute_error_and_its_beta_weighs_the_codebook() -> None:
    """taming/modules/vqvae/quantize.py, VectorQuantizer2 with legacy=True, the default that its
    VQModel has: mean((z_q.detach() - z)^2) + beta * mean((z_q - z.detach())^2)."""
    assert TokenizerLoss(F.l1_loss, codebook=0.25, commitment=1.0) == TAMING_LOSS
    assert TokenizerLoss(F.mse_loss, codebook=1.0, commitment=0.25) == LLAMAGEN_LOSS


def test_a_vqgan_learns_with_a_codebook_that_is_not_normalised() -> None:
    steps: list[int] = []
    drawn = batches()
    tokenizer = train_tokenizer(drawn, vqgan.VQ, 30, lambda: steps.append(1), TAMING_LOSS)
    assert len(steps) == 30
    pixels = drawn.data.pixels[:64]
    with torch.no_grad():
        codes = tokenizer.encode(pixels)
        error = F.l1_loss(tokenizer(codes), pixels)
    assert codes.shape == (64, 4, 4)
    assert len(codes.unique()) > 4
    assert error < 0.7 * F.l1_loss(pixels.median(0).values.expand_as(pixels), pixels) + 0.15
    lengths = tokenizer.quantize.vectors().norm(dim=-1)
    assert lengths.std() > 0.01 * lengths.mean()


def test_features_of_an_autoencoder_tell_images_apart_that_a_classifier_takes_for_one() -> None:
    drawn = batches()
    network = train_autoencoder(drawn, SMALL_AUTOENCODER, 150, lambda: None)
    pixels = drawn.data.pixels
    with torch.no_grad():
        features, shown = network(pixels)
    gray = pixels.mean(1).flatten(1)
    assert F.mse_loss(shown, gray) < 0.4 * gray.var(0).mean()  # without it: the mean image, 1
    assert features.std(0).mean() == pytest.approx(1, abs=1e-3)
    of_one_class = features[drawn.data.labels == 3]
    assert of_one_class.var(0).sum() > 0.3 * features.var(0).sum()


class Numbered(VQTokenizer):
    """Encodes every image into the numbers of its cells in raster order."""

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return torch.arange(16).view(4, 4).expand(len(images), 4, 4)


TAMING = replace(vqgan.ARCHITECTURE, dim=16, num_layers=1)


@pytest.mark.parametrize("permuter", ["Identity", "ZCurve"])
def test_a_taming_policy_learns_its_own_order_of_tokens(permuter: str) -> None:
    config: TamingConfig = replace(TAMING, permuter=permuter)
    drawn = batches()
    policy = init_policy(config)
    with torch.device("meta"):
        numbered = Numbered(vqgan.VQ)
    train_policy(drawn, numbered, policy, 80, lambda: None)
    asked = policy.encode([Condition(text="", class_index=3)])
    order = policy.codes(torch.arange(16)[None]).flatten().argsort()[None]  # of the raster
    assert policy(order, asked).argmax(-1).tolist() == order.tolist()


def test_classes_are_dropped_where_there_is_a_null_class() -> None:
    """Some rows of a batch are then of the null class, the last of the table."""
    sizes = {"dim": 16, "num_layers": 1, "num_heads": 4, "grid": 4, "vocab_size": 64}
    policy = init_policy(LlamaGenConfig(**sizes, num_classes=10))
    with torch.device("meta"):
        numbered = Numbered(vqgan.VQ)
    train_policy(batches(), numbered, policy, 3, lambda: None)
    table = policy.get_parameter("cls_embedding.embedding_table.weight")
    assert table.shape == (11, 16)
    assert table.grad is not None
    assert (table.grad.abs().sum(1) > 0).all()
