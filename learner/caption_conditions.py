"""Captions from files as conditions: text with one a line, or Parquet."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from actors.caption_files import SCHEMA, read_caption_features, read_captions
from cluster.errors import DataError
from cluster.invocation import command_of
from cluster.messages import Condition

TEXT, FEATURES = "text", "features"


def caption_conditions(path: str, encoder: str = "") -> list[Condition]:
    """The captions of a file, in its order.

    Args:
        path: a .txt file, one caption a line, empty lines skipped; or a .parquet file: as
            `python -m actors.captions` writes them, or with a column `text` and, for
            caption-conditional policies, a column `features` (lists of n lists of D floats).
        encoder: T5 model (folder or name) that encodes captions whose file has no features; empty
            leaves them without, which is enough for scorers.

    Raises:
        DataError: names file, column and row of what is wrong.
        ConfigError: the encoder cannot be loaded.
    """
    file = Path(path)
    found = _from_parquet(file) if file.suffix == ".parquet" else _from_text(file)
    if encoder and any(condition.features is None for condition in found):
        from actors.captions import CaptionEncoder

        encoded = CaptionEncoder(encoder)([condition.text for condition in found])
        found = [dataclasses.replace(c, features=f) for c, f in zip(found, encoded)]
    return found


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
        with pq.ParquetFile(file.expanduser()) as parquet:
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
    except (OSError, pa.ArrowException) as error:
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
        with pq.ParquetFile(path.expanduser()) as file:
            columns = file.schema_arrow.names
            if set(SCHEMA.names) <= set(columns):
                return read_caption_features(path)
            if TEXT not in columns:
                raise DataError(f"captions {path}: {_needs(columns)}")
            table = file.read([name for name in (TEXT, FEATURES) if name in columns])
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"captions {path}: not a readable Parquet file ({error})") from error
    if not len(table):
        raise DataError(f"captions {path}: the file holds no caption")
    texts = table[TEXT].to_pylist()
    features = (
        table[FEATURES].to_pylist() if FEATURES in table.column_names else [None] * len(texts)
    )
    return [_condition(path, row, *pair) for row, pair in enumerate(zip(texts, features))]


def _condition(path: Path, row: int, text: object, features: object) -> Condition:
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"captions {path}: column {TEXT!r}, row {row}: found {text!r}, not text")
    if features is None:
        return Condition(text=text)
    try:
        matrix = np.array(features, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"captions {path}: column {FEATURES!r}, row {row}: not n lists of D floats ({error})"
        ) from error
    if matrix.ndim != 2 or not matrix.size or not np.isfinite(matrix).all():
        raise DataError(
            f"captions {path}: column {FEATURES!r}, row {row}: found shape {matrix.shape}, "
            "expected n lists of D finite floats"
        )
    return Condition(text=text, features=matrix)
