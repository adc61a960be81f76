"""Upper bounds of numeric options: beyond them, numbers that are computed overflow."""

from __future__ import annotations

from typing import Any


def check_at_most(config: Any, **limits: float) -> None:
    """Refuse fields above their limits, and those that are no numbers (NaN).

    Args:
        limits: field -> largest value.

    Raises:
        ValueError: names the field, its limit, and what was found.
    """
    for name, limit in limits.items():
        value = getattr(config, name)
        if not value <= limit:
            raise ValueError(f"{name} must be at most {limit:g}, found {value!s:.40}")
