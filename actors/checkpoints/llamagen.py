"""LlamaGen as a family: named models, official files, memory (facts of FoundationVision/LlamaGen at
ce98ec4; sizes: Sun et al. 2024, 2406.06525, table 1 and the official README).

Our names are the official ones, so loading and exporting copy. Number of heads and grid are not in
official files: named models state them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from actors.checkpoints.families import Family, NamedModel, Shapes
from actors.models.llamagen import LlamaGen, LlamaGenConfig
from actors.models.vq import VQConfig

SIZES = {  # width, layers, heads; official constructors of the same letters, prefixed GPT-
    "b": (768, 12, 12),
    "l": (1024, 24, 16),
    "xl": (1280, 36, 20),
    "xxl": (1536, 48, 24),
    "3b": (3200, 24, 32),
}
CLASS_FILES = {
    ("b", 256): "c2i_B_256.pt",
    ("b", 384): "c2i_B_384.pt",
    ("l", 256): "c2i_L_256.pt",
    ("l", 384): "c2i_L_384.pt",
    ("xl", 384): "c2i_XL_384.pt",
    ("xxl", 384): "c2i_XXL_384.pt",
    ("3b", 384): "c2i_3B_384.pt",
}
CLASS_REPO = "FoundationVision/LlamaGen"
CAPTION_REPO = "peizesun/llamagen_t2i"
PIXELS_PER_TOKEN = 16


def _architecture(size: str, pixels: int, caption_dim: int = 0) -> LlamaGenConfig:
    dim, layers, heads = SIZES[size]
    return LlamaGenConfig(
        dim=dim,
        num_layers=layers,
        num_heads=heads,
        grid=pixels // PIXELS_PER_TOKEN,
        caption_dim=caption_dim,
    )


def _class_policy(size: str, pixels: int) -> NamedModel:
    file = CLASS_FILES.get((size, pixels), "")
    return NamedModel(
        name=f"llamagen-{size}-{pixels}",
        kind="policy",
        architecture=_architecture(size, pixels),
        repo=CLASS_REPO if file else "",
        file=file,
        tokenizer="llamagen-vq-16",
    )


def _caption_policy(name: str, pixels: int, file: str) -> NamedModel:
    return NamedModel(
        name=name,
        kind="policy",
        architecture=_architecture("xl", pixels, caption_dim=2048),  # flan-t5-xl
        repo=CAPTION_REPO,
        file=file,
        tokenizer="llamagen-vq-16-t2i",
    )


def _tokenizer(name: str, config: VQConfig, repo: str, file: str) -> NamedModel:
    return NamedModel(name=name, kind="tokenizer", architecture=config, repo=repo, file=file)


def _contradiction(config: LlamaGenConfig, buffers: Shapes, options: Mapping[str, Any]) -> str:
    """Heads and grid are not in the weights, but often in buffers and options beside them."""
    positions = config.num_tokens + (config.caption_tokens if config.caption_dim else 1)
    for name, shape in buffers.items():
        expected: tuple[int, ...] = shape
        if name == "freqs_cis":
            expected = (positions, config.head_dim // 2, 2)
        elif name.endswith(("k_cache", "v_cache")) and len(shape) == 4:
            expected = (shape[0], config.num_heads, shape[2], config.head_dim)
        pairs = name == "freqs_cis"  # (..., 2), or complex numbers in derived code
        if shape != expected and not (pairs and shape == expected[:-1]):
            return (
                f"{name!r} has shape {shape}, but the architecture leads to {expected}: it is of "
                "another number of heads, or another grid"
            )
    pixels, stride = (options.get(key) for key in ("image_size", "downsample_size"))
    if isinstance(pixels, int) and isinstance(stride, int) and pixels != config.grid * stride:
        return (
            f"the file was trained on {pixels} pixels with {stride} per token, a grid of "
            f"{pixels // stride}, but the architecture has a grid of {config.grid}"
        )
    return ""


def _layer_activations(config: LlamaGenConfig, precision: str) -> int:
    if precision == "bf16":
        return 34 * config.dim + 8 * config.hidden_dim
    return 48 * config.dim + 16 * config.hidden_dim


def _copy(tensors: Mapping[str, Tensor], *_: object) -> dict[str, Tensor]:
    return dict(tensors)


LLAMAGEN = Family(
    architecture=LlamaGenConfig,
    module=LlamaGen,
    from_official=_copy,
    to_official=_copy,
    layouts={"official": lambda tensors: {"model": tensors}, "fsdp": dict},
    check=_contradiction,
    # `generate` registers the KV cache as a submodule; rotary table and mask are plain attributes
    # in the official code, and buffers in derived code
    buffers=("freqs_cis", "causal_mask", "*.kv_cache.*"),
    layer_activations=_layer_activations,
    norm_activations=14,
    models=(
        *(_class_policy(size, pixels) for size in SIZES for pixels in (256, 384)),
        _caption_policy("llamagen-t2i-xl-stage1-256", 256, "t2i_XL_stage1_256.pt"),
        _caption_policy("llamagen-t2i-xl-stage2-512", 512, "t2i_XL_stage2_512.pt"),
        _tokenizer("llamagen-vq-16", VQConfig(), CLASS_REPO, "vq_ds16_c2i.pt"),
        _tokenizer(
            "llamagen-vq-8", VQConfig(multipliers=(1, 2, 2, 4)), CLASS_REPO, "vq_ds8_c2i.pt"
        ),
        _tokenizer("llamagen-vq-16-t2i", VQConfig(), CAPTION_REPO, "vq_ds16_t2i.pt"),
    ),
)
