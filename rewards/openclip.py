"""Text-image models of open_clip: loading with every check, unit features of images and texts."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.checkpoint_files import read_checkpoint
from cluster.errors import CheckpointError
from cluster.paths import expanded
from cluster.tensors import PACKAGE, load_strict, locate
from cluster.torchvision_ops import ensure_torchvision
from cluster.weight_checks import check_finite
from rewards.packed import pack_blocks

Precision = Literal["fp32", "bf16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LOCAL_DIR = "local-dir:"
HUB = "hf-hub:"
DIRECTORY_CONFIG = "open_clip_config.json"


class TextImageModel:
    """A CLIP-like model in eval mode.

    Args:
        model: an open_clip name ("ViT-L-14-quickgelu"), "hf-hub:owner/name", or a directory in
            open_clip's layout (`open_clip_config.json` and weights), as a path or `package://`.
        pretrained: for a name: open_clip's pretrained tag, or a checkpoint file (.pt,
            .safetensors). Empty for the others, which come with their weights.
        precision: bf16 is open_clip's: linear maps and convolutions in bf16, normalisations and
            what this class returns in fp32.
        pack: on a CPU, lay the transformer's weights out for speed; the model is then for
            inference alone, and its weights cannot be read any more.

    Raises:
        CheckpointError: unknown name, missing file, weights that do not fit, or weights that were
            trained with another activation than the model has.
    """

    def __init__(
        self,
        model: str,
        pretrained: str,
        device: str,
        precision: Precision = "fp32",
        *,
        pack: bool = True,
    ) -> None:
        ensure_torchvision()
        import open_clip

        self.device = torch.device(device)
        self.dtype = DTYPES[precision]
        options = {"precision": precision, "device": device}
        try:
            name, kwargs, file = _source(model, pretrained)
            tag = None if file else pretrained or None
            with _loading_from(file):
                self.model = open_clip.create_model(name, pretrained=tag, **options)
            if file is not None:
                _load_file(self.model, file, pretrained)
        except (RuntimeError, ValueError, OSError) as error:
            raise CheckpointError(f"open_clip model {model!r} cannot be loaded: {error}") from error
        self.model.eval().requires_grad_(False)
        if file is None:  # a file's were looked at one by one
            check_finite(self.model.state_dict(), f"{model} {pretrained}".strip())
        if pack and self.device.type == "cpu":
            pack_blocks(self.model, open_clip.transformer.ResidualAttentionBlock)
        self.tokenizer = open_clip.get_tokenizer(name, **kwargs)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width that the image tower takes, pixels."""
        size = self.model.visual.image_size
        return (size, size) if isinstance(size, int) else tuple(size)

    @property
    def preprocess_config(self) -> dict[str, Any]:
        """open_clip's description of the model's transform."""
        return self.model.visual.preprocess_cfg

    def transform(self) -> Callable[[Any], Tensor]:
        """The model's own evaluation transform: PIL image -> (3, h, w) fp32, on the host."""
        ensure_torchvision()
        import open_clip

        config = open_clip.transform.PreprocessCfg(**self.preprocess_config)
        return open_clip.transform.image_transform_v2(config, is_train=False)

    @torch.inference_mode()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """(N, 3, h, w) normalised pixels on the device -> (N, E) fp32 unit rows."""
        return F.normalize(self.model.encode_image(pixels.to(self.dtype)).float(), dim=-1)

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """N texts -> (N, E) fp32 unit rows; texts longer than the model's context are cut."""
        tokens = self.tokenizer(list(texts)).to(self.device)
        return F.normalize(self.model.encode_text(tokens).float(), dim=-1)

    def token_counts(self, text: str) -> tuple[int, int]:
        """Tokens of a text with those that mark start and end, and how many the model reads."""
        tokenizer = self.tokenizer
        if hasattr(tokenizer, "encode"):  # open_clip's own
            return len(tokenizer.encode(text)) + 2, tokenizer.context_length
        ensure_torchvision()
        from open_clip import tokenizer as cleaning

        if hasattr(tokenizer, "clean_fn"):
            text = tokenizer.clean_fn(text)
        else:  # SigLIP's
            text = cleaning.canonicalize_text(cleaning.basic_clean(text))
        if getattr(tokenizer, "tokenizer_mode", "") == "clips":
            tokens = tokenizer.tokenizer(text, add_special_tokens=False).input_ids
            return len(tokens) + 3, tokenizer.context_length
        return len(tokenizer.tokenizer(text).input_ids), tokenizer.context_length


def is_own_source(model: str) -> bool:
    """Whether a model's name stands for weights, too: a directory, or a model on the hub."""
    return model.startswith(HUB) or directory_of(model) is not None


