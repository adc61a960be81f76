"""Training of small networks from scratch, seeded: tokenizers, policies, scorers.

Image size, classes and texts are the data's. Every function calls its `tick` once a step, for the
progress bar.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actors.models.base import PolicyModule
from actors.models.vq import VQConfig, VQTokenizer
from cluster.messages import Condition
from rewards.networks.convnet import ConvNet, ConvNetConfig

Tick = Callable[[], None]
Augmentation = Callable[[Tensor, torch.Generator], Tensor]
"""(Pixels, random generator) -> other pixels of the same shape."""
AUGMENTED_COPIES = 8
ENCODED_AT_ONCE = 8000  # images
CONDITION_DROPOUT = 0.1
CORRUPTED_TOKENS = 5 / 16  # share, in the worse image of a preference pair


@dataclass(frozen=True)
class LabelledImages:
    """Training images, each with one of the conditions that a policy is to learn."""

    pixels: Tensor
    """(N, 3, S, S) in [-1, 1]"""
    labels: Tensor
    """(N,) int64: index into `conditions`."""
    conditions: Sequence[Condition]
    """Every one has an image."""
    augment: Augmentation

    @property
    def image_size(self) -> int:
        return self.pixels.shape[-1]

    def relabel(self, index: Tensor, pixels: Tensor) -> Tensor:
        """Labels (B,) of augmented images `index`, now `pixels`."""
        return self.labels[index]

    @property
    def texts(self) -> list[str]:
        """Of the conditions."""
        return [condition.text for condition in self.conditions]


@dataclass(frozen=True)
class Batches:
    """Random augmented batches of training images."""

    data: LabelledImages
    generator: torch.Generator

    def draw(self, size: int) -> tuple[Tensor, Tensor]:
        """Pixels (size, 3, S, S) and labels (size,)."""
        index = torch.randint(len(self.data.pixels), (size,), generator=self.generator)
        pixels = self.data.augment(self.data.pixels[index], self.generator)
        return pixels, self.data.relabel(index, pixels)


def optimise(
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


@dataclass(frozen=True)
class TokenizerLoss:
    """Loss of a VQ autoencoder, without the perceptual term and the discriminator's of the
    published trainings: the weights of the perceptual network cannot be shipped."""

    reconstruction: Callable[[Tensor, Tensor], Tensor]
    codebook: float
    """Weight of the squared distance by which codes are drawn to latents."""
    commitment: float
    """Weight of the one by which latents are drawn to codes."""


LLAMAGEN_LOSS = TokenizerLoss(F.mse_loss, codebook=1.0, commitment=0.25)
TAMING_LOSS = TokenizerLoss(F.l1_loss, codebook=0.25, commitment=1.0)
"""What taming's loss is before its discriminator starts. Its beta, .25, is the weight of the
codebook, not of the commitment: its VectorQuantizer2 has `legacy` set."""


def train_tokenizer(
    batches: Batches, config: VQConfig, steps: int, tick: Tick, objective: TokenizerLoss
) -> VQTokenizer:
    """VQ autoencoder with straight-through gradients.

    The first twentieth trains a plain autoencoder, whose latents then initialise the codebook.
    Unused codes are moved onto latents of the batch from time to time.
    """
    tokenizer = VQTokenizer(config)
    start, restart_until = steps // 20, int(steps * 0.7)
    used = torch.zeros(config.codebook_size)

    def loss(step: int) -> Tensor:
        images, _ = batches.draw(32)
        latents = tokenizer.encode_latents(images)
        if config.normalise:
            latents = F.normalize(latents, dim=1)
        if step < start:
            return objective.reconstruction(tokenizer.decode_latents(latents), images)
        if step == start or (step < restart_until and step % 40 == 0):
            _restart_codes(tokenizer, latents, used, everything=step == start, batches=batches)
        codes = tokenizer.nearest_codes(latents)
        used.add_(torch.bincount(codes.flatten(), minlength=config.codebook_size))
        quantised = F.embedding(codes, tokenizer.quantize.vectors()).permute(0, 3, 1, 2)
        through = latents + (quantised - latents).detach()
        codebook = F.mse_loss(quantised, latents.detach())
        commitment = F.mse_loss(latents, quantised.detach())
        reconstruction = objective.reconstruction(tokenizer.decode_latents(through), images)
        return reconstruction + objective.codebook * codebook + objective.commitment * commitment

    optimise(tokenizer, loss, steps, 6e-3, tick)
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
    batches: Batches, tokenizer: VQTokenizer, policy: PolicyModule, steps: int, tick: Tick
) -> None:
    """Next-token cross-entropy, with condition dropout where there is a null condition; short, so
    that RL has headroom."""
    for name, parameter in policy.named_parameters():
        if parameter.ndim > 1:  # a caption's two projections keep its features' size
            std = parameter.shape[1] ** -0.5 if "cap_proj" in name else 0.02
            nn.init.normal_(parameter, std=std, generator=batches.generator)
        if name == "output.weight":
            nn.init.zeros_(parameter)

    with torch.no_grad():  # each image in several augmentations, encoded once
        images, labels = batches.draw(AUGMENTED_COPIES * len(batches.data.pixels))
        codes = torch.cat([tokenizer.encode(part) for part in images.split(ENCODED_AT_ONCE)])
        places = policy.codes(torch.arange(policy.num_tokens).view(1, -1)).flatten()
        sequences = codes.flatten(1)[:, places.argsort()]
        conditions = policy.encode(batches.data.conditions)

    def loss(_: int) -> Tensor:
        index = torch.randint(len(sequences), (64,), generator=batches.generator)
        tokens, given = sequences[index], conditions[labels[index]]
        if policy.config.guidable:
            dropped = torch.rand(len(index), generator=batches.generator) < CONDITION_DROPOUT
            both = given.concat(policy.null_conditions(given))
            given = both[torch.arange(len(index)) + len(index) * dropped]
        return F.cross_entropy(policy(tokens, given).flatten(0, 1), tokens.flatten())

    optimise(policy, loss, steps, 2e-3, tick)


def train_clip(
    batches: Batches, model: nn.Module, text_tokens: Tensor, steps: int, tick: Tick
) -> None:
    """Images against the texts (C, L) of all conditions: CLIP's loss for repeated captions."""

    def loss(_: int) -> Tensor:
        images, labels = batches.draw(64)
        image, text, scale = model(images, text_tokens)
        return F.cross_entropy(scale * image @ text.T, labels)

    optimise(model, loss, steps, 1e-3, tick)


