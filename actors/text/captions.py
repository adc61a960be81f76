"""Reads captions from text files, tables and JSON; every command uses it.

Only line ends end a line, a table is never read as lines, and text that is not UTF-8 is refused
with its line.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from actors.text.features import (
    FEATURES,
    SCHEMA,
    by_row,
    iterate_text_features,
    read_caption_features,
)
from actors.text.tables import (
    DELIMITED,
    KNOWN,
    OBJECTS,
    UNREADABLE_PARQUET,
    Cells,
    choose_column,
    delimited,
    objects,
    parquet,
)
from cluster.errors import DataError
from cluster.io.files import split_lines
from cluster.io.paths import expand_user
from cluster.messages import Condition
from cluster.model_files.file_kinds import FileKind, described, file_kind

PLAIN = ("", ".txt", ".text")
OTHERS = (".parquet", ".yaml", ".yml", ".xml", ".toml", ".html", ".arrow", ".feather", ".pkl")
"""Suffixes of files that are not one caption a line, even if their content is text."""
_WIDE = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Captions:
    """The captions of a file."""

    texts: list[str]
    notes: tuple[str, ...] = ()
    """Warnings: the column that was chosen, blank lines, repeated captions."""


def read_captions(path: Path, column: str = "") -> list[str]:
    """The texts of `load_captions`; its notes are logged."""
    found = load_captions(path, column)
    for note in found.notes:
        logger.warning("note: %s", note)
    return found.texts


def load_captions(path: Path, column: str = "") -> Captions:
    """Captions of a file, in its order, stripped.

    Text files (UTF-8, with or without byte order mark) have one per line; blank lines are skipped.
    Tables (.tsv, .csv, .json, .jsonl, .ndjson, Parquet) have one per row, in one column; none may
    be empty.

    Args:
        column: of a table; empty takes the only one with a known name (`tables.KNOWN`).

    Raises:
        DataError: names file and line or row: the file is missing, of another kind, a table named
            as text, without such a column, or without captions.
    """
    place = expand_user(path)
    cells, notes = _cells(path, place, column), list[str]()
    captions = [_caption(path, cells, at) for at in range(len(cells.values))]
    if not captions:
        raise DataError(f"captions {path}: the file holds no caption (one a line is expected)")
    if cells.column and not column:
        notes.append(f"captions {path}: column {cells.column!r} is read")
    if gaps := _blank_lines(cells):
        notes.append(
            f"captions {path}: {len(gaps)} blank lines are skipped, the first is {gaps[0]}"
        )
    if not cells.column and place.suffix.lower() not in (*PLAIN, *OBJECTS):
        notes.append(f"captions {path}: read as text, one caption a line")
    if again := len(captions) - len(set(captions)):
        notes.append(
            f"captions {path}: {again} of {len(captions)} captions are repetitions of others"
        )
    return Captions(captions, tuple(notes))


def caption_conditions(path: Path, column: str = "") -> list[Condition]:
    """The captions of a file as conditions, in its order. Features of a Parquet file stay there: a
    condition has the row's number (see `actors.text.features.features_of`).

    Raises:
        DataError: as `load_captions` and `read_caption_features` do.
    """
    if not is_parquet(path):
        return [Condition(text=text) for text in load_captions(path, column).texts]
    try:
        with pq.ParquetFile(expand_user(path)) as file:
            names = file.schema_arrow.names
        if set(SCHEMA.names) <= set(names):
            if column not in ("", SCHEMA.names[0]):
                raise DataError(
                    f"captions {path}: its features are those of column {SCHEMA.names[0]!r}, not "
                    f"of {column!r}: leave --column out"
                )
            return read_caption_features(path)
        if FEATURES not in names:
            return [Condition(text=text) for text in load_captions(path, column).texts]
        rows = enumerate(iterate_text_features(path, choose_column(path, names, column)))
        found = [by_row(path, row, condition) for row, condition in rows]
    except UNREADABLE_PARQUET as error:
        raise DataError(f"captions {path}: not a readable Parquet file ({error})") from error
    if not found:
        raise DataError(f"captions {path}: the file holds no caption")
    return found


def is_parquet(path: Path) -> bool:
    """Whether a file of captions is a Parquet file, by its content.

    Raises:
        DataError: there is no such file.
    """
    return _kind_of(path, expand_user(path)) is FileKind.PARQUET


def _cells(path: Path, place: Path, column: str) -> Cells:
    kind = _kind_of(path, place)
    if kind is FileKind.PARQUET:
        return parquet(path, place, column)
    if kind not in (FileKind.TEXT, FileKind.EMPTY, FileKind.BINARY):
        raise DataError(f"captions {path}: {described(place)}; captions are text or tables")
    text, suffix = decode_text(path, place), place.suffix.lower()
    if not text.strip():
        raise DataError(f"captions {path}: the file holds no caption (one a line is expected)")
    if suffix in DELIMITED:
        return delimited(path, text, column, "\t" if suffix == ".tsv" else ",\t")
    if suffix in OBJECTS:
        return objects(path, text, column)
    if suffix in OTHERS:
        noun = "not a readable Parquet file" if suffix == OTHERS[0] else "of a kind not read here"
        raise DataError(
            f"captions {path}: {noun}: expected text with one caption a line (.txt), or a table "
            f"({_suffixes()}, Parquet), found {described(place)} called {suffix}"
        )
    if column:
        raise DataError(
            f"captions {path}: --column {column!r} is of tables ({_suffixes()}, Parquet), but this "
            "is read as text, one caption a line"
        )
    lines = [(at, line) for at, line in enumerate(split_lines(text), 1) if line.strip()]
    _refuse_tables(path, text, [line for _, line in lines])
    return Cells([line for _, line in lines], [at for at, _ in lines], "line")


def _kind_of(path: Path, place: Path) -> FileKind:
    try:
        if place.exists() and not place.is_file():
            raise DataError(f"captions {path}: not a readable UTF-8 text file (no regular file)")
        return file_kind(place)
    except (OSError, ValueError) as error:
        noun = "Parquet" if place.suffix.lower() == ".parquet" else "UTF-8 text"
        raise DataError(f"captions {path}: not a readable {noun} file ({error})") from error


def decode_text(path: Path, place: Path) -> str:
    """A file's text, without a byte order mark.

    Args:
        path: as the user named it, for messages.
        place: the same file, with `~` expanded.

    Raises:
        DataError: it is not UTF-8, or holds NUL bytes; names the line.
    """
    try:
        data = place.read_bytes()
    except OSError as error:
        raise DataError(f"captions {path}: not a readable UTF-8 text file ({error})") from error
    if data.startswith(_WIDE):
        wide = "UTF-32" if data.startswith(_WIDE[:2]) else "UTF-16"
        raise DataError(
            f"captions {path}: not a readable UTF-8 text file: it is {wide}; convert it, as with "
            f"`iconv -f {wide} -t UTF-8`"
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"captions {path}: not a readable UTF-8 text file: line "
            f"{_line_of(data, error.start)} has byte {data[error.start]:#04x} ({error.reason}); if "
            "it is in another encoding, convert it, as with `iconv -f LATIN1 -t UTF-8`"
        ) from None
    if (at := data.find(0)) >= 0:
        raise DataError(
            f"captions {path}: not a readable UTF-8 text file: line {_line_of(data, at)} has a NUL "
            "byte, which no text has"
        )
    return text


def _line_of(data: bytes, at: int) -> int:
    return len(split_lines(data[:at].decode("latin-1")))


def _caption(path: Path, cells: Cells, at: int) -> str:
    value = cells.values[at]
    where = f"captions {path}: {cells.noun} {cells.numbers[at]}"
    if cells.column:
        where = f"captions {path}: column {cells.column!r}, {cells.noun} {cells.numbers[at]}"
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: found {value!r:.80}, not text: fill it in, or leave the row out")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        lone = value[error.start]
        raise DataError(f"{where}: {lone!r} is half of a character, which no text has") from None
    return value.strip().removeprefix("\ufeff").lstrip()


def _blank_lines(cells: Cells) -> list[int]:
    """Numbers of blank lines between captions."""
    if cells.noun != "line" or cells.column:
        return []
    return sorted(set(range(1, cells.numbers[-1])) - set(cells.numbers))


def _refuse_tables(path: Path, text: str, lines: list[str]) -> None:
    """Refuse a text file that is evidently a table: its header would become a caption.

    Raises:
        DataError: says which kind, and what to call it.
    """
    kind, suffix, header = "", "", " (a table begins with a line of names)"
    if lines[0].lstrip()[:1] in ("{", "["):
        if all(_is_json(line) for line in lines[:10]):
            kind, suffix, header = "JSON Lines", ".jsonl", ""
        elif _is_json(text):
            kind, suffix, header = "JSON", ".json", ""
    tabs = {line.count("\t") for line in lines}
    if len(lines) > 1 and len(tabs) == 1 and tabs != {0}:
        kind, suffix = f"a table of {tabs.pop() + 1} columns, separated by tabs,", ".tsv"
    elif len(lines) > 1 and _is_header(lines[0], text):
        columns = "separated by commas" if "," in lines[0] else "of one column"
        kind, suffix = f"a table {columns}", ".csv"
    if kind:
        raise DataError(
            f"captions {path}: this is {kind} rather than text with one caption a line: name it "
            f"{suffix}, and its column with --column{header}"
        )


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict | list)
    except (ValueError, RecursionError):
        return False


def _is_header(line: str, text: str) -> bool:
    """Whether a line is a header with a known column. Captions with commas have both a space after
    them and several words between them; headers have at most one of the two, and then the rows
    below have as many fields."""
    names = [name.strip().strip('"').lower() for name in line.split(",")]
    if not any(name in KNOWN for name in names):
        return False
    words = all(len(name.split()) < 2 for name in names)
    return (words and ", " not in line) or ((words or ", " not in line) and _is_csv(text))


def _is_csv(text: str) -> bool:
    try:
        rows = [row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if row]
    except csv.Error:
        return False
    return len({len(row) for row in rows}) == 1


def _suffixes() -> str:
    return ", ".join((*DELIMITED, *OBJECTS))
