"""Label selectors of Ray: which nodes a worker may run on, by the labels of the nodes.

tessera-role=sampler      has this value
gpu=in(H100,H200)         has one of these
market-type=!spot         has not this value, or no such label; so has !in(a,b)
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated

from tyro.constructors import PrimitiveConstructorSpec

NAME = r"[a-zA-Z0-9](?:[a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"
KEY = re.compile(rf"(?:{NAME}(?:\.{NAME})*/)?{NAME}")
PREFIX_LENGTH = 253
VALUE = re.compile(rf"(?P<no>!?)(?:in\((?P<many>{NAME}(?:, ?{NAME})*)\)|(?P<one>{NAME}))")
FORMS = "VALUE, in(A,B), !VALUE or !in(A,B)"


def check_selector(selector: Mapping[str, str], name: str = "labels") -> None:
    """
    Args:
        name: of the option, for errors.

    Raises:
        ValueError: a key or value that Ray would not take.
    """
    for key, value in selector.items():
        if not KEY.fullmatch(key) or len(key.rpartition("/")[0]) > PREFIX_LENGTH:
            raise ValueError(
                f"{name}: {key!r} is no key of a label: at most 63 letters, digits, '-', '_' and "
                "'.', a letter or digit at both ends, perhaps behind a prefix as in "
                "example.com/NAME"
            )
        if not VALUE.fullmatch(value):
            raise ValueError(
                f"{name}: {key} must be {FORMS}, of values of at most 63 letters, digits, '-', "
                f"'_' and '.', found {value!r}"
            )


def unmet(selector: Mapping[str, str], labels: Mapping[str, str]) -> str:
    """The first part of a selector that a node's labels do not meet; empty if they meet all."""
    return next(
        (f"{key}={value}" for key, value in selector.items() if not _meets(value, labels.get(key))),
        "",
    )


def _meets(value: str, found: str | None) -> bool:
    parts = VALUE.fullmatch(value)
    assert parts is not None, f"{value!r} was not checked"
    named = {each.strip() for each in (parts["many"] or parts["one"]).split(",")}
    return (found in named) != bool(parts["no"])


def written(selector: Mapping[str, str]) -> str:
    """A selector as the command line has it."""
    return " ".join(f"{key}={value}" for key, value in selector.items())


def _from_words(words: Sequence[str]) -> dict[str, str]:
    """The selector that KEY=VALUE words make.

    Raises:
        ValueError: a word is none, or a key comes twice.
    """
    found: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not (equals and key and value):
            raise ValueError(f"expected KEY=VALUE, as in tessera-role=sampler, found {word!r}")
        if key in found:
            raise ValueError(f"{key} is there twice: name several values as {key}=in(A,B)")
        found[key] = value
    return found


LabelSelector = Annotated[
    Mapping[str, str],
    PrimitiveConstructorSpec(
        nargs="*",
        metavar="KEY=VALUE ...",
        instance_from_str=_from_words,
        is_instance=lambda value: isinstance(value, Mapping),
        str_from_instance=lambda selector: [f"{key}={value}" for key, value in selector.items()],
    ),
]
"""Key -> value of a selector; on a command line KEY=VALUE ..."""