def train_caption_clip(
    batches: Batches,
    model: nn.Module,
    text_tokens: Tensor,
    attributes: Tensor,
    steps: int,
    tick: Tick,
) -> None:
    """CLIP's loss for repeated captions, as `train_clip`, and, of images and texts alike, linear
    read-outs of each attribute from the features before they are normalised, discarded afterwards.
    Without them the towers agree on the most visible attribute alone for a thousand steps.

    Args:
        attributes: (C, K) int64, of the texts.
    """
    towers: Any = model
    width, kinds = towers.text_projection.shape[1], (attributes.amax(0) + 1).tolist()
    heads = nn.ModuleList(nn.Linear(width, count) for _ in range(2) for count in kinds)

    def loss(_: int) -> Tensor:
        images, labels = batches.draw(64)
        image, text = towers.encode_image(images), towers.encode_text(text_tokens)
        told = [(image, attributes[labels])] * len(kinds) + [(text, attributes)] * len(kinds)
        read = [
            F.cross_entropy(head(features), wanted[:, at % len(kinds)])
            for at, (head, (features, wanted)) in enumerate(zip(heads, told))
        ]
        cosines = F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
        return F.cross_entropy(towers.logit_scale.exp() * cosines, labels) + torch.stack(read).sum()

    optimise(nn.ModuleList([model, heads]), loss, steps, 2e-3, tick)


def train_preference(
    batches: Batches,
    model: nn.Module,
    text_tokens: Tensor,
    tokenizer: VQTokenizer,
    steps: int,
    tick: Tick,
) -> None:
    """HPSv2's loss: of two images for one caption, the preferred one gets the higher cosine.

    Preferred is a real image of the condition. The other is, by thirds, the same image with random
    tokens, with noise, or an image of another condition.
    """
    count = len(text_tokens)

    def loss(_: int) -> Tensor:
        images, labels = batches.draw(48)
        worse = images.clone()
        worse[:16] = _corrupt_tokens(images[:16], tokenizer, batches.generator)
        noise = torch.randn(images[16:32].shape, generator=batches.generator)
        worse[16:32] = (images[16:32] + 0.5 * noise).clamp(-1, 1)
        shift = torch.randint(1, count, (16,), generator=batches.generator)
        asked = labels.clone()
        asked[32:] = (labels[32:] + shift) % count  # another text...
        better = images.clone()
        better[32:] = _images_of(batches, asked[32:])  # ...whose own images are preferred
        image, text, scale = model(torch.cat([better, worse]), text_tokens)
        cosine = (image * text[asked.repeat(2)]).sum(-1).view(2, -1)
        return F.cross_entropy(scale * cosine.T, torch.zeros(len(images), dtype=torch.long))

    optimise(model, loss, steps, 1e-3, tick)


def _images_of(batches: Batches, labels: Tensor) -> Tensor:
    """A random image of each label."""
    data = batches.data
    picked = [
        int(members[torch.randint(len(members), (1,), generator=batches.generator)])
        for members in (torch.nonzero(data.labels == label).flatten() for label in labels)
    ]
    return data.augment(data.pixels[picked], batches.generator)


@torch.no_grad()
def _corrupt_tokens(images: Tensor, tokenizer: VQTokenizer, generator: torch.Generator) -> Tensor:
    codes = tokenizer.encode(images)
    order = torch.rand(codes.flatten(1).shape, generator=generator).argsort(-1)
    hit = (order < int(CORRUPTED_TOKENS * order.shape[1])).view(codes.shape)
    random = torch.randint(tokenizer.config.codebook_size, codes.shape, generator=generator)
    return tokenizer(torch.where(hit, random, codes)).clamp(-1, 1)


def train_classifier(batches: Batches, config: ConvNetConfig, steps: int, tick: Tick) -> ConvNet:
    """Cross-entropy of the conditions."""

    def loss(images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels)

    return _train_convnet(batches, config, loss, steps, tick)


def train_autoencoder(batches: Batches, config: ConvNetConfig, steps: int, tick: Tick) -> ConvNet:
    """Reconstruction of the gray image by the network's head, which has one output a pixel: its
    features know nothing of classes, and keep the variety within one that a classifier's lose."""

    def loss(images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        return F.mse_loss(logits, images.mean(1).flatten(1))

    return _train_convnet(batches, config, loss, steps, tick)


def _train_convnet(
    batches: Batches,
    config: ConvNetConfig,
    loss: Callable[[Tensor, Tensor, Tensor], Tensor],
    steps: int,
    tick: Tick,
) -> ConvNet:
    """Minimise loss(images, logits, labels); then scale features to unit deviation on the training
    images."""
    network = ConvNet(config)

    def of_batch(_: int) -> Tensor:
        images, labels = batches.draw(64)
        return loss(images, network(images)[1], labels)

    optimise(network, of_batch, steps, 2e-3, tick)
    with torch.no_grad():
        features, _ = network(batches.data.pixels)
        network.scale.copy_(1 / features.std(0).mean())
    return network
