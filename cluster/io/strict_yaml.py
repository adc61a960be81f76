"""Strict YAML: refuses duplicate keys, octal (`010`) and base-60 (`1:30`) numbers, which PyYAML
accepts, and turns every error into `MalformedYamlError`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

DEEPEST = 64
"""Levels of nesting; no configuration has ten."""
MOST = 200_000
"""Values in all, with aliases expanded: nested aliases grow exponentially."""
_INT = "tag:yaml.org,2002:int"
_FLOAT = "tag:yaml.org,2002:float"
_OCTAL = re.compile(r"[-+]?0[0-9_]+")
_BASE_60 = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")


class MalformedYamlError(ValueError):
    """Says where in the text, what was found, and how to fix it."""


def load(text: str) -> Any:
    """Parse one YAML 1.1 document, safe tags only, into plain values.

    Raises:
        MalformedYamlError: invalid YAML, a duplicate key, a number in base 8 or 60, too deeply
            nested, or too large.
    """
    try:
        value = _Loader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        said = ", ".join(part for part in (error.context, error.problem) if part)
        raise MalformedYamlError(f"{where}{said}") from None
    except yaml.YAMLError as error:
        raise MalformedYamlError(" ".join(str(error).split())) from None
    except RecursionError:
        raise MalformedYamlError("nested too deeply") from None
    except (ValueError, IndexError, KeyError, AttributeError, TypeError) as error:
        # What PyYAML makes of `2001-99-99` (no such month), `!!int ""`, `!!timestamp x`.
        said = " ".join(str(error).split()) or type(error).__name__
        raise MalformedYamlError(f"a value cannot be read ({said})") from None
    _check_size(value)
    return value


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, with the checks of this module."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        if isinstance(node, yaml.MappingNode):
            seen: dict[tuple[str, str], Any] = {}
            for key, _ in node.value:  # before `<<` brings in more: keys may override those
                if not isinstance(key, yaml.ScalarNode):
                    continue
                name = (key.tag, key.value)
                if name in seen:
                    first = seen[name].start_mark.line + 1
                    raise yaml.MarkedYAMLError(
                        problem=f"the key {key.value!r} is there twice, the first is in line "
                        f"{first}: keep one",
                        problem_mark=key.start_mark,
                    )
                seen[name] = key
        return super().construct_mapping(node, deep)

    def construct_number(self, node: Any) -> int | float:
        text = str(node.value)
        if _BASE_60.fullmatch(text):
            raise yaml.MarkedYAMLError(
                problem=f"YAML reads {text} as a number to the base 60: put it in quotes, or write "
                "the number",
                problem_mark=node.start_mark,
            )
        if node.tag == _INT and _OCTAL.fullmatch(text):
            decimal = text.lstrip("+-0_") or "0"
            raise yaml.MarkedYAMLError(
                problem=f"YAML reads {text} as an octal number: write {decimal}, or put it in "
                "quotes if it is a name",
                problem_mark=node.start_mark,
            )
        if node.tag == _INT:
            return self.construct_yaml_int(node)
        return self.construct_yaml_float(node)


_Loader.add_constructor(_INT, _Loader.construct_number)
_Loader.add_constructor(_FLOAT, _Loader.construct_number)


def _check_size(value: Any) -> None:
    left = MOST
    waiting = [(value, 0)]
    while waiting:
        part, depth = waiting.pop()
        left -= 1
        if depth > DEEPEST or left < 0:
            raise MalformedYamlError("nested too deeply, or aliases within aliases without end")
        if isinstance(part, Mapping):
            waiting += [(inner, depth + 1) for inner in part.values()]
        elif isinstance(part, list | tuple | set):
            waiting += [(inner, depth + 1) for inner in part]
