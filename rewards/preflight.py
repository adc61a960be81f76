"""What reward servers load, before any is started: which files are there, fit, or would be fetched.

Nothing is loaded: headers and names are read, caches looked at. Scorers of pools with a runtime
environment of their own are left out: what is there, nobody here can know.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Collection
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub import constants

from cluster.errors import CheckpointError, ConfigError, nearest
from cluster.io.paths import expand_user
from cluster.model_files.checkpoints import is_own, open_checkpoint
from cluster.model_files.tensors import locate, read_config, read_shapes
from cluster.model_files.torchvision_ops import ensure_torchvision
from cluster.preflight import Download, Findings
from rewards.config import JudgeConfig, RewardsConfig
from rewards.networks.convnet import FAMILY, convnet_config
from rewards.networks.features import MAX_PIXELS, MINIATURE, FeaturesConfig
from rewards.networks.inception import FEATURES, FID_URL
from rewards.networks.open_clip_configs import read_directory
from rewards.networks.open_clip_models import clip_parameters
from rewards.networks.open_clip_sources import (
    HUB,
    TOKENIZERS,
    Source,
    architecture_of,
    check_names,
    directory_of,
    find_source,
    hub_tokenizer_of,
    is_file,
    pretrained_of,
    tags_of,
)
from rewards.networks.vision_towers import CLIP, CLIP_TAG, DINOV2, known_tower, tower_dim
from rewards.networks.weight_files import given
from rewards.scorers.classifier import ClassifierConfig
from rewards.scorers.hpsv2 import ARCHITECTURE, PUBLISHED, REPOSITORY, HpsConfig, tag_of
from rewards.scorers.user_rewards import import_user_reward

HUB_PAGE = "https://huggingface.co"
HUB_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
"""What open_clip looks for in a repository or directory, first ones first."""
HPS_BYTES = 1.97e9  # of a compressed checkpoint: 986 M weights in half precision
INCEPTION_BYTES = {"inception": 95.6e6, "torchvision-inception": 108.9e6}
DINOV2_BYTES = 1.22e9  # 304 M weights
TORCHVISION_URL = "https://download.pytorch.org/models/inception_v3_google-0cc3c7bd.pth"
FP32 = 4


def check_rewards(
    rewards: RewardsConfig, skipped_pools: Collection[str], side: int, findings: Findings
) -> None:
    """Scorers and feature network of the rewards.

    Args:
        skipped_pools: pools with a runtime environment of their own.
        side: pixels a side of the policy's images; 0 where it is not known.
    """
    if rewards.loo_fid.rebuild_every:
        findings.notes.append(
            "rewards.loo_fid.rebuild_every is not used any more and goes in the next release: the "
            "history is decomposed when the next iteration needs it; leave it out"
        )
    if rewards.clip.enabled and rewards.clip.pool not in skipped_pools:
        clip = rewards.clip
        _text_image("rewards.clip", clip.model, clip.pretrained, clip.tag, findings)
    if rewards.hps.enabled and rewards.hps.pool not in skipped_pools:
        _hps(rewards.hps, findings)
    for extra in rewards.user_rewards():
        if extra.term.pool not in skipped_pools:
            with findings.of("rewards.extra"):
                import_user_reward(extra)
    if rewards.features_pool not in skipped_pools:
        check_features("rewards.features", rewards.features, side, findings)


def check_judge(
    judge: JudgeConfig, side: int, classes: Collection[int] | None, findings: Findings
) -> None:
    """The networks of the evaluation.

    Args:
        classes: that are asked for; None where conditions are captions.
    """
    clip = judge.clip
    _text_image("judge.clip", clip.model, clip.pretrained, clip.tag, findings)
    _classifier(judge.classifier, side, classes, findings)
    check_features("judge.features", judge.features, side, findings, judge=True)
    check_features("judge.second", judge.second, side, findings, judge=True)


def check_features(
    field: str, config: FeaturesConfig, side: int, findings: Findings, *, judge: bool = False
) -> None:
    """A feature network's file, and whether it takes images of `side` pixels."""
    file = f"{field}.checkpoint"
    if config.network == "pixels":
        if side * side > MAX_PIXELS:
            _wrong_size(field, f"at most {MAX_PIXELS} pixels", side, findings, judge)
    elif config.network == "convnet":
        path = config.checkpoint if given(config.checkpoint) else MINIATURE
        _convnet(file, path, side, findings, judge)
    elif given(config.checkpoint) and config.network != "clip":
        with findings.of(file):
            check_weights(config.checkpoint)
        if config.network == "dinov2":
            with findings.of(f"{field}.model"):
                known_tower(config.model or DINOV2, config.checkpoint)
    elif config.network in INCEPTION_BYTES:
        _inception(field, config.network, findings)
    elif config.network == "dinov2":
        _dinov2(field, config.model or DINOV2, findings)
    if config.network == "clip":
        tag = config.checkpoint if given(config.checkpoint) else "" if config.model else CLIP_TAG
        _text_image(field, config.model or CLIP, tag, config.tag, findings, "checkpoint")


