"""JSON that every reader takes: NaN and infinities, which it does not have, are written as null."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

MALFORMED = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
"""What reading JSON raises that is another than was written."""


def dumps(value: Any, **options: Any) -> str:
    """JSON text of plain values, of numpy's scalars, and of mappings and sequences of them.

    Args:
        options: of `json.dumps`.
    """
    return json.dumps(_plain(value), allow_nan=False, **options)


def number(value: Any) -> float:
    """A number that was read from JSON: null is NaN."""
    return math.nan if value is None else value


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value
