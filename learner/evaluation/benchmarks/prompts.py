"""Prompts of text-to-image benchmarks, read from the files that the benchmarks publish.

Their scripts find prompts by position in a file, so no line is skipped and none is merged: blank
lines between prompts are refused, and prompts that repeat others keep their place.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.text.captions import decode_text
from actors.text.tables import DELIMITED, Cells, delimited, objects
from cluster.errors import DataError
from cluster.io.files import split_lines
from cluster.io.paths import expand_user
from cluster.text_limits import shortened

STYLES = ("anime", "concept-art", "paintings", "photo")
"""HPSv2's benchmark: one JSON file each."""
CATEGORIES = ("color", "shape", "texture", "spatial", "3d_spatial", "numeracy", "non_spatial",
              "complex")  # fmt: skip
"""T2I-CompBench++: one file each, NAME_val.txt for its scores."""
LONGEST_NAME = 255 - len("_000000.png")  # bytes: file systems allow 255 in a name


@dataclass(frozen=True)
class Prompt:
    """A prompt of a benchmark."""

    text: str
    number: int
    """Position in its file, from 0."""
    part: str = ""
    """The style or category that its file is of, where a benchmark has several files."""
    name: str = ""
    """DPG-Bench: the name of its file, without the ending."""
    tags: tuple[tuple[str, str], ...] = ()
    """What its scores are averaged by: (kind, value), as ("challenge", "Quantity")."""
    record: str = ""
    """GenEval: its line, which the evaluation reads beside the images."""


def read_geneval(path: Path) -> list[Prompt]:
    """Prompts of evaluation_metadata.jsonl: one JSON object a line, with tag, include, prompt.

    Raises:
        DataError: names the first line that is something else.
    """
    prompts = []
    for at, line in _lines(path):
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            found = None
        if not _is_geneval(found):
            raise DataError(
                f"{path}: line {at}: expected a JSON object with the texts prompt and tag and the "
                f"list include, of objects with class and count (evaluation_metadata.jsonl of "
                f"GenEval), found {shortened(line)!r}"
            )
        tags = (("tag", found["tag"]),)
        prompts.append(Prompt(_checked(path, f"line {at}", found["prompt"]), at - 1, tags=tags,
                              record=line.strip()))  # fmt: skip
    return prompts


def _is_geneval(found: Any) -> bool:
    if not isinstance(found, dict):
        return False
    texts = all(isinstance(found.get(key), str) for key in ("prompt", "tag"))
    wanted = found.get("include")
    return (
        texts
        and isinstance(wanted, list)
        and all(isinstance(each, dict) and {"class", "count"} <= each.keys() for each in wanted)
    )


def read_dpg(path: Path) -> list[Prompt]:
    """Prompts of the folder dpg_bench/prompts: one .txt file each, whose name is the prompt's id.

    Raises:
        DataError: no folder, or one that holds other files.
    """
    folder = expand_user(path)
    expected = "expected the folder dpg_bench/prompts of DPG-Bench, one .txt file for each prompt"
    if not folder.is_dir():
        raise DataError(f"{path}: {expected}, found {_missing_or(folder, 'a file')}")
    files = sorted(file for file in folder.iterdir() if not file.name.startswith("."))
    if other := next((each.name for each in files if each.suffix != ".txt"), ""):
        raise DataError(f"{path}: {expected}, found {other!r} in it")
    if not files:
        raise DataError(f"{path}: {expected}, found an empty folder")
    prompts = []
    for number, file in enumerate(files):
        if "." in file.stem:
            raise DataError(
                f"{file}: the evaluation takes an image's name up to its first dot as the prompt's "
                "id, and this one has a further dot: rename it"
            )
        words = " ".join(filter(None, map(str.strip, split_lines(decode_text(file, file)))))
        source = re.match(r"[A-Za-z]+(?=\d|$)|", file.stem)
        tags = (("source", source[0] if source and source[0] else "none"),)
        prompts.append(Prompt(_checked(file, "the file", words), number, name=file.stem, tags=tags))
    return prompts


def read_compbench(path: Path) -> list[Prompt]:
    """Prompts of a category's file (color_val.txt), or of all NAME_val.txt in a folder.

    Raises:
        DataError: a file of no category, or a prompt that cannot be part of a file's name, from
            which the evaluation reads it.
    """
    place = expand_user(path)
    files = [path]
    if place.is_dir():
        files = [path / f"{name}_val.txt" for name in CATEGORIES]
        files = [file for file in files if expand_user(file).is_file()]
        if not files:
            raise DataError(
                f"{path}: expected {', '.join(f'{name}_val.txt' for name in CATEGORIES)} or some "
                "of them (examples/dataset of T2I-CompBench), found none"
            )
    return [prompt for file in files for prompt in _category(file)]