def feature_dim(config: FeaturesConfig, side: int) -> int:
    """Dimensions of a network's features; 0 where that is not known without loading it.

    Raises:
        CheckpointError: no such file.
    """
    if config.network == "pixels":
        return side * side
    if config.network == "convnet":
        file = config.checkpoint if given(config.checkpoint) else MINIATURE
        # another network's is told of elsewhere
        return convnet_config(file).dim if family_of(file) == FAMILY else 0
    if config.network in INCEPTION_BYTES:
        return FEATURES
    if config.network == "dinov2":
        return tower_dim(config.model or DINOV2, config.checkpoint)
    if (directory := directory_of(config.model or CLIP)) is not None:
        return int(read_directory(directory)["model_cfg"]["embed_dim"])
    return int(architecture_of(config.model or CLIP).get("embed_dim", 0))


def fits_fingerprint(config: FeaturesConfig, made_with: str) -> bool:
    """Whether a reference's fingerprint may be this network's: exactly for small networks, by name
    and precision for those whose digest takes loading them."""
    if config.network == "pixels":
        return made_with == "pixels"
    if config.network == "convnet":
        file = locate(config.checkpoint if given(config.checkpoint) else MINIATURE)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        return made_with == f"convnet-{digest[:16]}"
    half = config.precision != "fp32"
    return made_with.startswith(f"{config.network}-") and made_with.endswith("-bf16") == half


def check_weights(path: str) -> Collection[str]:
    """Whether a file of weights is there and is one; the names of its tensors.

    Raises:
        CheckpointError: it is not.
    """
    if is_own(path):
        raise CheckpointError(
            f"{path}: expected published weights, found a {family_of(path)!r} of this program: "
            "leave it empty for the published ones, or name another file"
        )
    return open_checkpoint(path).tensors.keys()


def family_of(path: str) -> str:
    """What a safetensors file of this program holds; empty for others'.

    Raises:
        CheckpointError: not a whole safetensors file.
    """
    read_shapes(path)
    try:
        return str(read_config(path).get("family", ""))
    except CheckpointError:
        return ""


def _hps(config: HpsConfig, findings: Findings) -> None:
    field = "rewards.hps"
    if config.backend == "package" and importlib.util.find_spec("hpsv2") is None:
        findings.problem(
            f"{field}.backend",
            "the hpsv2 package to be installed",
            "none",
            "pip install 'tessera-rl[hpsv2]', or set the backend to open_clip",
        )
    if config.pretrained not in PUBLISHED:
        published = config.model == ARCHITECTURE and not is_file(config.pretrained)
        if published and config.pretrained not in tags_of(ARCHITECTURE):
            findings.problem(
                f"{field}.pretrained",
                "a published checkpoint of HPS, or a file",
                repr(config.pretrained),
                f"choose one of {', '.join(PUBLISHED)}",
            )
            return
        _text_image(field, config.model, config.pretrained, tag_of(config), findings)
        return
    if config.model != ARCHITECTURE:
        findings.problem(
            f"{field}.model",
            f"{ARCHITECTURE}, which the published checkpoints are of",
            repr(config.model),
            f"set it to {ARCHITECTURE}",
        )
    file = PUBLISHED[config.pretrained]
    if not is_cached(REPOSITORY, file):
        url = f"{HUB_PAGE}/{REPOSITORY}/resolve/main/{file}"
        download = Download(field=field, name=f"HPS {config.pretrained}", url=url, size=HPS_BYTES)
        findings.fetched(download, offline=_offline())


def _text_image(
    field: str,
    model: str,
    pretrained: str,
    tag: str,
    findings: Findings,
    option: str = "pretrained",
) -> None:
    """A model of open_clip: a directory, a repository on the hub, or a name with a tag or file."""
    with findings.of(f"{field}.model"):
        directory = directory_of(model)
        own = directory is not None or model.startswith(HUB)
        if own and pretrained:
            findings.problem(
                f"{field}.{option}",
                f"nothing, since {model} comes with its own weights",
                repr(pretrained),
                "leave it empty",
            )
        elif directory is not None:
            source = find_source(model, "", tag)
            check_names(check_weights(source.file), source.file)
            _tokenizer(field, source, findings)
        elif model.startswith(HUB):
            _on_the_hub(field, model.removeprefix(HUB), findings)
        else:
            _by_name(field, model, pretrained, tag, findings, option)


def _on_the_hub(field: str, repository: str, findings: Findings) -> None:
    if not any(is_cached(repository, name) for name in HUB_WEIGHTS):
        url = f"{HUB_PAGE}/{repository}"
        download = Download(field=field, name=f"{HUB}{repository}", url=url)
        findings.fetched(download, offline=_offline())


