"""Caption features: what a caption-conditional policy reads instead of words.

    python -m actors.captions captions.txt features.parquet --encoder google/flan-t5-xl

LlamaGen's text-to-image policies condition on the last hidden states of a frozen T5 encoder:
flan-t5-xl, at most 120 tokens, end token included. The encoder (6 GB in bf16) does not have to be
where policies are sampled and tuned: its features are written to a Parquet file once.

Needs the extra `t2i`: pip install 'tessera-rl[t2i]'.

Shapes: n tokens of a caption, D width of the encoder.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    import sys

    from cluster.program import run_command

    sys.exit(run_command("actors.captions"))

import html
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro

from actors.caption_files import (
    read_caption_features,
    read_captions,
    write_caption_features,
)
from cluster.console import counting, exit_status
from cluster.errors import ConfigError, TesseraError
from cluster.invocation import command_of
from cluster.locks import locked_file
from cluster.paths import output_path
from cluster.torchvision_ops import ensure_torchvision

__all__ = [
    "CaptionEncoder",
    "normalise_caption",
    "read_caption_features",
    "write_caption_features",
]

DEFAULT_ENCODER = "google/flan-t5-xl"
MAX_TOKENS = 120
REMEMBERED = 1024  # captions: about 160 MB of flan-t5-xl's features
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DType = Literal["auto", "float32", "bfloat16", "float16"]

_QUOTES = str.maketrans({**dict.fromkeys("`´¨«»“”", '"'), **dict.fromkeys("‘’", "'")})
_SYMBOLS = re.compile(r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+")  # each run of them is a space


def normalise_caption(text: str) -> str:
    """A caption as LlamaGen's encoder was fed it, as far as ordinary prompts go.

    HTML entities are unescaped, letters lower-cased, typographic dashes and quotes made plain,
    symbols (brackets, slashes, `#&@*~` and the like) and runs of white space made one space, a
    comma or full stop set apart from a letter that follows it, and quotes around the whole or
    punctuation at its ends removed.

    What the official cleaning of web captions does besides is not done: it removes URLs, HTML tags,
    @names, Chinese characters, file names and numbers of six digits or more, strings that look like
    article codes or sizes ("jc6640", "2x2"), and words of commerce ("free shipping", "download");
    and it repairs wrongly decoded text. Of PartiPrompts' 1,632 captions and 30,000 of COCO it
    changes 9 otherwise than this function, all of which lose a word by it.
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
    """The encoder half of a T5, from captions to features. Captions it has seen are remembered."""

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
            max_tokens: longest caption; what is beyond is cut, the end token stays.
            normalise: clean captions with `normalise_caption` before they are encoded.

        Raises:
            ConfigError: transformers is not installed; there is no such model; its tokenizer cannot
                be read; or the checkpoint lacks a tensor of the encoder.
        """
        if dtype is None:
            dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
        self._tokenizer, module = _load(model, dtype)
        self._module = module.to(device).eval().requires_grad_(False)
        self._device, self._batch, self._max_tokens = device, batch, max_tokens
        self._normalise = normalise
        self._seen: dict[str, np.ndarray] = {}

    @property
    def width(self) -> int:
        """D"""
        return int(self._module.config.d_model)

    def __call__(
        self, texts: Sequence[str], advance: Callable[[int], None] | None = None
    ) -> list[np.ndarray]:
        """Features of captions, in their order.

        Args:
            advance: told the number of captions of each batch when it is done.

        Returns:
            One read-only (n, D) float32 array a caption, 1 <= n <= max_tokens, without padding.
        """
        return list(self.stream(texts, advance))

    def stream(
        self, texts: Sequence[str], advance: Callable[[int], None] | None = None
    ) -> Iterator[np.ndarray]:
        """As calling, one after another: no more than a batch is held beside what is remembered."""
        for at in range(0, len(texts), self._batch):
            batch = texts[at : at + self._batch]
            cleaned = [normalise_caption(text) if self._normalise else text for text in batch]
            known = {text: self._seen[text] for text in cleaned if text in self._seen}
            fresh = [text for text in dict.fromkeys(cleaned) if text not in known]
            if fresh:
                known.update(zip(fresh, self._encode(fresh)))
            self._remember(known)
            yield from (known[text] for text in cleaned)
            if advance:
                advance(len(batch))

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
            rows.flags.writeable = False  # shared with what is remembered
        return found

    def _remember(self, known: dict[str, np.ndarray]) -> None:
        self._seen.update(known)
        for oldest in list(self._seen)[: max(0, len(self._seen) - REMEMBERED)]:
            del self._seen[oldest]


def _load(model: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Tokenizer and encoder; a checkpoint that lacks a tensor is refused, not filled at random."""
    ensure_torchvision()  # transformers imports it where it is installed
    try:
        from transformers import AutoTokenizer, T5EncoderModel
    except ImportError as error:
        raise ConfigError(
            f"encoding captions needs transformers ({error}): pip install 'tessera-rl[t2i]'"
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        loaded: Any = T5EncoderModel.from_pretrained(model, dtype=dtype, output_loading_info=True)
        module, info = loaded
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        first = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"encoder {model}: neither a directory with a T5 and its tokenizer nor a model of the "
            f"Hugging Face hub that can be reached ({first})"
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ConfigError(
            f"encoder {model}: not a T5 encoder, {len(missing)} tensors are missing, the first is "
            f"{missing[0]!r}"
        )
    return tokenizer, module


@dataclass(frozen=True, kw_only=True)
class CaptionsConfig:
    """Encode captions once, for sampling and tuning caption-conditional policies."""

    captions: Annotated[Path, tyro.conf.Positional]
    """Text file, UTF-8, one caption a line. Empty lines are skipped."""
    features: Annotated[Path, tyro.conf.Positional]
    """Parquet file to write: columns caption, features, shape."""
    encoder: str = DEFAULT_ENCODER
    """T5 of the Hugging Face hub, or a directory that holds one."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""
    dtype: DType = "auto"
    """Of the encoder; auto is bfloat16 on a GPU and float32 on a CPU. Stored are float32."""
    batch: int = 32
    """Captions encoded at once."""
    max_tokens: int = MAX_TOKENS
    """Longest caption, in tokens; LlamaGen's is 120."""
    normalise: bool = True
    """Clean captions as LlamaGen's were (lower case, plain punctuation) before encoding."""


def resolve_device(name: str) -> str:
    """A device by name; "auto" is a GPU if there is one.

    Raises:
        ConfigError: no such device.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        first = str(error).partition("\n")[0]
        raise ConfigError(f"device {name!r} is not to be had here: {first}") from error
    return name


def encode_file(config: CaptionsConfig) -> None:
    """Encode a text file of captions into a Parquet file.

    Raises:
        ConfigError: a value is impossible, the output exists, or the encoder cannot be loaded.
        DataError: the captions cannot be read.
    """
    if config.batch < 1 or config.max_tokens < 1:
        raise ConfigError("batch and max_tokens must be >= 1")
    features = output_path(config.features, "FEATURES")
    with locked_file(features, str(features)):
        if features.exists():
            raise ConfigError(f"{features} exists: name another file, or remove it first")
        _encode(config, features)


def _encode(config: CaptionsConfig, features: Path) -> None:
    texts = read_captions(config.captions)
    encoder = CaptionEncoder(
        config.encoder,
        device=resolve_device(config.device),
        dtype=DTYPES.get(config.dtype),
        batch=config.batch,
        max_tokens=config.max_tokens,
        normalise=config.normalise,
    )
    with counting("encoding", len(texts), "captions") as advance:
        write_caption_features(features, texts, encoder.stream(texts, advance))
    print(f"{len(texts)} captions, features of width {encoder.width}: {features}")


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    config = tyro.cli(CaptionsConfig, args=arguments, prog=command_of("actors.captions"))
    return exit_status(
        lambda: encode_file(config),
        refused=(TesseraError,),
        stopped="stopped; nothing was written",
    )
