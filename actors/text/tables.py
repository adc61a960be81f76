"""Reads a column of captions from tables: .tsv, .csv, .json, .jsonl and Parquet.

The column is the one named, else the only one with a name of `KNOWN`; tables without a header line
are refused.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import DataError, did_you_mean
from cluster.io.files import split_lines

KNOWN = ("caption", "captions", "prompt", "prompts", "text", "texts", "sentence")
"""Column names that are recognised, in upper or lower case."""
DELIMITED, OBJECTS = (".tsv", ".csv"), (".json", ".jsonl", ".ndjson")
UNREADABLE_PARQUET = (OSError, UnicodeError, pa.ArrowException)
"""Errors of reading a Parquet file; UnicodeError: a name is not UTF-8."""
READ_AT_ONCE = 4096
SHOWN = 12  # names in a message


@dataclass(frozen=True)
class Cells:
    """One column of a table, or the texts of a list."""

    values: Sequence[object]
    numbers: Sequence[int]
    """Number of the line, item or row of each value."""
    noun: str
    """What is numbered: line, item or row."""
    column: str = ""
    """Empty where the file is a list of texts."""


class _RaggedError(Exception):
    """Rows with another number of fields than the header, or unclosed quotes."""


def choose_column(path: Path, names: Sequence[str], column: str) -> str:
    """The column to read.

    Args:
        names: of the table's columns, unstripped.
        column: empty takes the only known one.

    Raises:
        DataError: missing or twice there; or there is no single known one.
    """
    found = [name.strip() for name in names]
    columns = shown(found)
    if column:
        if column not in found:
            raise DataError(
                f"captions {path}: no column {column!r}: {did_you_mean(column, found)}"
                f"there are {columns}"
            )
        wanted = [name for name in names if name.strip() == column]
    else:
        wanted = [name for name in names if name.strip().lower() in KNOWN]
        if len({name.strip() for name in wanted}) != 1:
            raise DataError(
                f"captions {path}: a table of which it is not clear what column holds the "
                f"captions: name it with --column (conditions.column of a run); there are {columns}"
            )
    if len(wanted) > 1:
        raise DataError(
            f"captions {path}: {len(wanted)} columns are called {wanted[0].strip()!r}: rename all "
            "but one"
        )
    return wanted[0]


def delimited(path: Path, text: str, column: str, separators: str) -> Cells:
    """A column of a table with a header line.

    Fields are separated by commas (quoted as in RFC 4180, with line ends inside quotes) or tabs.
    Published .tsv files are often not quoted, so a field there is quoted only if it is from end to
    end. A .csv whose lines do not fit its header by commas is read by tabs if that fits, as
    LlamaGen's coco_captions.csv.

    Args:
        separators: to try, in this order.

    Raises:
        DataError: rows that do not fit the header, or no such column.
    """
    problems: list[str] = []
    for separator in separators:
        try:
            rows = _by_tabs(text) if separator == "\t" else _by_commas(text)
        except _RaggedError as error:
            problems.append(str(error))
            continue
        if not rows:
            raise DataError(f"captions {path}: the file holds no caption")
        header = rows[0][1]
        try:
            name = choose_column(path, header, column)
        except DataError as error:
            if problems:  # the first separator's problem says more
                break
            if separator == separators[-1] or "\t" not in "".join(header):
                raise DataError(f"{error}{_separated_otherwise(header, separator)}") from None
            problems.append(str(error))
            continue
        at, body = header.index(name), rows[1:]
        cells = [fields[at] for _, fields in body]
        return Cells(cells, [line for line, _ in body], "line", name.strip())
    advice = "Plain captions, one a line, belong in a .txt file"
    first = re.split(f"[{separators}]", split_lines(text)[0])
    if any(name.strip().strip('"').lower() in KNOWN for name in first):
        advice = "Fields that hold separators belong in quotes"
    raise DataError(
        f"captions {path}: {problems[0]}; a table begins with a line of column names, and every "
        f"row has as many fields. {advice}"
    )


def objects(path: Path, text: str, column: str) -> Cells:
    """A column of JSON: a list of texts or of objects, an object that holds such lists (COCO's
    annotations), or JSON Lines, by content, not suffix.

    Raises:
        DataError: not JSON, or without a list of captions.
    """
    try:
        found = _parsed(text)
    except ValueError as whole:
        lines = [(at, line) for at, line in enumerate(split_lines(text), 1) if line.strip()]
        if len(lines) < 2:
            raise DataError(f"captions {path}: not readable as JSON ({whole})") from None
        values = []
        for at, line in lines:
            try:
                values.append(_parsed(line))
            except ValueError as error:
                raise DataError(
                    f"captions {path}: line {at} is not readable as JSON ({error})"
                ) from None
        return _column_of(path, values, [at for at, _ in lines], "line", column)
    if isinstance(found, list):
        return _column_of(path, found, range(1, len(found) + 1), "item", column)
    if isinstance(found, dict):
        return _nested(path, found, column)
    raise DataError(f"captions {path}: a list of captions is expected, found {_kind(found)}")


def parquet(path: Path, place: Path, column: str) -> Cells:
    """A column of texts of a Parquet file.

    Raises:
        DataError: unreadable, no such column, or a column of another type.
    """
    try:
        with pq.ParquetFile(place) as file:
            name = choose_column(path, file.schema_arrow.names, column)
            kind = file.schema_arrow.field(name).type
            if not is_text(kind):
                raise DataError(f"captions {path}: column {name!r} holds {kind}, not text")
            values: list[object] = []
            for batch in file.iter_batches(batch_size=READ_AT_ONCE, columns=[name]):
                values += batch.column(0).to_pylist()
    except UNREADABLE_PARQUET as error:
        first = str(error).strip().partition("\n")[0]
        raise DataError(f"captions {path}: not a readable Parquet file ({first})") from error
    return Cells(values, range(len(values)), "row", name.strip())


def is_text(kind: pa.DataType) -> bool:
    """Whether an Arrow type is a string, plain or dictionary-encoded."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    strings = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(fits(kind) for fits in strings)


