"""Text-image models of open_clip: loading with every check, unit features of images and texts."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.errors import CheckpointError
from cluster.model_files.checkpoints import read_checkpoint
from cluster.model_files.tensors import load_strict
from cluster.model_files.torchvision_ops import ensure_torchvision
from cluster.model_files.weight_checks import check_finite
from cluster.text_limits import Reading, reading_of_ids
from rewards.networks.open_clip_configs import DIRECTORY_CONFIG
from rewards.networks.open_clip_sources import (
    LOCAL_DIR,
    TOKENIZERS,
    Source,
    architecture_of,
    check_names,
    find_source,
    has_tokenizer,
)
from rewards.networks.packed import pack_blocks
from rewards.networks.weight_files import brief

Precision = Literal["fp32", "bf16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
UNUSED = (
    "input_resolution",  # sizes, stored as tensors in OpenAI's files
    "context_length",
    "vocab_size",
    "text.transformer.embeddings.position_ids",  # of transformers before 4.31
)
"""Tensors of files that open_clip ignores, too."""
CLIPS_MARKS = 3  # start, end and class
ROOM = 1 << 22  # numbers that a model may have beyond four times its file's

logger = logging.getLogger(__name__)


class NoTokenizerError(Exception):
    """A tokenizer cannot be loaded."""


class TextImageModel:
    """A CLIP-like model in eval mode.

    Args:
        model: an open_clip name ("ViT-L-14-quickgelu"), "hf-hub:owner/name", or a directory in
            open_clip's layout (`open_clip_config.json` and weights), as a path or `package://`.
        pretrained: for a name: open_clip's pretrained tag, or a checkpoint file (.pt,
            .safetensors). Empty for the others, which have their own weights.
        tag: for a checkpoint file, the pretrained tag with its preprocessing and activation;
            needed if those of the model's tags differ (`open_clip_sources`).
        precision: bf16 is open_clip's: linear maps and convolutions in bf16, normalisations and
            results in fp32.
        pack: on a CPU, pack the transformer's weights for speed (`packed`); they cannot be read
            afterwards.

    Raises:
        CheckpointError: unknown name, missing file, weights that do not fit, or that were trained
            with another activation.
    """

    def __init__(
        self,
        model: str,
        pretrained: str,
        device: str,
        precision: Precision = "fp32",
        *,
        tag: str = "",
        pack: bool = True,
    ) -> None:
        ensure_torchvision()
        import open_clip

        self.device = torch.device(device)
        self.dtype = DTYPES[precision]
        source = find_source(model, pretrained, tag)
        try:
            with _loading_from(source.file):
                self.model: Any = _create(source, precision=precision, device=device)
            self.model.eval().requires_grad_(False)
            self.tokenizer = tokenizer_of(source)
        except NoTokenizerError as error:
            raise CheckpointError(f"open_clip model {model!r}: {error}") from error
        except CheckpointError:
            raise
        except Exception as error:  # open_clip, timm and transformers raise anything
            raise CheckpointError(f"open_clip model {model!r} cannot be loaded: {error}") from error
        if not source.file:  # a file's are checked while loading
            check_finite(self.model.state_dict(), f"{model} {pretrained}".strip())
        if source.settings is not None:
            logger.info(
                "%s with the weights of %s: settings %s (%s)",
                model,
                source.file,
                source.origin,
                source.settings,
            )
        if pack and self.device.type == "cpu":
            pack_blocks(self.model, open_clip.transformer.ResidualAttentionBlock)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the image tower's input, pixels."""
        size = self.model.visual.image_size
        return (size, size) if isinstance(size, int) else tuple(size)

    @property
    def preprocess_config(self) -> dict[str, Any]:
        """open_clip's description of the model's transform."""
        return self.model.visual.preprocess_cfg

    def transform(self) -> Callable[[Any], Tensor]:
        """The model's evaluation transform: PIL image -> (3, h, w) fp32, on the host."""
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
        """N texts -> (N, E) fp32 unit rows; texts are truncated to the model's context."""
        tokens = self.tokenizer(list(texts)).to(self.device)
        return F.normalize(self.model.encode_text(tokens).float(), dim=-1)

    def reading(self, text: str) -> Reading:
        """Number of tokens of a text and the limit of the model's tokenizer."""
        return reading_of(self.tokenizer, text)


@contextlib.contextmanager
def _loading_from(file: str) -> Iterator[None]:
    """Suppress open_clip's warning of random weights, which a file replaces at once."""

    def keep(record: logging.LogRecord) -> bool:
        return not file or not record.getMessage().startswith("No pretrained weights loaded")

    logger = logging.getLogger()
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def _create(source: Source, **options: Any) -> torch.nn.Module:
    """The model, with the source's weights in it.

    Raises:
        Exception: raised by open_clip, timm or transformers.
    """
    ensure_torchvision()
    import open_clip

    if not source.file:
        return open_clip.create_model(source.name, pretrained=source.tag or None, **options)
    state = read_checkpoint(source.file)
    check_names(state, source.file)
    _check_described(source, state)
    settings = source.settings
    if settings is not None:
        options["force_preprocess_cfg"] = settings.preprocess
        options["force_quick_gelu"] = settings.quick_gelu
    # No weights are fetched, not even the text tower's: the file has them.
    model = open_clip.create_model(
        source.name, load_weights=False, pretrained_text=False, **options
    )
    load_strict(model, _fitted(model, state), source.file)
    return model


