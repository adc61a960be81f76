"""Training of the miniature's networks, from scratch and seeded.

Every function calls its `tick` once a step, for the progress bar.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actors.models.base import Conditions
from actors.models.llamagen import LlamaGen, LlamaGenConfig
from actors.models.vq import VQConfig, VQTokenizer
from learner.data.digits import augment
from rewards.networks.convnet import ConvNet, ConvNetConfig

Tick = Callable[[], None]
AUGMENTED_COPIES = 8
CONDITION_DROPOUT = 0.1
CORRUPTED_TOKENS = 5  # of 16, in the worse image of a preference pair


@dataclass(frozen=True)
class Batches:
    """Random augmented batches of the training images."""

    pixels: Tensor
    """(N, 3, 8, 8) in [-1, 1]"""
    labels: Tensor
    """(N,) int64"""
    generator: torch.Generator

    def draw(self, size: int) -> tuple[Tensor, Tensor]:
        index = torch.randint(len(self.pixels), (size,), generator=self.generator)
        return augment(self.pixels[index], self.generator), self.labels[index]


def _optimise(
    module: nn.Module, loss: Callable[[int], Tensor], steps: int, lr: float, tick: Tick
) -> None:
    """AdamW with a short warm-up and a cosine to zero."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    warmup = max(1, steps // 20)
    module.train()
    for step in range(steps):
        progress = max(0, step - warmup) / max(1, steps - warmup)
        scale = min(1, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = lr * scale
        optimizer.zero_grad(set_to_none=True)
        loss(step).backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        tick()
    module.eval()


def train_tokenizer(batches: Batches, config: VQConfig, steps: int, tick: Tick) -> VQTokenizer:
    """VQ autoencoder: reconstruction, commitment and codebook losses, straight-through gradients.

    The first twentieth trains a plain autoencoder, whose latents then initialise the codebook.
    Unused codes are moved onto latents of the batch from time to time.
    """
    tokenizer = VQTokenizer(config)
    start, restart_until = steps // 20, int(steps * 0.7)
    used = torch.zeros(config.codebook_size)

    def loss(step: int) -> Tensor:
        images, _ = batches.draw(32)
        latents = F.normalize(tokenizer.encode_latents(images), dim=1)
        if step < start:
            return F.mse_loss(tokenizer.decode_latents(latents), images)
        if step == start or (step < restart_until and step % 40 == 0):
            _restart_codes(tokenizer, latents, used, everything=step == start, batches=batches)
        codes = tokenizer.nearest_codes(latents)
        used.add_(torch.bincount(codes.flatten(), minlength=config.codebook_size))
        quantised = F.embedding(codes, tokenizer.quantize.vectors()).permute(0, 3, 1, 2)
        through = latents + (quantised - latents).detach()
        codebook = F.mse_loss(quantised, latents.detach())
        commitment = F.mse_loss(latents, quantised.detach())
        return F.mse_loss(tokenizer.decode_latents(through), images) + codebook + 0.25 * commitment

    _optimise(tokenizer, loss, steps, 6e-3, tick)
    return tokenizer


@torch.no_grad()
def _restart_codes(
    tokenizer: VQTokenizer, latents: Tensor, used: Tensor, *, everything: bool, batches: Batches
) -> None:
    dead = torch.ones_like(used, dtype=torch.bool) if everything else used == 0
    flat = latents.permute(0, 2, 3, 1).flatten(0, 2)
    chosen = torch.randperm(len(flat), generator=batches.generator)[: int(dead.sum())]
    tokenizer.quantize.embedding.weight[dead] = flat[chosen]
    used.zero_()


def train_policy(
    batches: Batches, tokenizer: VQTokenizer, config: LlamaGenConfig, steps: int, tick: Tick
) -> LlamaGen:
    """Next-token cross-entropy with condition dropout; short, so that RL has headroom."""
    policy = LlamaGen(config)
    for name, parameter in policy.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.02, generator=batches.generator)
        if name == "output.weight":
            nn.init.zeros_(parameter)

    with torch.no_grad():  # each image in several augmentations, encoded once
        images, labels = batches.draw(AUGMENTED_COPIES * len(batches.pixels))
        codes = tokenizer.encode(images).flatten(1)

    def loss(_: int) -> Tensor:
        index = torch.randint(len(codes), (64,), generator=batches.generator)
        tokens, given = codes[index], Conditions(labels[index])
        dropped = torch.rand(len(index), generator=batches.generator) < CONDITION_DROPOUT
        null = policy.null_conditions(given)
        conditions = Conditions(torch.where(dropped, null.values, given.values))
        return F.cross_entropy(policy(tokens, conditions).flatten(0, 1), tokens.flatten())

    _optimise(policy, loss, steps, 2e-3, tick)
    return policy


