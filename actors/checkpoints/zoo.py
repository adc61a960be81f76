"""The models that have a name: architecture, official file, and the tokenizer that belongs to each.

Head counts and grids are not in LlamaGen's checkpoint files, so they stand here (sizes: Sun et al.
2024, 2406.06525, table 1 and the official README). taming's models (Esser et al. 2021, 2012.09841)
carry a `*-project.yaml` beside the checkpoint, which says all of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from actors.models.llamagen import LlamaGenConfig
from actors.models.taming import TamingConfig
from actors.models.vq import VQConfig
from cluster.errors import ConfigError, did_you_mean
from cluster.model_files.tensors import weights_directory

HUB = "https://huggingface.co"
TAMING_PAGE = "https://github.com/CompVis/taming-transformers"

Kind = Literal["policy", "tokenizer"]


@dataclass(frozen=True, kw_only=True)
class NamedModel:
    """One row of the table."""

    name: str
    kind: Kind
    architecture: LlamaGenConfig | VQConfig | None = None
    """None: the project file beside the checkpoint says (taming)."""
    repo: str = ""
    """Repository on the Hugging Face hub; empty where no file is published there."""
    file: str = ""
    """File name in the repository, and in the weights directory."""
    project: str = ""
    """taming: name of the project file in the weights directory."""
    origin: str = ""
    """taming: the entry of the official README's table of models that links to the files."""
    tokenizer: str = ""
    """Name of the tokenizer whose codes the policy speaks; its own name if the file has both."""

    published: tuple[TamingConfig, VQConfig] | None = None
    """taming: policy and tokenizer as published, for plans. Loading takes the project file's."""

    @property
    def url(self) -> str:
        """Where the official file is; of taming's, the page that links to it."""
        if self.project:
            return f"{TAMING_PAGE} (table of models, {self.origin!r})"
        return f"{HUB}/{self.repo}/resolve/main/{self.file}"

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files in the weights directory."""
        return tuple(name for name in (self.file, self.project) if name)

    def path(self, directory: Path | None = None) -> Path:
        """Where `fetch` puts the checkpoint."""
        return (directory or weights_directory()) / self.file

    def project_path(self, directory: Path | None = None) -> Path:
        """Where the project file belongs."""
        return (directory or weights_directory()) / self.project


# Width, layers, heads. Official constructors of the same letters, prefixed GPT-.
_SIZES = {
    "b": (768, 12, 12),
    "l": (1024, 24, 16),
    "xl": (1280, 36, 20),
    "xxl": (1536, 48, 24),
    "3b": (3200, 24, 32),
}
_CLASS_FILES = {
    ("b", 256): "c2i_B_256.pt",
    ("b", 384): "c2i_B_384.pt",
    ("l", 256): "c2i_L_256.pt",
    ("l", 384): "c2i_L_384.pt",
    ("xl", 384): "c2i_XL_384.pt",
    ("xxl", 384): "c2i_XXL_384.pt",
    ("3b", 384): "c2i_3B_384.pt",
}
_CLASS_REPO = "FoundationVision/LlamaGen"
_CAPTION_REPO = "peizesun/llamagen_t2i"
_PIXELS_PER_TOKEN = 16


def _llamagen(size: str, pixels: int, *, caption_dim: int = 0) -> LlamaGenConfig:
    dim, layers, heads = _SIZES[size]
    return LlamaGenConfig(
        dim=dim,
        num_layers=layers,
        num_heads=heads,
        grid=pixels // _PIXELS_PER_TOKEN,
        caption_dim=caption_dim,
    )


def _class_policy(size: str, pixels: int) -> NamedModel:
    file = _CLASS_FILES.get((size, pixels), "")
    return NamedModel(
        name=f"llamagen-{size}-{pixels}",
        kind="policy",
        architecture=_llamagen(size, pixels),
        repo=_CLASS_REPO if file else "",
        file=file,
        tokenizer="llamagen-vq-16",
    )


def _caption_policy(name: str, pixels: int, file: str) -> NamedModel:
    return NamedModel(
        name=name,
        kind="policy",
        architecture=_llamagen("xl", pixels, caption_dim=2048),  # flan-t5-xl
        repo=_CAPTION_REPO,
        file=file,
        tokenizer="llamagen-vq-16-t2i",
    )


def _tokenizer(name: str, config: VQConfig, repo: str, file: str) -> NamedModel:
    return NamedModel(name=name, kind="tokenizer", architecture=config, repo=repo, file=file)


def _taming(
    name: str,
    kind: Kind,
    origin: str,
    published: tuple[TamingConfig, VQConfig] | None = None,
) -> NamedModel:
    return NamedModel(
        name=name,
        kind=kind,
        file=f"{name}.ckpt",
        project=f"{name}-project.yaml",
        origin=origin,
        tokenizer=name if kind == "policy" else "",  # Net2Net files hold their VQGAN
        published=published,
    )


_CIN = TamingConfig(
    dim=1536,
    num_layers=48,
    num_heads=24,
    vocab_size=16384,
    block_size=256,
    grid=16,
    num_classes=1000,
)
_CIN_VQ = VQConfig(codebook_dim=256, normalise=False, pixel_rule="taming")
_VQ_8 = VQConfig(multipliers=(1, 2, 2, 4))

_TABLE = (
    *(_class_policy(size, pixels) for size in _SIZES for pixels in (256, 384)),
    _caption_policy("llamagen-t2i-xl-stage1-256", 256, "t2i_XL_stage1_256.pt"),
    _caption_policy("llamagen-t2i-xl-stage2-512", 512, "t2i_XL_stage2_512.pt"),
    _taming("cin_transformer", "policy", "ImageNet (cIN)", (_CIN, _CIN_VQ)),
    _taming("ffhq_transformer", "policy", "FFHQ"),
    _taming("celebahq_transformer", "policy", "CelebA-HQ"),
    _taming("faceshq_transformer", "policy", "FacesHQ"),
    _tokenizer("llamagen-vq-16", VQConfig(), _CLASS_REPO, "vq_ds16_c2i.pt"),
    _tokenizer("llamagen-vq-8", _VQ_8, _CLASS_REPO, "vq_ds8_c2i.pt"),
    _tokenizer("llamagen-vq-16-t2i", VQConfig(), _CAPTION_REPO, "vq_ds16_t2i.pt"),
    _taming("vqgan-imagenet-f16-1024", "tokenizer", "VQGAN ImageNet (f=16), 1024"),
    _taming("vqgan-imagenet-f16-16384", "tokenizer", "VQGAN ImageNet (f=16), 16384"),
)

MODELS: dict[str, NamedModel] = {model.name: model for model in _TABLE}


def find_model(name: str) -> NamedModel:
    """The row of a name.

    Raises:
        ConfigError: there is none; names the nearest.
    """
    if name not in MODELS:
        # what can be fetched first; file names, too, since these are what the hub shows
        order = sorted(MODELS.values(), key=lambda model: not model.file)
        by_file = {model.file: model.name for model in order if model.file}
        hint = did_you_mean(by_file.get(name, name), [model.name for model in order])
        raise ConfigError(f"no model is named {name!r}: {hint}there are {', '.join(MODELS)}")
    return MODELS[name]


def candidates(tensors: Mapping[str, Tensor], kind: Kind) -> list[str]:
    """Names whose width, depth and vocabulary are those of a LlamaGen state dict."""
    found = _policy_sizes(tensors) if kind == "policy" else _tokenizer_sizes(tensors)
    return [
        model.name
        for model in MODELS.values()
        if model.kind == kind and model.architecture and _sizes(model.architecture) == found
    ]


def _sizes(architecture: LlamaGenConfig | VQConfig) -> tuple[object, ...]:
    if isinstance(architecture, VQConfig):
        codebook = (architecture.codebook_size, architecture.codebook_dim)
        return (*codebook, len(architecture.multipliers))
    table = (architecture.vocab_size, architecture.dim)
    return (*table, architecture.num_layers, bool(architecture.caption_dim))


def _policy_sizes(tensors: Mapping[str, Tensor]) -> tuple[object, ...]:
    table = tensors.get("tok_embeddings.weight")
    captions = "cls_embedding.cap_proj.fc1.weight" in tensors
    return (*(() if table is None else table.shape), _count(tensors, r"layers\.(\d+)\."), captions)


def _tokenizer_sizes(tensors: Mapping[str, Tensor]) -> tuple[object, ...]:
    table = tensors.get("quantize.embedding.weight")
    levels = _count(tensors, r"decoder\.conv_blocks\.(\d+)\.")
    return (*(() if table is None else table.shape), levels)


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    """How many numbered parts there are."""
    return len({found[1] for name in tensors if (found := re.match(pattern, name))})
