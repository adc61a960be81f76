"""Captions from files as conditions: text with one a line, or Parquet."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq

from actors.caption_files import (
    FEATURES,
    SCHEMA,
    TEXT,
    UNREADABLE_PARQUET,
    by_row,
    iterate_text_features,
    read_caption_features,
    read_captions,
    write_caption_features,
)
from cluster.errors import DataError
from cluster.invocation import command_of
from cluster.messages import Condition
from cluster.paths import expanded


def caption_conditions(path: str) -> list[Condition]:
    """The captions of a file, in its order. Their features stay there: a condition says in which
    row (see `actors.caption_files.features_of`).

    Args:
        path: a .txt file, one caption a line, empty lines skipped; or a .parquet file: as
            `python -m actors.captions` writes them, or with a column `text` and, for
            caption-conditional policies, a column `features` (lists of n lists of D floats).

    Raises:
        DataError: names file, column and row of what is wrong.
    """
    file = Path(path)
    return _from_parquet(file) if file.suffix == ".parquet" else _from_text(file)


def encode_captions(path: str, encoder: str, target: Path) -> bool:
    """Encode the captions of a file that has no features (or not of all) into one that has.

    Args:
        encoder: T5 model (folder or name).
        target: Parquet file to write; one that holds the same captions already stays.

    Returns:
        Whether there was anything to encode: else the file itself has what is needed.

    Raises:
        DataError: one of the files cannot be read.
        ConfigError: the encoder cannot be loaded.
    """
    found = caption_conditions(path)
    if all(condition.features is not None for condition in found):
        return False
    texts = [condition.text for condition in found]
    if not target.is_file() or [each.text for each in read_caption_features(target)] != texts:
        from actors.captions import CaptionEncoder

        write_caption_features(target, texts, CaptionEncoder(encoder).stream(texts))
    return True


def peek_captions(path: str) -> int:
    """Look at a file of captions without reading its features.

    Returns:
        Width of the features of its first caption; 0 where it has none.

    Raises:
        DataError: it cannot be read, or holds no caption.
    """
    file = Path(path)
    if file.suffix != ".parquet":
        read_captions(file)
        return 0
    try:
        with pq.ParquetFile(expanded(file)) as parquet:
            names, rows = parquet.schema_arrow.names, parquet.metadata.num_rows
            if not rows:
                raise DataError(f"captions {path}: the file holds no caption")
            if not set(SCHEMA.names) <= set(names) and TEXT not in names:
                raise DataError(f"captions {path}: {_needs(names)}")
            own = "shape" in names
            wanted = ["shape"] if own else [name for name in (FEATURES,) if name in names]
            if not wanted:
                return 0
            first = next(parquet.iter_batches(1, columns=wanted)).column(0)[0].as_py()
    except UNREADABLE_PARQUET as error:
        raise DataError(f"captions {path}: not a readable Parquet file ({error})") from error
    if own:
        return int(first[1]) if first and len(first) == 2 else 0
    return len(first[0]) if first else 0


def _needs(columns: list[str]) -> str:
    return (
        f"needs a column {TEXT!r}, or those of `{command_of('actors.captions')}` "
        f"({', '.join(SCHEMA.names)}); found {', '.join(columns)}"
    )


def _from_text(path: Path) -> list[Condition]:
    return [Condition(text=caption) for caption in read_captions(path)]


def _from_parquet(path: Path) -> list[Condition]:
    try:
        with pq.ParquetFile(expanded(path)) as file:
            columns = file.schema_arrow.names
            if set(SCHEMA.names) <= set(columns):
                return read_caption_features(path)
            if TEXT not in columns:
                raise DataError(f"captions {path}: {_needs(columns)}")
        rows = enumerate(iterate_text_features(path))
        found = [by_row(path, row, condition) for row, condition in rows]
    except UNREADABLE_PARQUET as error:
        raise DataError(f"captions {path}: not a readable Parquet file ({error})") from error
    if not found:
        raise DataError(f"captions {path}: the file holds no caption")
    return found