def train_clip(
    batches: Batches, model: nn.Module, text_tokens: Tensor, steps: int, tick: Tick
) -> None:
    """Images against the captions of all classes: CLIP's loss for repeated captions."""

    def loss(_: int) -> Tensor:
        images, labels = batches.draw(64)
        image, text, scale = model(images, text_tokens)
        return F.cross_entropy(scale * image @ text.T, labels)

    _optimise(model, loss, steps, 1e-3, tick)


def train_preference(
    batches: Batches,
    model: nn.Module,
    text_tokens: Tensor,
    tokenizer: VQTokenizer,
    steps: int,
    tick: Tick,
) -> None:
    """HPSv2's loss: of two images for one caption, the preferred one gets the higher cosine.

    Preferred is a real digit of the class. The other is, by thirds, the same digit with random
    tokens, with noise, or a digit of another class.
    """

    def loss(_: int) -> Tensor:
        images, labels = batches.draw(48)
        worse = images.clone()
        worse[:16] = _corrupt_tokens(images[:16], tokenizer, batches.generator)
        noise = torch.randn(images[16:32].shape, generator=batches.generator)
        worse[16:32] = (images[16:32] + 0.5 * noise).clamp(-1, 1)
        shift = torch.randint(1, 10, (16,), generator=batches.generator)
        asked = labels.clone()
        asked[32:] = (labels[32:] + shift) % 10  # the caption of another class...
        better = images.clone()
        better[32:] = _of_classes(batches, asked[32:])  # ...whose own digits are preferred
        image, text, scale = model(torch.cat([better, worse]), text_tokens)
        cosine = (image * text[asked.repeat(2)]).sum(-1).view(2, -1)
        return F.cross_entropy(scale * cosine.T, torch.zeros(len(images), dtype=torch.long))

    _optimise(model, loss, steps, 1e-3, tick)


def _of_classes(batches: Batches, classes: Tensor) -> Tensor:
    picked = [
        int(members[torch.randint(len(members), (1,), generator=batches.generator)])
        for members in (torch.nonzero(batches.labels == label).flatten() for label in classes)
    ]
    return augment(batches.pixels[picked], batches.generator)


@torch.no_grad()
def _corrupt_tokens(images: Tensor, tokenizer: VQTokenizer, generator: torch.Generator) -> Tensor:
    codes = tokenizer.encode(images)
    order = torch.rand(codes.flatten(1).shape, generator=generator).argsort(-1)
    hit = (order < CORRUPTED_TOKENS).view(codes.shape)
    random = torch.randint(tokenizer.config.codebook_size, codes.shape, generator=generator)
    return tokenizer(torch.where(hit, random, codes)).clamp(-1, 1)


def train_classifier(batches: Batches, config: ConvNetConfig, steps: int, tick: Tick) -> ConvNet:
    """Cross-entropy; then features are scaled to unit deviation on the training images."""
    network = ConvNet(config)

    def loss(_: int) -> Tensor:
        images, labels = batches.draw(64)
        return F.cross_entropy(network(images)[1], labels)

    _optimise(network, loss, steps, 2e-3, tick)
    with torch.no_grad():
        features, _ = network(batches.pixels)
        network.scale.copy_(1 / features.std(0).mean())
    return network
