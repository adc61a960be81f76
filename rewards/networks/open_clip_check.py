"""Checks of an open_clip model before a run: files, names, caches, downloads, texts, memory.

Only headers, names and tokenizers are loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cluster.errors import CheckpointError, ConfigError, nearest
from cluster.io.paths import expand_user
from cluster.model_files.torchvision_ops import ensure_torchvision
from cluster.preflight import Download, Findings
from rewards.base import ImageWork
from rewards.networks.open_clip_configs import read_directory
from rewards.networks.open_clip_models import (
    NoTokenizerError,
    Precision,
    clip_parameters,
    tokenizer_of,
)
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
from rewards.networks.weight_files import check_hub, check_weights, is_cached

HUB_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
"""Weights that open_clip looks for in a repository, in this order."""
FP32 = 4  # bytes
WIDTH = {"fp32": FP32, "bf16": 2}  # bytes
HELD = 8  # widths of the residual stream that a block holds: queries, keys, values, MLP


def check_model(
    field: str,
    model: str,
    pretrained: str,
    tag: str,
    findings: Findings,
    option: str = "pretrained",
) -> None:
    """Check an open_clip model: a directory, a hub repository, or a name with a tag or file.

    Args:
        option: the one below `field` that holds `pretrained`.
    """
    with findings.of(f"{field}.model"):
        directory = directory_of(model)
        if pretrained and (directory is not None or model.startswith(HUB)):
            findings.problem(
                f"{field}.{option}",
                f"nothing, since {model} comes with its own weights",
                repr(pretrained),
                "leave it empty",
            )
        elif directory is not None:
            source = find_source(model, "", tag)
            check_names(check_weights(source.file), source.file)
            _check_tokenizer(field, source, findings)
        elif model.startswith(HUB):
            check_hub(findings, field, model, model.removeprefix(HUB), HUB_WEIGHTS)
        else:
            _check_named(field, model, pretrained, tag, findings, option)


def _check_named(
    field: str, model: str, pretrained: str, tag: str, findings: Findings, option: str
) -> None:
    tags = tags_of(model)
    if not architecture_of(model):
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
                f"{field}.{option} is a file, which does not say what its weights were trained "
                f"with: taken are the settings {source.origin}, {source.settings}"
            )
            _check_tokenizer(field, source, findings)
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
        _check_tokenizer(field, find_source(model, pretrained, tag), findings)
        _check_download(field, model, pretrained, findings)


def _check_tokenizer(field: str, source: Source, findings: Findings) -> None:
    """A hub tokenizer, which files of weights do not contain."""
    if named := hub_tokenizer_of(source):
        check_hub(findings, field, f"the tokenizer {named}", named, TOKENIZERS)


def _check_download(field: str, model: str, tag: str, findings: Findings) -> None:
    config = pretrained_of(model, tag)
    repository, _, file = str(config.get("hf_hub", "")).rpartition("/")
    name, size = f"{model} ({tag})", FP32 * clip_parameters(architecture_of(model))
    if repository:
        check_hub(findings, field, name, repository, (file,) if file else HUB_WEIGHTS, size)
    elif (url := str(config.get("url", ""))) and not (
        expand_user("~/.cache/clip") / url.rpartition("/")[2]
    ).is_file():
        findings.downloads.append(Download(field=field, name=name, url=url, size=size))


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


def local_tokenizer(model: str) -> Any:
    """The tokenizer of an open_clip model; None if it is not on this machine or cannot be loaded
    (then the model cannot be loaded either, which is checked elsewhere)."""
    try:
        if directory_of(model) is not None:
            source = find_source(model, "")
        elif model.startswith(HUB) or not architecture_of(model):
            return None
        else:
            source = Source(name=model)
        fetched = hub_tokenizer_of(source)
        if fetched and not any(is_cached(fetched, file) for file in TOKENIZERS[:2]):
            return None
        return tokenizer_of(source)
    except (NoTokenizerError, CheckpointError, OSError):
        return None


def clip_memory(model: str, precision: Precision, batch: int) -> tuple[float, float]:
    """Bytes of weights and activations of `batch` images; zeros for unknown architectures."""
    architecture, width = _sizes(model), WIDTH[precision]
    weights = clip_parameters(architecture)
    if not weights:
        return 0.0, 0.0
    vision = architecture["vision_cfg"]
    return width * weights, float(batch * _tokens(vision) * HELD * vision["width"] * width)


def clip_work(model: str, precision: Precision) -> ImageWork | None:
    """What the image tower computes; None for unknown architectures. (Texts are few, and their
    features are kept.)"""
    architecture = _sizes(model)
    if not clip_parameters(architecture):
        return None
    vision = architecture["vision_cfg"]
    tokens, width, ratio = _tokens(vision), vision["width"], vision.get("mlp_ratio", 4.0)
    return ImageWork(
        flops=transformer_flops(vision["layers"], width, tokens, ratio), bf16=precision != "fp32"
    )


def transformer_flops(layers: int, width: int, tokens: int, ratio: float = 4.0) -> float:
    """Operations of a vision transformer's blocks: products with weights, and attention."""
    return 2.0 * layers * tokens * width * ((4 + 2 * ratio) * width + 2 * tokens)


def _sizes(model: str) -> dict[str, Any]:
    directory = directory_of(model)
    if directory is None:
        return architecture_of(model)
    sizes: dict[str, Any] = read_directory(directory)["model_cfg"]
    return sizes


def _tokens(vision: dict[str, Any]) -> int:
    return int((vision["image_size"] // vision["patch_size"]) ** 2 + 1)
