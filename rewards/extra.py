"""A user's own rewards, by dotted path: `my_pkg.rewards:Aesthetic=0.5,normalise=batch`.

The class is built as `Aesthetic(device="cuda", ...)` inside the reward servers that run it, and
called with images and conditions, as every scorer is (`rewards.base.Scorer`).
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, get_args

import yaml

from cluster.errors import ConfigError
from rewards.base import Scorer
from rewards.combine import Normalisation, ScorerTerm

SYNTAX = "module:Class=weight[,option=value...]"
PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
SECRET_OPTION = re.compile(r"(^|_)(api_?key|token|secret|password)$", re.IGNORECASE)
OF_THE_TERM = ("normalise", "limit", "pool")


@dataclass(frozen=True, kw_only=True)
class ExtraReward:
    """One of them, parsed."""

    name: str
    """Under which it is logged."""
    path: str
    term: ScorerTerm
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the constructor."""


def parse_extra(text: str) -> ExtraReward:
    """`module:Class=weight`, then options: `name`, `normalise`, `limit` and `pool` are the term's;
    others go to the constructor, their values read as YAML.

    Raises:
        ValueError: says what is wrong with the text.
    """
    path, equals, rest = text.strip().partition("=")
    if not PATH.fullmatch(path):
        raise ValueError(f"a reward by dotted path is written {SYNTAX}, found {text!r}")
    weight, *pairs = rest.split(",") if equals else ["1"]
    values = {"weight": weight}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip().isidentifier():
            raise ValueError(f"{text!r}: expected option=value, found {pair!r}")
        values[key.strip()] = value
    hidden = [key for key in values if SECRET_OPTION.search(key)]
    if hidden:
        raise ValueError(
            f"{path}: the option {hidden[0]} looks like a secret, and would be written into the "
            "run directory: read it from the environment instead (env_vars of a pool's "
            "runtime_env, written ${NAME})"
        )
    read = {key: yaml.safe_load(value) for key, value in values.items()}
    for key in ("weight", "limit"):
        value = read.get(key, 0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
            raise ValueError(f"{text!r}: the {key} must be a number, found {values[key]!r}")
    name = str(read.pop("name", _snake(path.rpartition(":")[2])))
    term = {key: read.pop(key) for key in ("weight", *OF_THE_TERM) if key in read}
    return ExtraReward(name=name, path=path, term=_term(text, term), options=read)


def find_extra(extra: ExtraReward) -> Callable[..., Any]:
    """Import what builds it, without building it.

    Raises:
        ConfigError: it cannot be imported, is no class or function, or refuses its options.
    """
    module, _, qualified = extra.path.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in qualified.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"rewards.extra: {extra.path} cannot be imported where reward servers run: {error}. Is "
            "its package installed there, or in the directory that the run was started from?"
        ) from error
    try:
        inspect.signature(found).bind(device="cpu", **extra.options)
    except TypeError as error:
        given = ", ".join(["device", *extra.options])
        raise ConfigError(
            f"rewards.extra: {extra.path} is called with ({given}) to build the scorer, but {error}"
        ) from error
    return found


def load_extra(extra: ExtraReward, device: str) -> Scorer:
    """Import and build it.

    Raises:
        ConfigError: see `find_extra`; or what it gives cannot be called.
    """
    scorer = find_extra(extra)(device=device, **extra.options)
    if not callable(scorer):
        raise ConfigError(
            f"rewards.extra: {extra.path} gives a {type(scorer).__name__}, which cannot be called "
            "with images and conditions: define __call__(self, images, conditions)"
        )
    return scorer


def _term(text: str, values: Mapping[str, Any]) -> ScorerTerm:
    normalise = values.get("normalise", "group")
    if normalise not in get_args(Normalisation):
        raise ValueError(f"{text!r}: normalise must be one of {', '.join(get_args(Normalisation))}")
    try:
        return ScorerTerm(**{**values, "pool": str(values.get("pool", ""))})
    except ValueError as error:
        raise ValueError(f"{text!r}: {error}") from None


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.rpartition(".")[2]).lower()