def shown(names: Iterable[str]) -> str:
    """Names in a message, the first few."""
    listed = [repr(name) for name in names]
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return ", ".join(listed[:SHOWN]) + more if listed else "none"


def _by_commas(text: str) -> list[tuple[int, list[str]]]:
    """Non-blank rows, each with the number of its first line."""
    return _quoted(text, ",")


def _by_tabs(text: str) -> list[tuple[int, list[str]]]:
    lines = enumerate(split_lines(text), 1)
    rows = [(at, line.split("\t")) for at, line in lines if line.strip()]
    begun = any(f.startswith('"') and f.count('"') % 2 for _, fields in rows for f in fields)
    try:
        _check_widths(rows)
    except _RaggedError:
        begun = True
    if begun:
        return _quoted(text, "\t")  # a quoted field may hold tabs and line ends
    return [(at, [_unquoted(field) for field in fields]) for at, fields in rows]


def _quoted(text: str, delimiter: str) -> list[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows, line = [], 1
    try:
        for fields in reader:
            if any(field.strip() for field in fields):
                rows.append((line, fields))
            line = reader.line_num + 1
    except csv.Error as error:
        raise _RaggedError(f"line {line}: {error}") from None
    _check_widths(rows)
    return rows


def _check_widths(rows: list[tuple[int, list[str]]]) -> None:
    for line, fields in rows:
        if len(fields) != len(rows[0][1]):
            raise _RaggedError(
                f"line {line} has {len(fields)} fields, the header {len(rows[0][1])}"
            )


def _unquoted(field: str) -> str:
    if len(field) > 1 and field.startswith('"') and field.endswith('"'):
        inner = field[1:-1]
        if '"' not in inner.replace('""', ""):
            return inner.replace('""', '"')
    return field


def _separated_otherwise(header: Sequence[str], separator: str) -> str:
    line = separator.join(header)
    for other, noun in ((";", "semicolons"), ("|", "bars"), ("\t", "tabs"), (",", "commas")):
        if other != separator and other in line:
            return f" (is the file separated by {noun}? Commas are read in .csv, tabs in .tsv)"
    return ""


def _parsed(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    counts = Counter(key for key, _ in pairs)
    if twice := [key for key, count in counts.items() if count > 1]:
        raise ValueError(f"an object has {twice[0]!r} twice")
    return dict(pairs)


def _column_of(
    path: Path, items: Sequence[object], numbers: Sequence[int], noun: str, column: str
) -> Cells:
    """A column of objects, or the texts of a list."""
    if not items:
        raise DataError(f"captions {path}: the file holds no caption")
    if all(isinstance(item, str) for item in items):
        if column:
            raise DataError(
                f"captions {path}: a list of texts has no column {column!r}: leave --column out"
            )
        return Cells(items, numbers, noun)
    expected = str if isinstance(items[0], str) else dict
    wrong = next((at for at, item in enumerate(items) if not isinstance(item, expected)), None)
    if wrong is not None:
        raise DataError(
            f"captions {path}: {noun} {numbers[wrong]} is {_kind(items[wrong])}: texts alone are "
            "expected, or objects alone"
        )
    rows = [item for item in items if isinstance(item, dict)]
    name = choose_column(path, list(dict.fromkeys(key for row in rows for key in row)), column)
    return Cells([row.get(name) for row in rows], numbers, noun, name)


def _nested(path: Path, found: dict[str, Any], column: str) -> Cells:
    """The list of captions inside an object: texts under the column's name, or objects with it."""
    lists = {key: value for key, value in found.items() if isinstance(value, list) and value}

    def taken(name: str) -> bool:
        return name == column if column else name.strip().lower() in KNOWN

    texts = [key for key, value in lists.items() if taken(key) and isinstance(value[0], str)]
    tables = [
        key
        for key, value in lists.items()
        if isinstance(value[0], dict) and any(map(taken, value[0]))
    ]
    if not texts and not tables and any(taken(k) and isinstance(found[k], str) for k in found):
        return _column_of(path, [found], [1], "item", column)  # JSON Lines of one line
    if len(texts) + len(tables) != 1:
        raise DataError(
            f"captions {path}: an object in which {len(texts) + len(tables)} members are lists of "
            f"captions ({f'column {column!r}' if column else 'columns ' + ', '.join(KNOWN)}): a "
            f"list is expected, of texts or of objects; there are {shown(found)}"
        )
    for key in texts:
        values = lists[key]
        return Cells(values, range(1, len(values) + 1), "item", key)
    values = lists[tables[0]]
    return _column_of(path, values, range(1, len(values) + 1), f"{tables[0]} item", column)


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", type(None): "null", bool: "a truth"}
    return names.get(type(value), "a number")
