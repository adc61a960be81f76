"""Any preset at reduced width, with random weights: the same classes and settings, small shapes.

For tests and benches. Policy and tokenizer are of the preset's family; scorers are the miniature's,
and the features those of a small random network, unless they are kept as the preset names them.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from actors.checkpoints.loading import init_policy
from actors.checkpoints.zoo import MODELS
from actors.models.base import PolicyArchitecture
from actors.models.llamagen import LlamaGenConfig
from actors.models.taming import TamingConfig
from actors.models.vq import VQConfig, VQTokenizer
from actors.text.features import write_caption_features
from cluster.model_files.tensors import write_tensors
from learner.config import RunConfig, merge, validate
from learner.data.conditions import IMAGENET
from learner.miniature.systems import vqgan
from rewards.config import RewardsConfig
from rewards.networks.convnet import ConvNet, ConvNetConfig

CAPTIONS = ("a cat", "two dogs", "red")


@dataclass(frozen=True, kw_only=True)
class Reduction:
    """What is made smaller; 0 keeps a size."""

    width: int = 32
    layers: int = 2
    grid: int = 4
    vocab: int = 64
    channels: int = 32
    """Of the tokenizer, a multiple of 32."""
    pixels_per_token: int = 2


SMALL = Reduction()
FULL = Reduction(width=0, layers=0, grid=0, vocab=0, channels=0, pixels_per_token=0)


def presets() -> list[str]:
    """Names of the shipped presets."""
    folder = importlib.resources.files("learner").joinpath("presets")
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir())


def values_of(preset: str) -> dict[str, Any]:
    """A preset as it is written."""
    file = importlib.resources.files("learner").joinpath("presets", f"{preset}.yaml")
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def random_run(
    preset: str,
    folder: Path,
    reduction: Reduction = SMALL,
    changes: Mapping[str, Any] | None = None,
    *,
    scorers: bool = True,
) -> RunConfig:
    """A configuration that runs without a download; its files are written into `folder`.

    Args:
        scorers: put small scorers in the place of the preset's.
    """
    values = values_of(preset)
    policy, tokenizer = architectures(values, reduction)
    torch.manual_seed(0)
    files: dict[str, Any] = {"policy": init_policy(policy), "tokenizer": VQTokenizer(tokenizer)}
    for name, module in files.items():
        file = folder / f"{name}.safetensors"
        write_tensors(file, module.state_dict(), module.config.to_dict())
        values[name] = {"checkpoint": str(file)}
    if values.get("conditions", {}).get("captions"):
        assert isinstance(policy, LlamaGenConfig)
        values["conditions"]["captions"] = str(_captions(folder, policy))
    if scorers:
        side = policy.grid * tokenizer.downsampling
        values["rewards"] = _small_scorers(values.get("rewards", {}), folder, side)
        if "evaluation" in values:  # else the miniature's, which fits
            values |= _small_judge(values, folder, side)
        if "real" in values:  # images of the reduced size
            captioned = isinstance(policy, LlamaGenConfig) and policy.caption_dim
            source = str(_real_tokens(folder, policy)) if captioned else "digits:train"
            values["real"]["source"] = source
        if values.get("conditions", {}).get("names") == IMAGENET:  # too long for the small scorers
            short = {"names": [str(index) for index in range(1000)], "template": "{}"}
            values["conditions"] |= short
    else:
        values |= {"evaluation": {"num_images": 0}, "output": {}, "judge": {}}
    return validate(merge(values, changes or {}), f"{preset}, reduced")


def architectures(
    values: Mapping[str, Any], reduction: Reduction
) -> tuple[PolicyArchitecture, VQConfig]:
    """Those of a preset's policy and tokenizer, made smaller."""
    model = MODELS.get(values.get("policy", {}).get("checkpoint", ""))
    if "vqgan/" in values.get("policy", {}).get("checkpoint", ""):
        policy: PolicyArchitecture = vqgan.ARCHITECTURE
        tokenizer = vqgan.VQ
    elif model is None:  # the miniature, or networks that are built on demand: already small
        policy = LlamaGenConfig(
            dim=96,
            num_layers=4,
            num_heads=4,
            grid=4,
            vocab_size=64,
            num_classes=10,
            caption_dim=32 if values.get("conditions", {}).get("captions") else 0,
            caption_tokens=8,
        )
        tokenizer = VQConfig(channels=32, multipliers=(1, 1), codebook_size=64)
    elif isinstance(model.architecture, LlamaGenConfig):
        policy = model.architecture
        named = MODELS[model.tokenizer].architecture
        assert isinstance(named, VQConfig)
        tokenizer = named
    else:
        assert model.published is not None
        policy, tokenizer = model.published
    return _smaller(policy, tokenizer, reduction)


