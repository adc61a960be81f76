"""The encoder half of a T5: captions as LlamaGen cleans them, their tokens, their features.

Needs the extra `t2i`: pip install 'tessera-rl[t2i]'.

Shapes: n tokens of a caption, D width of the encoder.
"""

from __future__ import annotations

import hashlib
import html
import logging
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from cluster.errors import ConfigError, DataError
from cluster.model_files.tensors import PACKAGE, locate
from cluster.model_files.torchvision_ops import ensure_torchvision
from cluster.model_files.weight_checks import check_finite
from cluster.text_limits import LongCaptions, Reading, faults, notes, reading_of_ids

DEFAULT_ENCODER = "google/flan-t5-xl"
MAX_TOKENS = 120
CACHED = 1024  # captions: about 160 MB of flan-t5-xl's features
READ_AT_ONCE = 1024
FINGERPRINTED = 4096  # numbers of each tensor

logger = logging.getLogger(__name__)

_QUOTES = str.maketrans({**dict.fromkeys("`´¨«»“”", '"'), **dict.fromkeys("‘’", "'")})
_SYMBOLS = re.compile(r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+")  # each run of them is a space


def normalise_caption(text: str) -> str:
    """A caption cleaned as LlamaGen cleans ordinary prompts.

    Unescapes HTML entities, lower-cases, replaces typographic dashes and quotes by plain ones,
    symbols (brackets, slashes, `#&@*~` and the like) and white space by one space, inserts a space
    between a comma or full stop and a following letter, and strips quotes around the whole and
    punctuation at its ends.

    Not done, of the official cleaning of web captions: removing URLs, HTML tags, @names, Chinese
    characters, file names, numbers of six digits or more, article codes or sizes ("jc6640", "2x2")
    and words of commerce ("free shipping", "download"); repairing wrongly decoded text. Of 1,632
    PartiPrompts and 30,000 COCO captions, 9 differ, each of which loses a word officially.
    """
    text = html.unescape(html.unescape(text)).strip().lower().translate(_QUOTES)
    text = "".join("-" if unicodedata.category(letter) == "Pd" else letter for letter in text)
    text = re.sub(r"-{2,}", "-", text)
    text = re.sub(r"[\"']{2,}", '"', text)
    text = _SYMBOLS.sub(" ", re.sub(r"\.{2,}", " ", text))
    if len(re.findall(r"[-_]", text)) > 3:  # this-is-a-slug-of-words
        text = re.sub(r"[-_]", " ", text)
    text = re.sub(r"\s+\.\s+", " ", text)
    text = re.sub(r"(\D[,.])\b", r"\1 ", text)
    text = re.sub(r"\s+", " ", text).strip()
    text = re.sub(r"^[\"'](.+)[\"']$", r"\1", text)
    return re.sub(r"^['_,:;-]|['_,:+-]$", "", text).strip()


class CaptionEncoder:
    """The encoder half of a T5: captions to features. Caches features of recent captions."""

    def __init__(
        self,
        model: str = DEFAULT_ENCODER,
        *,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        batch: int = 32,
        max_tokens: int = MAX_TOKENS,
        normalise: bool = True,
    ) -> None:
        """Load the encoder and its tokenizer.

        Args:
            model: a T5 of the Hugging Face hub, or a directory that holds one.
            dtype: of weights and arithmetic; None is bf16 on a GPU and fp32 on a CPU.
            batch: captions encoded at once.
            max_tokens: longer captions are cut; the end token stays.
            normalise: clean captions with `normalise_caption` first.

        Raises:
            ConfigError: transformers is not installed; no such model; unreadable tokenizer; or the
                checkpoint lacks a tensor of the encoder.
        """
        if dtype is None:
            dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
        self._tokenizer, module = _load(model, dtype)
        self._module = module.to(device).eval().requires_grad_(False)
        self._device, self._batch, self._max_tokens = device, batch, max_tokens
        self._normalise = normalise
        self.name, self._cached = model, dict[str, np.ndarray]()

    @property
    def width(self) -> int:
        """D"""
        return int(self._module.config.d_model)

    @property
    def fingerprint(self) -> str:
        """Identifies weights and cleaning, the same in every dtype from bf16 up: features of two
        fingerprints are of two spaces."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self._module.state_dict().items()):
            flat = tensor.flatten()
            some = flat[:: -(-len(flat) // FINGERPRINTED)].to(torch.bfloat16).float()
            digest.update(f"{name} {tuple(tensor.shape)}".encode() + some.cpu().numpy().tobytes())
        cleaning = "" if self._normalise else "-as-written"
        return f"t5-{self.width}{cleaning}-{digest.hexdigest()[:16]}"

    def __call__(
        self, texts: Sequence[str], advance: Callable[[int], None] | None = None
    ) -> list[np.ndarray]:
        """Features of captions, in their order.

        Args:
            advance: called with the size of each finished batch.

        Returns:
            One read-only (n, D) float32 array per caption, 1 <= n <= max_tokens, without padding.
        """
        return list(self.stream(texts, advance))

    def stream(
        self, texts: Sequence[str], advance: Callable[[int], None] | None = None
    ) -> Iterator[np.ndarray]:
        """As `__call__`, lazily: holds one batch beside the cache."""
        for at in range(0, len(texts), self._batch):
            batch = texts[at : at + self._batch]
            cleaned = [normalise_caption(text) if self._normalise else text for text in batch]
            known = {text: self._cached[text] for text in cleaned if text in self._cached}
            fresh = [text for text in dict.fromkeys(cleaned) if text not in known]
            if fresh:
                known.update(zip(fresh, self._encode(fresh)))
            self._cache(known)
            yield from (known[text] for text in cleaned)
            if advance:
                advance(len(batch))

    def readings(self, texts: Sequence[str]) -> list[Reading]:
        """How the tokenizer reads captions, before any is cut."""
        cleaned = [normalise_caption(text) if self._normalise else text for text in texts]
        return tokenizer_readings(self._tokenizer, cleaned, self._max_tokens)

    @torch.inference_mode()
    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        tokens = self._tokenizer(
            texts,
            truncation=True,
            max_length=self._max_tokens,
            padding="longest",
            padding_side="right",
            return_tensors="pt",
        ).to(self._device)
        hidden = self._module(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).last_hidden_state
        features = hidden.float().cpu().numpy()
        lengths = tokens["attention_mask"].sum(-1).tolist()
        found = [rows[:length].copy() for rows, length in zip(features, lengths)]
        for rows in found:
            rows.flags.writeable = False  # shared with the cache
        return found

    def _cache(self, known: dict[str, np.ndarray]) -> None:
        self._cached.update(known)
        for oldest in list(self._cached)[: max(0, len(self._cached) - CACHED)]:
            del self._cached[oldest]


def tokenizer_readings(tokenizer: Any, texts: Sequence[str], limit: int) -> list[Reading]:
    """How a tokenizer of transformers reads cleaned texts."""
    return [
        reading_of_ids(tokenizer, ids, limit)
        for at in range(0, len(texts), READ_AT_ONCE)
        for ids in tokenizer(list(texts[at : at + READ_AT_ONCE]), truncation=False, verbose=False)[
            "input_ids"
        ]
    ]


def check_captions(
    source: str,
    texts: Sequence[str],
    encoder: CaptionEncoder,
    long_captions: LongCaptions,
    option: str = "--long-captions",
) -> None:
    """Refuse captions that an encoder cannot read in full; log what it reads differently.

    Args:
        source: where they are from, for messages.
        option: the option that sets `long_captions`, for messages.

    Raises:
        DataError: captions that are empty after cleaning, unknown, or too long (unless these are to
            be cut): how many, and the first.
    """
    readings = encoder.readings(texts)
    if wrong := faults(texts, readings, long_captions, option):
        raise DataError(f"captions {source}, encoder {encoder.name}: {wrong}")
    for note in notes(texts, readings):
        logger.warning("note: captions %s, encoder %s: %s", source, encoder.name, note)


def load_tokenizer(model: str) -> Any:
    """The tokenizer of an encoder.

    Raises:
        ConfigError: transformers is not installed, or no such tokenizer.
    """
    ensure_torchvision()  # transformers imports it where it is installed
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise _no_transformers(error) from error
    try:
        return AutoTokenizer.from_pretrained(_place(model))
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise _no_encoder(model, error) from error


def _place(model: str) -> str:
    """A model's name or directory; `package://` names one in an installed package."""
    return str(locate(model, directory=True)) if model.startswith(PACKAGE) else model


def _no_transformers(error: ImportError) -> ConfigError:
    return ConfigError(
        f"encoding captions needs transformers ({error}): pip install 'tessera-rl[t2i]'"
    )


def _no_encoder(model: str, error: Exception) -> ConfigError:
    first = str(error).strip().partition("\n")[0]
    return ConfigError(
        f"encoder {model}: neither a directory with a T5 and its tokenizer nor a model of the "
        f"Hugging Face hub that can be reached ({first})"
    )


def _load(model: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Tokenizer and encoder; refuses a checkpoint that lacks a tensor."""
    tokenizer = load_tokenizer(model)
    ensure_torchvision()
    try:
        from transformers import T5EncoderModel

        loaded: Any = T5EncoderModel.from_pretrained(
            _place(model), dtype=dtype, output_loading_info=True
        )
        module, info = loaded
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise _no_encoder(model, error) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ConfigError(
            f"encoder {model}: not a T5 encoder, {len(missing)} tensors are missing, the first is "
            f"{missing[0]!r}"
        )
    check_finite(module.state_dict(), f"encoder {model} in {dtype}")
    return tokenizer, module
