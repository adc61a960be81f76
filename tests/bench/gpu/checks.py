"""The checks, in the order in which they run: what shows most comes first.

With a hang of any, the rest still fits the default time, if each takes a third of its limit.
Imports nothing beyond the standard library: the checks themselves are imported by a worker.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Check:
    """One check: a function of a `Scene`, on its own."""

    name: str
    function: str
    """module:function within this package."""
    limit_s: float
    """Longest time; then it is stopped. About three times what it should take."""
    quick: bool = False
    """Also with `--quick`."""
    extra: bool = False
    """With `--official`, or by name."""
    alone: bool = False
    """In a process of its own: it sets what holds for a whole process."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Set before its process starts."""


CHECKS = (
    Check("card", "card:card", 40, quick=True),
    Check("kernels", "kernels:kernels", 75, quick=True),
    Check("backends", "kernels:backends", 40, quick=True),
    Check("logprobs", "decoding:logprobs", 75, quick=True),
    Check("decode", "speed:decode_speed", 75, quick=True),
    Check("repeat", "decoding:repeat", 45),
    Check("beside", "decoding:beside", 45),
    Check("weights", "learning:weights", 45, quick=True),
    Check("images", "scoring:images", 40, quick=True),
    Check("step", "learning:step", 100, quick=True),
    Check("iteration", "whole:iteration", 75),
    Check("scorers", "scoring:scorers", 75),
    Check(
        "reproducible",
        "learning:reproducible",
        75,
        alone=True,
        environment={"CUBLAS_WORKSPACE_CONFIG": ":4096:8"},
    ),
    Check("miniature", "whole:miniature", 60),
    Check("loo_fid", "scoring:loo_fid", 45),
    Check("tests", "whole:marked_tests", 135),
    Check("public", "public:public", 120, extra=True),
)
BY_NAME = {check.name: check for check in CHECKS}
