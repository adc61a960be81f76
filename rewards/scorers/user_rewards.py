"""User rewards: by dotted path, `my_pkg.rewards:Aesthetic=0.5,normalise=batch`, or in a file,
`./my_rewards.py:Aesthetic=0.5`.

Reward servers build the class as `Aesthetic(device="cuda", ...)` and call it with images and
conditions, as every scorer (`rewards.base.Scorer`).
"""

from __future__ import annotations

import importlib
import inspect
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Any, get_args

import numpy as np
import torch

from cluster.errors import ConfigError, did_you_mean
from cluster.io import strict_yaml
from cluster.io.strict_yaml import MalformedYamlError
from cluster.messages import Condition
from cluster.model_files.torchvision_ops import ensure_torchvision
from cluster.own_packages import NAMES
from cluster.preflight import Findings
from rewards.base import Images
from rewards.combine import Normalisation
from rewards.scorers.config import ScorerTerm
from rewards.scorers.isolation import Isolation, describe, of_the_user
from rewards.scorers.user_reward_files import RewardFile, import_file, read_file

SYNTAX = "module:Class=weight[,option=value...]"
DOTTED = re.compile(r"(?P<path>[A-Za-z_][\w.]*:[A-Za-z_][\w.]*)(=(?P<rest>.*))?", re.DOTALL)
IN_FILE = re.compile(
    r"(?P<path>(?P<file>.+?\.py):[A-Za-z_][\w.]*)(=(?P<rest>.*))?", re.DOTALL
)  # of any name: with spaces, commas, equals signs
SECRET_OPTION = re.compile(r"(^|_)(api_?key|token|secret|password)$", re.IGNORECASE)
OF_THE_TERM = ("normalise", "limit", "pool")
SHOWN = 5  # names


@dataclass(frozen=True, kw_only=True)
class UserReward(ScorerTerm):
    """A parsed entry of `rewards.extra`."""

    name: str
    """In logs and metrics."""
    path: str
    """Module or file, a colon, and the class in it."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the constructor."""
    file: str = ""
    """The file as the user wrote it; empty: the path is a module's."""
    kept: RewardFile | None = None
    """The file as it was when the run began; None: read it where the scorer is built."""

    def load(self, device: str) -> UserScorer:
        return load_user_reward(self, device)

    def check(self, field: str, findings: Findings) -> None:
        with findings.of("rewards.extra"):
            import_user_reward(self)