def _by_name(
    field: str, model: str, pretrained: str, tag: str, findings: Findings, option: str
) -> None:
    architecture, tags = architecture_of(model), tags_of(model)
    if not architecture:
        raise ConfigError(_unknown(model))
    listed = ", ".join(tags) or "-"
    if not pretrained:
        findings.problem(
            f"{field}.{option}", "a pretrained tag or a file", "nothing", f"choose one of {listed}"
        )
    elif is_file(pretrained):
        with findings.of(f"{field}.{option}"):
            check_names(check_weights(pretrained), pretrained)
            source = find_source(model, pretrained, tag)
            findings.notes.append(
                f"{field}.{option} is a file, which does not tell what its weights were trained "
                f"with: taken are the settings {source.origin}, {source.settings}"
            )
            _tokenizer(field, source, findings)
    elif pretrained not in tags:
        close = nearest(pretrained, tags)
        hint = f"did you mean {close!r}? " if close else ""
        findings.problem(
            f"{field}.{option}",
            f"a pretrained tag of {model}, or a file",
            repr(pretrained),
            f"{hint}there are {listed}",
        )
    else:
        _tokenizer(field, find_source(model, pretrained, tag), findings)
        _tagged(field, model, pretrained, architecture, findings)


def _tokenizer(field: str, source: Source, findings: Findings) -> None:
    """A tokenizer of the hub, which weights in a file do not bring along."""
    named = hub_tokenizer_of(source)
    if named and not any(is_cached(named, name) for name in TOKENIZERS):
        url = f"{HUB_PAGE}/{named}"
        download = Download(field=field, name=f"the tokenizer {named}", url=url)
        findings.fetched(download, offline=_offline())


def _unknown(model: str) -> str:
    if "/" in model:
        return (
            f"expected a directory in open_clip's layout, an open_clip name or {HUB}owner/name, "
            f"found {model!r}, and there is no such directory (looked at {Path(model).absolute()})"
        )
    ensure_torchvision()
    import open_clip

    close = nearest(model, open_clip.list_models())
    hint = f": did you mean {close!r}?" if close else ": open_clip.list_models() has them"
    return f"expected a model that open_clip has, found {model!r}{hint}"


def _tagged(
    field: str, model: str, tag: str, architecture: dict[str, Any], findings: Findings
) -> None:
    config = pretrained_of(model, tag)
    repository, _, file = str(config.get("hf_hub", "")).rpartition("/")
    name, size = f"{model} ({tag})", FP32 * clip_parameters(architecture)
    if repository:
        names = (file,) if file else HUB_WEIGHTS
        if not any(is_cached(repository, candidate) for candidate in names):
            url = f"{HUB_PAGE}/{repository}"
            download = Download(field=field, name=name, url=url, size=size)
            findings.fetched(download, offline=_offline())
    elif (url := str(config.get("url", ""))) and not (
        expand_user("~/.cache/clip") / url.rpartition("/")[2]
    ).is_file():
        findings.downloads.append(Download(field=field, name=name, url=url, size=size))


def _inception(field: str, network: str, findings: Findings) -> None:
    url = FID_URL if network == "inception" else TORCHVISION_URL
    place = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not place.is_file():
        size = INCEPTION_BYTES[network]
        findings.downloads.append(Download(field=field, name=network, url=url, size=size))


def _dinov2(field: str, model: str, findings: Findings) -> None:
    with findings.of(f"{field}.model"):
        repository = str(known_tower(model)[1].hf_hub_id or f"timm/{model}")
        if not any(is_cached(repository, name) for name in ("model.safetensors", *HUB_WEIGHTS)):
            size = DINOV2_BYTES if model == DINOV2 else 0.0
            url = f"{HUB_PAGE}/{repository}/resolve/main/model.safetensors"
            download = Download(field=field, name=model, url=url, size=size)
            findings.fetched(download, offline=_offline())


def _convnet(field: str, path: str, side: int, findings: Findings, judge: bool) -> None:
    with findings.of(field):
        takes = convnet_config(path).image_size
        read_shapes(path)
        if side and takes != side:
            _wrong_size(field, f"{takes} x {takes} pixels, as {path} takes", side, findings, judge)


def _classifier(
    config: ClassifierConfig, side: int, classes: Collection[int] | None, findings: Findings
) -> None:
    field = "judge.classifier.checkpoint"
    if not config.checkpoint:
        return
    _convnet(field, config.checkpoint, side, findings, judge=True)
    known = 0
    with findings.of(field):
        known = convnet_config(config.checkpoint).num_classes
    off = "leave it empty: class accuracy is then not judged"
    if classes is None:
        findings.problem(
            field, "no classifier, since conditions are captions", config.checkpoint, off
        )
    elif known and max(classes) >= known:
        found = f"{max(classes)} among the conditions"
        findings.problem(field, f"classes 0 to {known - 1}, which the judge knows", found, off)


def _wrong_size(field: str, takes: str, side: int, findings: Findings, judge: bool) -> None:
    remedy = (
        "the shipped judge knows 8 x 8 digits alone: set evaluation.num_images to 0, or name "
        "networks for these images (judge.*)"
        if judge
        else "choose a network for these images (rewards.features.network)"
    )
    findings.problem(field, f"images of {takes}", f"{side} x {side} from the policy", remedy)


def is_cached(repository: str, file: str) -> bool:
    """Whether a file of a repository on the hub lies in the cache."""
    return isinstance(huggingface_hub.try_to_load_from_cache(repository, file), str)


def _offline() -> bool:
    return bool(constants.HF_HUB_OFFLINE)
