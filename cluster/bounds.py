"""Upper bounds of numeric options, beyond which computed numbers would overflow."""

from __future__ import annotations

from typing import Any


def check_at_most(config: Any, **limits: float) -> None:
    """Refuse fields above their limits, and NaN.

    Args:
        limits: field -> largest value.

    Raises:
        ValueError: names the field, its limit, and its value.
    """
    for name, limit in limits.items():
        value = getattr(config, name)
        if not value <= limit:
            raise ValueError(f"{name} must be at most {limit:g}, found {value!s:.40}")
