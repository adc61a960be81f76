"""Short help of commands with many options: the common options, and how to list the others.

It is made from the dataclasses of the options: names and types from fields, defaults from an
instance, texts from the strings below the fields.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import re
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

SHORT, ALL = ("-h", "--help"), "--help-all"
INDENT, TEXT = 2, 34  # columns where an option and its text begin
WIDEST = 100
SENTENCE_END = re.compile(r"(?<!e\.g)(?<!\.\.)[.;] ")
INNER = re.compile(r'\([^()]*\)|"[^"]*"|`[^`]*`')  # brackets and quotes: no end in them


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of a command line."""

    flag: str
    metavar: str
    """Empty for a switch."""
    default: str
    text: str


Groups = Mapping[str, Sequence[str]]
"""Heading -> flags below it."""


def asks_help(arguments: Sequence[str] | None) -> bool:
    """Whether a command line (None: the process's) has an option for help."""
    given = sys.argv[1:] if arguments is None else arguments
    return any(word in given for word in (*SHORT, ALL))


def answer_help(
    arguments: Sequence[str] | None, prog: str, about: str, groups: Groups, *options: Any
) -> list[str]:
    """Print the short help and exit where --help is asked for.

    Args:
        arguments: None is the process's.
        about: what the command does.
        options: instances of the dataclasses that define the options.

    Returns:
        The arguments, with --help in the place of --help-all: tyro prints every option.

    Raises:
        SystemExit: after printing.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if ALL in given:
        return ["--help"]
    if asks_help(given):
        _print(prog, about, groups, options)
    return given


def _print(prog: str, about: str, groups: Groups, options: Sequence[Any]) -> NoReturn:
    width = min(shutil.get_terminal_size().columns, WIDEST)
    print(short_help(prog, about, groups, options, width))
    raise SystemExit(0)


def short_help(
    prog: str, about: str, groups: Groups, options: Sequence[Any], width: int = 80
) -> str:
    """The text of a short help, lines of at most `width` columns."""
    known = {option.flag: option for value in options for option in options_of(value)}
    lines = [f"usage: {prog} [OPTIONS]", "", *textwrap.wrap(about, width)]
    for heading, flags in groups.items():
        lines += ["", f"{heading}:"]
        for flag in flags:
            lines += _lines(known[flag], width)
    hidden = len(known) - sum(len(flags) for flags in groups.values())
    lines += ["", f"{ALL} shows every option ({hidden} more)."]
    return "\n".join(lines)


def _lines(option: Option, width: int) -> list[str]:
    left = " " * INDENT + f"{option.flag} {option.metavar}".rstrip()
    text = option.text if not option.default else f"{option.text} ({option.default})"
    wrapped = textwrap.wrap(text, width - TEXT)
    if len(left) >= TEXT:
        return [left, *(" " * TEXT + line for line in wrapped)]
    first = left.ljust(TEXT) + (wrapped[0] if wrapped else "")
    return [first, *(" " * TEXT + line for line in wrapped[1:])]


def options_of(value: Any, prefix: str = "") -> list[Option]:
    """All options of a dataclass's instance, nested ones with dots."""
    found: list[Option] = []
    kind: type = type(value)
    texts = _texts(kind)
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        name, held = f"{prefix}{field.name.replace('_', '-')}", getattr(value, field.name)
        if dataclasses.is_dataclass(held):
            found += options_of(held, f"{name}.")
        else:
            text = _first_sentence(texts.get(field.name, ""))
            found.append(Option(f"--{name}", _metavar(hints[field.name]), _shown(held), text))
    return found


def _metavar(hint: Any) -> str:
    if hint is bool:
        return ""
    if get_origin(hint) is Literal:
        return "|".join(str(choice) for choice in get_args(hint))
    names = {int: "N", float: "X", str: "TEXT", Path: "PATH"}
    if get_origin(hint) is tuple:
        return f"{names.get(get_args(hint)[0], 'TEXT')} ..."
    kinds = [kind for kind in (get_args(hint) or (hint,)) if kind in names]
    return names[kinds[0]] if kinds else "VALUE"


def _shown(value: Any) -> str:
    """A default; empty if the option is unset."""
    if value is None or value is False or value in ("", (), Path()):
        return ""
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _first_sentence(text: str) -> str:
    """Text up to the first full stop or semicolon, without brackets at its end."""
    flat = " ".join(text.split())
    end = SENTENCE_END.search(INNER.sub(lambda found: "_" * len(found[0]), flat))
    sentence = (flat[: end.start()] if end else flat).rstrip(".")
    return re.sub(r" \([^()]*\)$", "", sentence)


@functools.cache
def _texts(kind: type) -> dict[str, str]:
    """Field name -> the string below it, of a dataclass and those that it inherits from."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for item, after in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(item, ast.AnnAssign)
                and isinstance(item.target, ast.Name)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
            ):
                found[item.target.id] = str(after.value.value)
    return found
