"""Encodes captions as features for caption-conditional policies.

    python -m actors.captions captions.txt features.parquet --encoder google/flan-t5-xl

LlamaGen's text-to-image policies condition on the last hidden states of a frozen T5 encoder
(flan-t5-xl, at most 120 tokens, end token included). Features are written to a Parquet file once,
so samplers and learners do not need the encoder (6 GB in bf16).

Needs the extra `t2i`: pip install 'tessera-rl[t2i]'.

Shapes: n tokens of a caption, D width of the encoder.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    import sys

    from cluster.program.start import run_command

    sys.exit(run_command("actors.captions"))

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from actors.text.captions import read_captions
from actors.text.encoder import (
    DEFAULT_ENCODER,
    MAX_TOKENS,
    CaptionEncoder,
    check_captions,
)
from actors.text.features import write_caption_features
from cluster.errors import ConfigError, TesseraError
from cluster.io.locks import locked_file
from cluster.io.paths import output_path
from cluster.program.console import exit_status, progress_bar
from cluster.program.invocation import command_of
from cluster.program.precision import start_computing
from cluster.text_limits import LongCaptions

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DType = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class CaptionsConfig:
    """Encode captions once, for sampling and tuning caption-conditional policies."""

    captions: Annotated[Path, tyro.conf.Positional]
    """Text file (UTF-8), one caption per line, empty lines skipped; or a table (.tsv, .csv, .json,
    .jsonl, .parquet)."""
    features: Annotated[Path, tyro.conf.Positional]
    """Parquet file to write: columns caption, features, shape."""
    column: str = ""
    """Column of a table that holds the captions. Default: the only one called caption, prompt, text
    or the like."""
    encoder: str = DEFAULT_ENCODER
    """T5 of the Hugging Face hub, or a directory that holds one."""
    device: str = "auto"
    """Device to sample on: auto (a GPU if there is one), cpu, cuda or cuda:N."""
    dtype: DType = "auto"
    """Of the encoder; auto is bfloat16 on a GPU and float32 on a CPU. Features are float32."""
    batch: int = 32
    """Captions encoded at once."""
    max_tokens: int = MAX_TOKENS
    """Longest caption, in tokens; LlamaGen's is 120."""
    long_captions: LongCaptions = "error"
    """For captions of more tokens. error: encode nothing. truncate: cut them, as LlamaGen does.
    Captions unknown to the encoder or empty after cleaning are always refused."""
    normalise: bool = True
    """Clean captions as LlamaGen's were (lower case, plain punctuation) before encoding."""


def resolve_device(name: str) -> str:
    """A device by name; "auto" is a GPU if there is one.

    Raises:
        ConfigError: the device is not available.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        first = str(error).partition("\n")[0]
        raise ConfigError(f"device {name!r} is not available here: {first}") from error
    return name


def encode_file(config: CaptionsConfig) -> None:
    """Encode a file of captions into a Parquet file with their features.

    Raises:
        ConfigError: an invalid value, an existing output, or an encoder that cannot be loaded.
        DataError: the file or its captions cannot be read.
    """
    if config.batch < 1 or config.max_tokens < 1:
        raise ConfigError("batch and max_tokens must be >= 1")
    start_computing()
    features = output_path(config.features, "FEATURES")
    with locked_file(features, str(features)):
        if features.exists():
            raise ConfigError(f"{features} exists: name another file, or remove it first")
        _encode(config, features)


def _encode(config: CaptionsConfig, features: Path) -> None:
    texts = read_captions(config.captions, config.column)
    encoder = CaptionEncoder(
        config.encoder,
        device=resolve_device(config.device),
        dtype=DTYPES.get(config.dtype),
        batch=config.batch,
        max_tokens=config.max_tokens,
        normalise=config.normalise,
    )
    check_captions(str(config.captions), texts, encoder, config.long_captions)
    with progress_bar("encoding", len(texts), "captions") as advance:
        rows = encoder.stream(texts, advance)
        write_caption_features(features, texts, rows, encoder.fingerprint)
    print(f"{len(texts)} captions, features of width {encoder.width}: {features}")


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    config = tyro.cli(CaptionsConfig, args=arguments, prog=command_of("actors.captions"))
    return exit_status(
        lambda: encode_file(config),
        refused=(TesseraError,),
        stopped="stopped; nothing was written",
    )
