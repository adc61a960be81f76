"""Captions of a run: checked before it starts, and encoded if they have no features."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pyarrow.parquet as pq

from actors.text.captions import Captions, caption_conditions, is_parquet, load_captions
from actors.text.features import (
    ENCODER,
    FEATURES,
    SCHEMA,
    read_caption_features,
    write_caption_features,
)
from actors.text.tables import UNREADABLE_PARQUET
from cluster.errors import DataError
from cluster.io.paths import expand_user
from cluster.model_files.tensors import PACKAGE, locate
from cluster.text_limits import LongCaptions, faults

AT_MOST = 20_000  # captions checked before a run, which takes seconds


def encode_captions(
    path: str, column: str, encoder: str, target: Path, long_captions: LongCaptions
) -> bool:
    """Encode captions without features; returns False if the file has features of all.

    Args:
        column: of a table (see `load_captions`).
        encoder: T5 model (folder or name).
        target: Parquet file to write, unless it holds the same captions already.
        long_captions: treatment of captions that the encoder would cut.

    Raises:
        DataError: a file cannot be read, or the encoder cannot read a caption.
        ConfigError: the encoder cannot be loaded.
    """
    found = caption_conditions(caption_file(path), column)
    if all(condition.features is not None for condition in found):
        return False
    texts = [condition.text for condition in found]
    if not target.is_file() or [each.text for each in read_caption_features(target)] != texts:
        from actors.text.encoder import CaptionEncoder, check_captions

        encode = CaptionEncoder(encoder)
        check_captions(path, texts, encode, long_captions, "conditions.long_captions")
        write_caption_features(target, texts, encode.stream(texts), encode.fingerprint)
    return True


def caption_file(given: str) -> Path:
    """The path of a file of captions; `package://` names one in an installed package.

    Raises:
        CheckpointError: no such file in the package.
    """
    return locate(given) if given.startswith(PACKAGE) else Path(given)


def encoder_is_here(encoder: str) -> bool:
    """Whether a text encoder is a directory, or was downloaded."""
    if encoder.startswith(PACKAGE):
        return True  # or an error that names it, when it is read
    cache = huggingface_hub.try_to_load_from_cache
    return expand_user(encoder).is_dir() or isinstance(cache(encoder, "tokenizer_config.json"), str)


def check_encoder(encoder: str, texts: Sequence[str], long_captions: LongCaptions) -> None:
    """Check by its tokenizer that a text encoder reads captions as written. Skips encoders that are
    not downloaded yet, and all if transformers is missing.

    Raises:
        DataError: it does not.
        ConfigError: its tokenizer cannot be loaded.
    """
    if not encoder_is_here(encoder) or importlib.util.find_spec("transformers") is None:
        return
    from actors.text.encoder import (
        MAX_TOKENS,
        load_tokenizer,
        normalise_caption,
        tokenizer_readings,
    )

    shown = texts[:AT_MOST]
    cleaned = [normalise_caption(text) for text in shown]
    readings = tokenizer_readings(load_tokenizer(encoder), cleaned, MAX_TOKENS)
    if wrong := faults(shown, readings, long_captions, "conditions.long_captions"):
        raise DataError(f"encoder {encoder}: {wrong}")


@dataclass(frozen=True)
class Peeked:
    """A file of captions, read without its features."""

    captions: Captions
    width: int = 0
    """Dimension of the features; 0: no features."""
    longest: int = 0
    """Most tokens of a caption's features; 0: not known without reading them."""
    encoder: str = ""
    """Fingerprint of the features' encoder; empty if not known."""


def peek_captions(path: str, column: str = "") -> Peeked:
    """Read a file of captions without its features.

    Raises:
        DataError: it cannot be read, is empty, or has features of different widths.
    """
    file = caption_file(path)
    if not is_parquet(file):
        return Peeked(load_captions(file, column))
    try:
        with pq.ParquetFile(expand_user(file)) as parquet:
            names = parquet.schema_arrow.names
            own = set(SCHEMA.names) <= set(names)
            captions = load_captions(file, "caption" if own else column)
            if own:
                shapes = parquet.read(columns=["shape"]).column(0).to_pylist()
                metadata = parquet.schema_arrow.metadata or {}
                encoder = metadata.get(ENCODER, b"").decode("utf-8", "replace")
                # `actors.captions` told of repetitions when it wrote the file
                return Peeked(replace(captions, notes=()), *_extent(path, shapes), encoder)
            if FEATURES not in names:
                return Peeked(captions)
            first = next(parquet.iter_batches(1, columns=[FEATURES])).column(0)[0].as_py()
    except UNREADABLE_PARQUET as error:
        raise DataError(f"captions {path}: not a readable Parquet file ({error})") from error
    nested = isinstance(first, list) and bool(first) and isinstance(first[0], list)
    return Peeked(captions, len(first[0]) if nested else 0)


def _extent(path: str, shapes: Sequence[Any]) -> tuple[int, int]:
    """Width D and largest n of shapes [n, D]."""
    width = longest = 0
    for row, shape in enumerate(shapes):
        parts = shape if isinstance(shape, list) else []
        counts = [n for n in parts if isinstance(n, int) and n > 0]
        if len(counts) != 2 or shape != counts:
            where = f"captions {path}: column 'shape', row {row}"
            raise DataError(f"{where}: found {shape!r:.60}, expected [n, D]")
        width = width or counts[1]
        if counts[1] != width:
            raise DataError(
                f"captions {path}: column 'shape', row {row}: found width {counts[1]}, but row 0 "
                f"has {width}"
            )
        longest = max(longest, counts[0])
    return width, longest