def _category(path: Path) -> Iterable[Prompt]:
    stem = re.sub(r"(_train|_val(_seen|_unseen)?)?$", "", path.stem)
    if stem not in CATEGORIES or path.suffix != ".txt":
        raise DataError(
            f"{path}: expected a file of one category, which its name says ({', '.join(CATEGORIES)}"
            f": {CATEGORIES[0]}_val.txt), since the evaluation depends on it"
        )
    for at, line in _lines(path):
        where = f"line {at}"
        if line.lstrip()[:1] in ("{", "[") or "\t" in line:
            raise DataError(
                f"{path}: {where}: expected a prompt, found JSON or a table: {shortened(line)!r}"
            )
        text = _checked(path, where, line)
        for mark in ("/", "_", ".png"):
            if mark in text:
                raise DataError(
                    f"{path}: {where} holds {mark!r}: the evaluation reads the prompt from the "
                    f"image's name, in which it would end there: write it without, found "
                    f"{shortened(text)!r}"
                )
        if (size := len(text.encode())) > LONGEST_NAME:
            raise DataError(
                f"{path}: {where}: the prompt is part of the image's name, which leaves "
                f"{LONGEST_NAME} bytes for it, found {size}: shorten {shortened(text)!r}"
            )
        yield Prompt(text, at - 1, part=stem, tags=(("category", stem),))


def read_hpsv2(path: Path) -> list[Prompt]:
    """Prompts of a folder with anime.json, concept-art.json, paintings.json and photo.json, or of
    one of these: a JSON list of texts.

    Raises:
        DataError: a style is missing, or a file is something else.
    """
    place = expand_user(path)
    files = [path / f"{style}.json" for style in STYLES] if place.is_dir() else [path]
    for file in files:
        if file.stem not in STYLES or not expand_user(file).is_file():
            raise DataError(
                f"{path}: expected the folder with {', '.join(f'{each}.json' for each in STYLES)} "
                f"of HPSv2's benchmark, or one of these files, found "
                f"{f'no {file.name} in it' if place.is_dir() else _missing_or(place, 'another')}"
            )
    return [
        Prompt(text, number, part=file.stem, tags=(("style", file.stem),))
        for file in files
        for number, text in enumerate(_listed(file))
    ]


def read_parti(path: Path) -> list[Prompt]:
    """Prompts of PartiPrompts.tsv: columns Prompt, Category and Challenge.

    Raises:
        DataError: not such a table.
    """
    return _table(path, ".tsv", "Prompt", ("Category", "Challenge"), "PartiPrompts.tsv")


def read_drawbench(path: Path) -> list[Prompt]:
    """Prompts of DrawBench: a .csv with columns Prompts and Category, or HPSv2's drawbench.json.

    Raises:
        DataError: neither.
    """
    if path.suffix == ".json":
        return [Prompt(text, number) for number, text in enumerate(_listed(path))]
    return _table(path, ".csv", "Prompts", ("Category",), "DrawBench's table")


def _table(path: Path, suffix: str, column: str, kinds: Sequence[str], known: str) -> list[Prompt]:
    """A column of prompts, and columns of what they are averaged by."""
    names = (column, *kinds)
    expected = f"expected {known}, a {suffix} table with the columns {', '.join(names)}"
    if path.suffix.lower() not in DELIMITED:
        found = _missing_or(expand_user(path), f"a file that ends in {path.suffix or 'nothing'}")
        raise DataError(f"{path}: {expected}, found {found}")
    text = _text(path)
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        columns = [delimited(path, text, name, separator) for name in names]
    except DataError as error:
        raise DataError(f"{path}: {expected}: {error}") from None
    prompts = []
    for number in range(len(columns[0].values)):
        cells = [_cell(path, each, number) for each in columns]
        tags = tuple(zip(map(str.lower, kinds), cells[1:], strict=True))
        prompts.append(Prompt(cells[0], number, tags=tags))
    if not prompts:
        raise DataError(f"{path}: {expected}, found a header alone")
    return prompts


def _cell(path: Path, cells: Cells, at: int) -> str:
    return _checked(path, f"{cells.noun} {cells.numbers[at]}, {cells.column}", cells.values[at])


def _listed(path: Path) -> list[str]:
    """Texts of a JSON list."""
    cells = objects(path, _text(path), "")
    if cells.column or cells.noun != "item":
        raise DataError(f"{path}: expected a JSON list of texts, found another kind of JSON")
    return [
        _checked(path, f"item {number}", value)
        for number, value in zip(cells.numbers, cells.values, strict=True)
    ]


def _lines(path: Path) -> list[tuple[int, str]]:
    """Numbered lines up to the last that is not blank.

    Raises:
        DataError: there is none, or a blank one between others.
    """
    lines = split_lines(_text(path).rstrip())
    for at, line in enumerate(lines, 1):
        if not line.strip():
            raise DataError(
                f"{path}: line {at} is blank; the benchmark's scripts find prompts by the number "
                "of their line: remove it, or fill it in"
            )
    return list(enumerate(lines, 1))


def _text(path: Path) -> str:
    place = expand_user(path)
    if not place.is_file():
        raise DataError(f"{path}: expected a file of prompts, found {_missing_or(place, 'that')}")
    text = decode_text(path, place)
    if not text.strip():
        raise DataError(f"{path}: expected prompts, found an empty file")
    return text


def _missing_or(place: Path, otherwise: str) -> str:
    if place.is_dir():
        return "a folder"
    return otherwise if place.exists() else "nothing there"


def _checked(path: Path, where: str, value: object) -> str:
    """A prompt or tag, stripped.

    Raises:
        DataError: no text, or one without a letter to see.
    """
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{path}: {where}: expected text, found {value!r:.80}")
    return value.strip()