def parse_user_reward(text: str) -> UserReward:
    """Parse `module:Class=weight[,option=value...]`; `name`, `normalise`, `limit` and `pool` are
    the reward's, other options go to the constructor. Values are YAML.

    Raises:
        ValueError: says what is wrong with the text.
    """
    found = IN_FILE.fullmatch(text.strip()) or DOTTED.fullmatch(text.strip())
    if found is None:
        raise ValueError(
            f"a reward by dotted path is written {SYNTAX}, one in a file with ./name.py in the "
            f"place of the module, found {text!r}"
        )
    path, rest = found["path"], found["rest"]
    weight, *pairs = ["1"] if rest is None else rest.split(",")
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
    read = {key: _value(text, key, value) for key, value in values.items()}
    for key in ("weight", "limit"):
        value = read.get(key, 0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
            raise ValueError(f"{text!r}: the {key} must be a number, found {values[key]!r}")
    name = str(read.pop("name", _snake(path.rpartition(":")[2])))
    term = {key: read.pop(key) for key in ("weight", *OF_THE_TERM) if key in read}
    if term.get("normalise", "group") not in get_args(Normalisation):
        raise ValueError(f"{text!r}: normalise must be one of {', '.join(get_args(Normalisation))}")
    term["pool"] = str(term.get("pool", ""))
    file = found.groupdict().get("file") or ""
    try:
        return UserReward(name=name, path=path, options=read, file=file, **term)
    except ValueError as error:
        raise ValueError(f"{text!r}: {error}") from None


def _value(text: str, key: str, value: str) -> Any:
    """A value read as YAML."""
    try:
        return strict_yaml.load(value)
    except MalformedYamlError as error:
        raise ValueError(
            f"{text!r}: the {key} {value!r} cannot be read as YAML ({error}): put it in quotes (a "
            "comma begins the next option)"
        ) from None


class UserScorer:
    """A user's scorer, isolated from the rest of its process: it gets copies of images and
    conditions, its result is copied, and process-wide settings are restored after each call
    (`rewards.scorers.isolation`).

    The global random generators are seeded from the images, so that a retry on any server draws
    the same numbers.
    """

    def __init__(self, extra: UserReward, scorer: Callable[..., Any], isolated: Isolation) -> None:
        self._extra, self._scorer, self._isolated = extra, scorer, isolated

    def warm(self) -> None:
        """Call the scorer's `warm()`, if it has one.

        Raises:
            ConfigError: `warm()` fails.
        """
        with (
            _building(self._extra, "failed in its warm()"),
            self._isolated(_seed(self._extra.path)),
        ):
            warm = getattr(self._scorer, "warm", None)
            if warm is not None:
                warm()

    def __call__(self, images: Images, conditions: Sequence[Condition]) -> np.ndarray:
        """N uint8 images and N conditions -> the scorer's result as float32, not checked."""
        single = isinstance(images, np.ndarray)
        own = np.array(images) if single else [np.array(image) for image in images]
        copies = {id(condition): _copy(condition) for condition in conditions}
        asked = [copies[id(condition)] for condition in conditions]
        seed = 0
        for image, condition in zip(own, conditions):
            seed = zlib.crc32(image.tobytes(), zlib.crc32(condition.text.encode(), seed))
        with self._isolated(seed):
            values = self._scorer(own, asked)
            if isinstance(values, torch.Tensor):
                values = values.detach().to("cpu", torch.float32).numpy()
            return np.array(values, dtype=np.float32)


def _copy(condition: Condition) -> Condition:
    features = condition.features
    return replace(condition, features=None if features is None else np.array(features))


def _seed(text: str) -> int:
    return zlib.crc32(text.encode())


@contextmanager
def _building(extra: UserReward, what: str, hint: str = "") -> Iterator[None]:
    """Turns any exception of user code into a ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except BaseException as error:
        if of_the_user(error):
            raise
        raise ConfigError(f"rewards.extra: {extra.path} {what}: {describe(error)}{hint}") from error


def import_user_reward(extra: UserReward, isolated: Isolation | None = None) -> Callable[..., Any]:
    """Import the class or function of a user reward and check its signature; nothing is built.

    Raises:
        ConfigError: not importable, not callable, or wrong signatures.
    """
    isolated = isolated or Isolation()
    module, _, qualified = extra.path.rpartition(":")
    ensure_torchvision()  # what it imports may import torchvision
    with (
        _building(extra, "cannot be imported where reward servers run", _hint(extra, module)),
        isolated(_seed(extra.path)),
    ):
        found: Any = _module(extra, module)
        for part in qualified.split("."):
            found = _member(extra, module, found, part)
    with _building(extra, "cannot be inspected"), isolated(_seed(extra.path)):
        _check_call(extra, found)
    return found


def _hint(extra: UserReward, module: str) -> str:
    """What to do if the import fails."""
    if extra.file:
        return (
            ". Only this file is sent to the servers: is what it imports installed there? Files "
            "beside it are not sent: make a package of them, and name it by its dotted path"
        )
    if (package := module.partition(".")[0]) in NAMES:
        return (
            f". {package!r} is a package of this program: rename yours, or name it by its file, "
            f"./{package}.py:{extra.path.rpartition(':')[2]}"
        )
    return ". Is its package installed there, or in the directory that the run was started from?"


def _member(extra: UserReward, module: str, owner: Any, name: str) -> Any:
    """An attribute of a module or class.

    Raises:
        ConfigError: missing; names close ones.
    """
    try:
        return getattr(owner, name)
    except AttributeError:
        home = getattr(owner, "__name__", None)
        own = sorted(
            key
            for key, value in getattr(owner, "__dict__", {}).items()
            if callable(value) and getattr(value, "__module__", None) == home and key[0] != "_"
        )
        hint = did_you_mean(name, own) or (f"it has {', '.join(own[:SHOWN])}" if own else "")
        ours = _hint(extra, module) if module.partition(".")[0] in NAMES else ""
        raise ConfigError(
            f"rewards.extra: {extra.path} cannot be found, there is no {name!r} in it"
            f"{f': {hint.strip()}' if hint else ''}{ours}"
        ) from None


def _module(extra: UserReward, name: str) -> Any:
    if not extra.file:
        return importlib.import_module(name)
    return import_file(extra.kept or read_file(extra.file))


def _check_call(extra: UserReward, found: Any) -> None:
    """
    Raises:
        ConfigError: it cannot be called with the options, or its scorer with images and conditions.
    """
    what = f"rewards.extra: {extra.path}"
    if not callable(found):
        raise ConfigError(
            f"{what} is a {type(found).__name__}, which cannot be called to build a scorer: name a "
            "class or a function"
        )
    given = ", ".join(["device", *extra.options])
    if error := _misfit(found, device="cpu", **extra.options):
        raise ConfigError(f"{what} is called with ({given}) to build the scorer, but {error}")
    if not inspect.isclass(found):
        return
    known = (vars(kind) for kind in found.__mro__)
    call = next((names["__call__"] for names in known if "__call__" in names), None)
    if call is None or inspect.isabstract(found):
        missing = ", ".join(sorted(getattr(found, "__abstractmethods__", ()))) or "__call__"
        raise ConfigError(
            f"{what}: the class lacks {missing}: define __call__(self, images, conditions)"
        )
    if inspect.iscoroutinefunction(call):
        raise ConfigError(f"{what}: its __call__ is async: define a synchronous one")
    if inspect.isfunction(call) and (error := _misfit(call, None, None, None)):
        raise ConfigError(f"{what}: its __call__ is called with (images, conditions), but {error}")


def _misfit(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Why a function does not take these arguments; empty if it does or is not inspectable."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # compiled
        return ""
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        return str(error)
    return ""


def load_user_reward(extra: UserReward, device: str) -> UserScorer:
    """Import and build a user reward.

    Raises:
        ConfigError: see `import_user_reward`; the constructor fails, or its result is not callable.
    """
    isolated = Isolation()
    build = import_user_reward(extra, isolated)
    with _building(extra, "cannot be built"), isolated(_seed(extra.path)):
        scorer = build(device=device, **extra.options)
    if not callable(scorer):
        raise ConfigError(
            f"rewards.extra: {extra.path} gives a {type(scorer).__name__}, which cannot be called "
            "with images and conditions: define __call__(self, images, conditions)"
        )
    return UserScorer(extra, scorer, isolated)


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.rpartition(".")[2]).lower()