def _source(model: str, pretrained: str) -> tuple[str, dict[str, str], Path | None]:
    """open_clip's name, options of its tokenizer, and the checkpoint file if it is one."""
    ensure_torchvision()
    import open_clip

    if is_own_source(model):
        if pretrained:
            raise CheckpointError(
                f"{model} comes with its own weights, so pretrained must be empty, found "
                f"{pretrained!r}; for other weights set model to an open_clip name"
            )
        directory = directory_of(model)
        if directory is None:
            return model, {}, None
        return f"{LOCAL_DIR}{directory}", _tokenizer_options(directory), None
    tags = open_clip.list_pretrained_tags_by_model(model)
    if not pretrained:
        raise CheckpointError(
            f"open_clip model {model!r} needs weights: set pretrained to one of its tags "
            f"({', '.join(tags) or '-'}) or to a checkpoint file"
        )
    if is_file(pretrained):
        return model, {}, locate(pretrained)
    check_activation(model, pretrained)
    return model, {}, None


def check_activation(model: str, tag: str) -> None:
    """open_clip only warns where weights were trained with QuickGELU and the model has GELU.

    Raises:
        CheckpointError: names the model that has the right activation.
    """
    trained = pretrained_of(model, tag).get("quick_gelu", False)
    if trained and not architecture_of(model).get("quick_gelu", False):
        raise CheckpointError(
            f"open_clip's {tag!r} weights of {model} were trained with another activation "
            f"(QuickGELU), and would score wrongly: set model to {model}-quickgelu"
        )


def architecture_of(model: str) -> dict[str, Any]:
    """open_clip's description of a model of that name; empty if it has none."""
    ensure_torchvision()
    import open_clip

    return open_clip.get_model_config(model) or {}


def tags_of(model: str) -> list[str]:
    """open_clip's pretrained tags of a model."""
    ensure_torchvision()
    import open_clip

    return open_clip.list_pretrained_tags_by_model(model)


def pretrained_of(model: str, tag: str) -> dict[str, Any]:
    """Where open_clip has the weights of a tag from, and how they were trained."""
    ensure_torchvision()
    import open_clip

    return open_clip.get_pretrained_cfg(model, tag)


@contextlib.contextmanager
def _loading_from(file: Path | None) -> Iterator[None]:
    """Without open_clip's warning of random weights, where a file replaces them at once."""

    def keep(record: logging.LogRecord) -> bool:
        return file is None or not record.getMessage().startswith("No pretrained weights loaded")

    logger = logging.getLogger()
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def _load_file(model: torch.nn.Module, file: Path, name: str) -> None:
    ensure_torchvision()
    import open_clip.factory as factory

    state = factory.convert_state_dict(model, read_checkpoint(str(file)))
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = factory.convert_to_custom_text_state_dict(state)
    load_strict(model, state, name)


def directory_of(model: str) -> Path | None:
    """The directory that a model's name stands for, if it does.

    Raises:
        CheckpointError: it should be in a package, and is not.
    """
    if model.startswith(PACKAGE):
        return locate(model, directory=True)
    path = expanded(model)
    return path if path.is_dir() else None


def is_file(pretrained: str) -> bool:
    """Whether weights are named by a file rather than by a tag."""
    return pretrained.startswith(PACKAGE) or "/" in pretrained or Path(pretrained).is_file()


def _tokenizer_options(directory: Path) -> dict[str, str]:
    """A vocabulary named in the directory's config is looked for beside that config."""
    text = (directory / DIRECTORY_CONFIG).read_text(encoding="utf-8")
    options = json.loads(text)["model_cfg"]["text_cfg"].get("tokenizer_kwargs", {})
    if "bpe_path" not in options:
        return {}
    return {"bpe_path": str(directory / options["bpe_path"])}


def clip_parameters(architecture: dict[str, Any]) -> int:
    """About how many weights an open_clip model of two plain transformers has; 0 for others."""
    vision, text = architecture.get("vision_cfg", {}), architecture.get("text_cfg", {})
    try:
        width, patch, layers = vision["width"], vision["patch_size"], vision["layers"]
        ratio, places = vision.get("mlp_ratio", 4.0), (vision["image_size"] // patch) ** 2
        seen = layers * (4 + 2 * ratio) * width**2 + (3 * patch**2 + places) * width
        inner, deep = text["width"], 4 + 2 * text.get("mlp_ratio", 4.0)
        rows = text["vocab_size"] + text.get("context_length", 77)
        read = text["layers"] * deep * inner**2 + rows * inner
        return round(seen + read + architecture["embed_dim"] * (width + inner))
    except (KeyError, TypeError):
        return 0
