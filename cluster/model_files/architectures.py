"""Reads architectures from files, with checks of types and sizes: without them, a wrong type would
fail deep in torch, and a million layers would take hours to build.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from cluster.errors import CheckpointError, ConfigError
from cluster.io.strict_json import dumps

T = TypeVar("T")

LARGEST = 1 << 24
_LARGEST = {"num_layers": 1024, "num_res_blocks": 64, "num_heads": 4096, "grid": 1024}
_LEVELS = 16  # resolutions of a tokenizer
_MAY_BE_ZERO = ("num_classes", "attention_levels", "num_res_blocks")


def from_fields(kind: type[T], fields: Mapping[str, Any], source: str) -> T:
    """A configuration dataclass from the fields of a file.

    Args:
        source: the file's name, for the error.

    Raises:
        CheckpointError: a field is missing, unknown, or of an impossible type or size.
    """
    known = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(fields.keys() - known.keys()):
        raise CheckpointError(
            f"{source}: architecture field {unknown[0]!r} is unknown to {kind.__name__}; was the "
            "file written by a newer version?"
        )
    values = {name: _hashable(value) for name, value in fields.items()}
    for name, value in values.items():
        zero = known[name].default in (0, None) or name in _MAY_BE_ZERO
        if fault := _fault(name, value, least=0 if zero else 1):
            raise CheckpointError(f"{source}: architecture field {name!r} {fault}")
    try:
        return TypeAdapter(kind).validate_json(dumps(values), strict=True)
    except ConfigError as error:
        raise CheckpointError(f"{source}: an impossible architecture: {error}") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"])) or "architecture"
        raise CheckpointError(
            f"{source}: an incomplete or impossible architecture: {place}: {first['msg']}"
        ) from error
    except (TypeError, ValueError, ArithmeticError, RecursionError) as error:
        raise CheckpointError(f"{source}: an impossible architecture ({error})") from error


def _fault(name: str, value: Any, least: int) -> str:
    """What is wrong with a number or a tuple of numbers; empty if nothing is."""
    if isinstance(value, tuple):
        if not value and name not in _MAY_BE_ZERO:
            return "is empty, expected one number or more"
        if len(value) > _LEVELS:
            return f"has {len(value)} entries, expected at most {_LEVELS}"
        return next((fault for part in value if (fault := _fault(name, part, least))), "")
    if isinstance(value, float) and not (math.isfinite(value) and value > 0):
        return f"is {value}, expected a positive number"
    most = _LARGEST.get(name, LARGEST)
    if isinstance(value, int) and not isinstance(value, bool) and not least <= value <= most:
        return f"is {value}, expected {least} to {most}"
    return ""


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
