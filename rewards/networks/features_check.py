"""Checks of a feature network before a run: files, downloads, image size, dimensions, memory.

Only headers and names are read.
"""

from __future__ import annotations

from cluster.model_files.tensors import locate
from cluster.preflight import Download, Findings
from rewards.base import ImageWork
from rewards.networks.convnet import (
    FAMILY,
    check_convnet,
    convnet_config,
    convnet_fingerprint,
    wrong_size,
)
from rewards.networks.features import MAX_PIXELS, FeaturesConfig, convnet_file
from rewards.networks.inception import FEATURES, FID_URL
from rewards.networks.open_clip_check import (
    FP32,
    HELD,
    HUB_WEIGHTS,
    WIDTH,
    check_model,
    clip_memory,
    clip_work,
    transformer_flops,
)
from rewards.networks.open_clip_configs import read_directory
from rewards.networks.open_clip_sources import architecture_of, directory_of
from rewards.networks.vision_towers import CLIP, CLIP_TAG, DINOV2, known_tower, tower_dim
from rewards.networks.weight_files import (
    cached_place,
    check_hub,
    check_weights,
    family_of,
    is_user_file,
)

TORCHVISION_URL = "https://download.pytorch.org/models/inception_v3_google-0cc3c7bd.pth"
INCEPTIONS = {
    "inception": (FID_URL, 95.6e6),
    "torchvision-inception": (TORCHVISION_URL, 108.9e6),
}
"""Network -> published file and its bytes."""
INCEPTION_MAP = 3 * 147 * 147 * 64  # numbers an image
INCEPTION_FLOPS = 11.4e9  # an image of 299 pixels; torchvision's page has 5.7 products and sums
DINOV2_BYTES = 1.22e9  # 304 M weights
DINOV2_MAP = 257 * 1024 * HELD  # numbers an image


def check_features(
    field: str, config: FeaturesConfig, side: int, findings: Findings, *, judge: bool = False
) -> None:
    """Check a feature network's file, and that it takes images of `side` pixels (0: unknown)."""
    file, own = f"{field}.checkpoint", is_user_file(config.checkpoint)
    if config.network == "pixels":
        if side * side > MAX_PIXELS:
            wrong_size(field, f"at most {MAX_PIXELS} pixels", side, findings, judge)
    elif config.network == "convnet":
        check_convnet(file, convnet_file(config), side, findings, judge)
    elif config.network == "clip":
        tag = config.checkpoint if own else "" if config.model else CLIP_TAG
        check_model(field, config.model or CLIP, tag, config.tag, findings, "checkpoint")
    elif own:
        with findings.of(file):
            check_weights(config.checkpoint)
        if config.network == "dinov2":
            with findings.of(f"{field}.model"):
                known_tower(config.model or DINOV2, config.checkpoint)
    elif config.network in INCEPTIONS:
        url, size = INCEPTIONS[config.network]
        if not cached_place(url).is_file():
            download = Download(field=field, name=config.network, url=url, size=size)
            findings.downloads.append(download)
    else:
        _check_dinov2(field, config.model or DINOV2, findings)


def _check_dinov2(field: str, model: str, findings: Findings) -> None:
    with findings.of(f"{field}.model"):
        repository = str(known_tower(model)[1].hf_hub_id or f"timm/{model}")
        names = ("model.safetensors", *HUB_WEIGHTS)
        size = DINOV2_BYTES if model == DINOV2 else 0.0
        path = "/resolve/main/model.safetensors"
        check_hub(findings, field, model, repository, names, size, path)


def feature_dim(config: FeaturesConfig, side: int) -> int:
    """D of a network's features; 0 if it is unknown without loading the network.

    Raises:
        CheckpointError: no such file.
    """
    if config.network == "pixels":
        return side * side
    if config.network == "convnet":
        file = convnet_file(config)
        # `check_features` reports files of other networks
        return convnet_config(file).dim if family_of(file) == FAMILY else 0
    if config.network in INCEPTIONS:
        return FEATURES
    if config.network == "dinov2":
        return tower_dim(config.model or DINOV2, config.checkpoint)
    if (directory := directory_of(config.model or CLIP)) is not None:
        return int(read_directory(directory)["model_cfg"]["embed_dim"])
    return int(architecture_of(config.model or CLIP).get("embed_dim", 0))


def fits_fingerprint(config: FeaturesConfig, made_with: str) -> bool:
    """Whether a reference's fingerprint can be this network's: compared exactly for small networks,
    by name and precision for large ones, whose digest needs their weights."""
    if config.network == "pixels":
        return made_with == "pixels"
    if config.network == "convnet":
        return made_with == convnet_fingerprint(convnet_file(config))
    half = config.precision != "fp32"
    return made_with.startswith(f"{config.network}-") and made_with.endswith("-bf16") == half


def features_memory(config: FeaturesConfig) -> tuple[float, float]:
    """Bytes of weights and activations on a GPU; 0 weights: unknown."""
    width = WIDTH[config.precision]
    if config.network == "convnet":
        return float(locate(convnet_file(config)).stat().st_size), 0.0
    if config.network in INCEPTIONS:
        return INCEPTIONS[config.network][1], float(config.batch * INCEPTION_MAP * FP32)
    if config.network == "dinov2" and (config.model or DINOV2) == DINOV2:
        return DINOV2_BYTES * width / FP32, float(config.batch * DINOV2_MAP * width)
    if config.network == "clip":
        return clip_memory(config.model or CLIP, config.precision, config.batch)
    return 0.0, 0.0


def features_work(config: FeaturesConfig) -> ImageWork | None:
    """What a feature network computes for an image; None: unknown."""
    if config.network in ("pixels", "convnet"):
        return ImageWork(flops=0.0)  # next to nothing
    if config.network in INCEPTIONS:
        return ImageWork(flops=INCEPTION_FLOPS, convolutions=True)
    if config.network == "dinov2" and (config.model or DINOV2) == DINOV2:
        return ImageWork(flops=transformer_flops(24, 1024, 257), bf16=config.precision != "fp32")
    if config.network == "clip":
        return clip_work(config.model or CLIP, config.precision)
    return None