def _smaller(
    policy: PolicyArchitecture, tokenizer: VQConfig, to: Reduction
) -> tuple[PolicyArchitecture, VQConfig]:
    grid = to.grid or policy.grid
    vocab = to.vocab or policy.vocab_size
    if isinstance(policy, TamingConfig):
        vocab = max(vocab, policy.num_classes)  # classes are rows of the token table
    changes: dict[str, Any] = {"grid": grid, "vocab_size": vocab}
    if to.width:
        changes |= {"dim": to.width, "num_heads": max(1, to.width // 16)}
    if to.layers:
        changes |= {"num_layers": to.layers}
    if isinstance(policy, TamingConfig):
        changes |= {"block_size": grid * grid}
    elif policy.caption_dim and to.width:
        changes |= {"caption_dim": 16, "caption_tokens": 8}
    shape: dict[str, Any] = {"codebook_size": vocab}
    if to.channels:
        shape |= {"channels": to.channels, "z_channels": 32, "num_res_blocks": 1}
    if to.pixels_per_token:
        shape |= {"multipliers": (1,) * to.pixels_per_token}
    return dataclasses.replace(policy, **changes), dataclasses.replace(tokenizer, **shape)


def _real_tokens(folder: Path, policy: LlamaGenConfig | TamingConfig) -> Path:
    """Tokens of as many images as there are captions."""
    tokens = np.arange(len(CAPTIONS) * policy.grid**2) % policy.vocab_size
    file = folder / "real.npz"
    np.savez(file, tokens=tokens.reshape(len(CAPTIONS), -1), captions=CAPTIONS)
    return file


def _captions(folder: Path, policy: LlamaGenConfig) -> Path:
    """Captions with random features, of several lengths."""
    generator = np.random.default_rng(0)
    shapes = [(1 + at * 2, policy.caption_dim) for at in range(len(CAPTIONS))]
    features = [generator.normal(size=shape).astype(np.float32) for shape in shapes]
    write_caption_features(folder / "captions.parquet", CAPTIONS, features)
    return folder / "captions.parquet"


def _small_scorers(rewards: Mapping[str, Any], folder: Path, side: int) -> dict[str, Any]:
    """The preset's weights and forms, with the miniature's scorers and a random feature network
    for images of `side` pixels."""
    shipped = RewardsConfig()
    config = ConvNetConfig(image_size=side, channels=(8, 16, 16), num_classes=10)
    network = ConvNet(config)
    file = folder / "features.safetensors"
    write_tensors(file, network.state_dict(), config.to_dict())
    reference = folder / "reference.npz"
    np.savez(reference, mu=np.zeros(config.dim), sigma=np.eye(config.dim))
    found = {name: dict(rewards.get(name, {})) for name in ("clip", "hps", "loo_fid")}
    for name, scorer in (("clip", shipped.clip), ("hps", shipped.hps)):
        found[name] |= {"model": scorer.model, "pretrained": scorer.pretrained}
    found["loo_fid"] |= {"reference": str(reference), "joint": False}
    return {**found, "features": {"network": "convnet", "checkpoint": str(file)}}


def _small_judge(values: Mapping[str, Any], folder: Path, side: int) -> dict[str, Any]:
    """The preset's evaluations, with small networks, and real images of `side` pixels."""
    config = ConvNetConfig(image_size=side, channels=(8, 16), num_classes=1000)
    file, images = folder / "judge.safetensors", folder / "real.npz"
    write_tensors(file, ConvNet(config).state_dict(), config.to_dict())
    pixels = np.random.default_rng(0).integers(0, 256, (40, side, side, 3), np.uint8)
    np.savez(images, arr_0=pixels)
    captions = values.get("conditions", {}).get("captions")
    judge = {
        "features": {"network": "convnet", "checkpoint": str(file)},
        "second": {"network": "pixels"},
        "classifier": {"checkpoint": "" if captions else str(file)},
    }
    evaluation = {**values["evaluation"], "images": str(images), "image_size": 0}
    return {"judge": judge, "evaluation": evaluation}
