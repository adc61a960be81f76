"""How much memory of its GPU a reward server takes: arithmetic alone, for plans.

Weights are counted, activations estimated: a pass holds a few times the widest map of its batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cluster.model_files.tensors import locate
from rewards.config import RewardServerConfig
from rewards.networks.features import MINIATURE, FeaturesConfig
from rewards.networks.open_clip_configs import read_directory
from rewards.networks.open_clip_models import Precision, clip_parameters
from rewards.networks.open_clip_sources import architecture_of, directory_of
from rewards.networks.vision_towers import CLIP, DINOV2
from rewards.networks.weight_files import given
from rewards.preflight import DINOV2_BYTES, INCEPTION_BYTES
from rewards.scorers.text_image import IMAGE_BATCH

WIDTH = {"fp32": 4, "bf16": 2}  # bytes
HELD = 8  # widths of the residual stream that a block holds: queries, keys, values, MLP
DINOV2_MAP = 257 * 1024 * HELD  # numbers an image
INCEPTION_MAP = 3 * 147 * 147 * 64


@dataclass
class ServerMemory:
    """Bytes of a reward server."""

    weights: float = 0.0
    activations: float = 0.0
    """Of the network that takes most: they run one after the other."""
    unknown: list[str] = field(default_factory=list)
    """Parts whose size is not known: users' own scorers, networks of other kinds."""

    @property
    def total(self) -> float:
        return self.weights + self.activations

    def add(self, name: str, weights: float, activations: float) -> None:
        if not weights:
            self.unknown.append(name)
        self.weights += weights
        self.activations = max(self.activations, activations)


def server_memory(config: RewardServerConfig, *, features: bool) -> ServerMemory:
    """Of one server of a pool, with the judge where it has one.

    Args:
        features: whether this pool runs the feature network of the rewards.
    """
    found, rewards = ServerMemory(), config.rewards
    scorers = {name: term for name, term in rewards.scorers().items() if term.pool == config.pool}
    for name, term in (("clip", rewards.clip), ("hps", rewards.hps)):
        if name in scorers:
            batch = term.batch_size or IMAGE_BATCH["cuda"]
            _add_clip(found, f"rewards.{name}", term.model, term.precision, batch)
    for extra in rewards.user_rewards():
        if extra.name in scorers:
            found.unknown.append(f"rewards.extra {extra.name}")
    if features:
        _add_features(found, "rewards.features", rewards.features)
    if config.judge is not None:
        judge = config.judge
        batch = judge.clip.batch_size or IMAGE_BATCH["cuda"]
        _add_clip(found, "judge.clip", judge.clip.model, judge.clip.precision, batch)
        _add_features(found, "judge.features", judge.features)
        _add_features(found, "judge.second", judge.second)
    return found


def _add_clip(found: ServerMemory, name: str, model: str, precision: Precision, batch: int) -> None:
    architecture, width = _described(model), WIDTH[precision]
    vision = architecture.get("vision_cfg", {})
    held = 0.0
    if clip_parameters(architecture):
        tokens = (vision["image_size"] // vision["patch_size"]) ** 2 + 1
        held = batch * tokens * HELD * vision["width"] * width
    found.add(name, width * clip_parameters(architecture), held)


def _described(model: str) -> dict[str, Any]:
    directory = directory_of(model)
    if directory is None:
        return architecture_of(model)
    return read_directory(directory)["model_cfg"]


def _add_features(found: ServerMemory, name: str, config: FeaturesConfig) -> None:
    width = WIDTH[config.precision]
    if config.network == "convnet":
        path = config.checkpoint if given(config.checkpoint) else MINIATURE
        found.add(name, float(locate(path).stat().st_size), 0.0)
    elif config.network in INCEPTION_BYTES:
        held = config.batch * INCEPTION_MAP * WIDTH["fp32"]
        found.add(name, INCEPTION_BYTES[config.network], held)
    elif config.network == "dinov2":
        known = (config.model or DINOV2) == DINOV2
        weights = DINOV2_BYTES * width / WIDTH["fp32"] if known else 0.0
        found.add(name, weights, config.batch * DINOV2_MAP * width if known else 0.0)
    elif config.network == "clip":
        _add_clip(found, name, config.model or CLIP, config.precision, config.batch)