def _check_described(source: Source, state: Mapping[str, Tensor]) -> None:
    """Compare the described sizes with the file's: a damaged number must not allocate memory."""
    ensure_torchvision()
    import open_clip
    from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH

    config = open_clip.get_model_config(source.name) or {}
    described = clip_parameters(config)
    held = sum(tensor.numel() for tensor in state.values())
    places = state.get("positional_embedding", state.get("text.positional_embedding"))
    length = config.get("text_cfg", {}).get("context_length", DEFAULT_CONTEXT_LENGTH)
    if places is not None and places.ndim == 2 and len(places) != length:
        raise CheckpointError(
            f"{source.file} reads {len(places)} tokens, but {source.name} reads {length}: is this "
            "the file of another model?"
        )
    if described > ROOM + 4 * held:
        raise CheckpointError(
            f"{source.file} holds {held} numbers, but {source.name} takes about {described}: is "
            "this the file of another model?"
        )


def _fitted(model: torch.nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors with the names and shapes of the installed open_clip, from files of earlier
    versions, OpenAI, Apple and transformers' text towers."""
    ensure_torchvision()
    import open_clip.factory as factory

    state = factory.convert_state_dict(model, state)
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = factory.convert_to_custom_text_state_dict(state)
    wanted = model.state_dict()
    for name in ("logit_scale", "logit_bias"):
        if name in state and name in wanted and state[name].numel() == wanted[name].numel() == 1:
            state[name] = state[name].reshape(wanted[name].shape)
    if "logit_bias" in wanted and "logit_bias" not in state:
        state["logit_bias"] = torch.zeros_like(wanted["logit_bias"])
    return {name: value for name, value in state.items() if name in wanted or name not in UNUSED}


def tokenizer_of(source: Source) -> Any:
    """The tokenizer of a source.

    Raises:
        NoTokenizerError: its files are missing, damaged or cannot be fetched.
    """
    try:
        return _load_tokenizer(source)
    except Exception as error:  # transformers and the hub raise anything
        config = source.tokenizer or architecture_of(source.name).get("text_cfg", {})
        named = config.get("hf_tokenizer_name") or "its tokenizer"
        raise NoTokenizerError(
            f"the tokenizer ({named}) cannot be loaded ({brief(error)}): without a network, put "
            f"its files ({TOKENIZERS[0]}, {TOKENIZERS[1]}) and the model's {DIRECTORY_CONFIG} into "
            "the directory of the weights, and set model to that directory"
        ) from error


def _load_tokenizer(source: Source) -> Any:
    ensure_torchvision()
    import open_clip
    from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH, HFTokenizer

    config = source.tokenizer
    if config is None:
        return open_clip.get_tokenizer(source.name)
    directory = Path(source.name.removeprefix(LOCAL_DIR))
    options = dict(config.get("tokenizer_kwargs", {}))
    if not config.get("hf_tokenizer_name"):
        if "bpe_path" in options:  # relative to the configuration
            options["bpe_path"] = str(directory / options["bpe_path"])
        made = open_clip.get_tokenizer(source.name, **options)
        if made.vocab_size > config["vocab_size"]:
            raise ValueError(
                f"it knows {made.vocab_size} tokens, and the model {config['vocab_size']}"
            )
        return made
    return HFTokenizer(
        str(directory) if has_tokenizer(source) else config["hf_tokenizer_name"],
        context_length=config.get("context_length", DEFAULT_CONTEXT_LENGTH),
        tokenizer_mode=config.get("tokenizer_mode"),
        **options,
    )


def reading_of(tokenizer: Any, text: str) -> Reading:
    """What one of open_clip's tokenizers makes of a text, before truncation."""
    if hasattr(tokenizer, "encode"):  # open_clip's own, of bytes: it knows every text
        count = len(tokenizer.encode(text))
        limit = int(tokenizer.context_length)
        return Reading(tokens=count + 2, limit=limit, known=count, empty=not count)
    ensure_torchvision()
    from open_clip import tokenizer as cleaning

    if hasattr(tokenizer, "clean_fn"):
        text = tokenizer.clean_fn(text)
    else:  # SigLIP's
        text = cleaning.canonicalize_text(cleaning.basic_clean(text))
    clips = getattr(tokenizer, "tokenizer_mode", "") == "clips"
    inner = tokenizer.tokenizer
    ids = inner(text, add_special_tokens=not clips).input_ids
    return reading_of_ids(
        inner, ids, int(tokenizer.context_length), added=CLIPS_MARKS if clips else 0
    )


def clip_parameters(architecture: dict[str, Any]) -> int:
    """Approximate number of weights of an open_clip model of two plain transformers; else 0."""
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
