"""Keeps secrets out of files and logs: configurations only name environment variables.

A value `${NAME}` in the environment of a pool of reward servers is replaced by the driver's
environment variable when a server starts, and is never written.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError
from cluster.io.paths import in_ray_package
from cluster.program.invocation import Invocation, adopt_invocation

REFERENCE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
SECRET = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(_|$)", re.IGNORECASE)
"""Variables whose values count as secrets."""
IN_URL = re.compile(r"://[^/@\s]*:[^/@\s]+@")
"""user:password@ in a URL."""
USER = re.compile(r"://([^/\s'\"]+|[^/\s'\"]*:[^\s'\"]+)@")
"""As IN_URL, and a user alone, which may be a token; a password may have a slash."""
PARAMETER = re.compile(
    r"([?&][\w.-]*(?:sig|signature|credential|token|key|keyid|secret|password|passwd)=)([^&#\s'\"]+)",
    re.IGNORECASE,
)
"""A signature, or a key, among the parameters of a URL."""
PAIR = re.compile(
    r"([\w.-]*(?:TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(?:[_.-][\w.-]*)?)(['\"]?\s*[:=]\s*)"
    r"(\"[^\"]*\"|'[^']*'|\$\{\w+\}|[^\s,}\]'\"{\[][^\s,}\]'\"]*)",
    re.IGNORECASE,
)
"""A name and its value, as in YAML, JSON, or a shell."""
VARIABLE = re.compile(r"[A-Z][A-Z0-9_]*")
FILE = re.compile(r"_(FILE|PATH|DIR|FOLDER)$", re.IGNORECASE)
"""Names whose values are places of secrets."""
ENV_VARS = "env_vars"
STARS = "***"


def check_environment(runtime_env: Mapping[str, Any]) -> None:
    """Refuse a runtime environment with literal secrets; the error does not repeat them.

    Raises:
        ValueError: names the variable, and how to write it.
    """
    variables = runtime_env.get(ENV_VARS) or {}
    if not isinstance(variables, Mapping):
        raise ValueError(
            f"runtime_env.env_vars must map names to values, found {type(variables).__name__}"
        )
    for name, value in variables.items():
        if SECRET.search(str(name)) and value and not REFERENCE.search(str(value)):
            raise ValueError(
                f"runtime_env.env_vars.{name} looks like a secret, and would be written into the "
                f"run directory: write ${{{name}}} for its value, and set it in the environment of "
                "the program"
            )
    if _has_password(runtime_env):
        raise ValueError(
            "runtime_env has a URL with a password in it, which would be written into the run "
            "directory: give it to pip or git by their own configuration"
        )


def _has_password(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_has_password(part) for part in value.values())
    if isinstance(value, list | tuple):
        return any(_has_password(part) for part in value)
    return isinstance(value, str) and bool(IN_URL.search(value)) and not REFERENCE.search(value)


def without_secrets(arguments: Sequence[str]) -> list[str]:
    """A command line to be written into files: values of options and variables with names like
    secrets are replaced by stars, and what `masked` replaces."""
    found: list[str] = []
    hidden = False
    for word in arguments:
        is_option = word.startswith("--")
        name, equals, value = word.partition("=")
        secret = (is_option or VARIABLE.fullmatch(word) is not None) and _is_secret(name)
        if secret and equals:
            word = f"{name}={_stars(value)}"
        elif hidden and not is_option:
            word, secret = _stars(word), False
        hidden = secret and not equals
        found.append(masked(word))
    return found


def masked(text: str) -> str:
    """`text` with stars for users and passwords in URLs, signatures and keys in their parameters,
    and values of `NAME: value` and `NAME=value` where the name is like a secret's."""
    text = USER.sub(lambda found: f"://{_stars(found[1])}@", text)
    text = PARAMETER.sub(lambda found: f"{found[1]}{_stars(found[2])}", text)
    return PAIR.sub(lambda found: _pair(*found.groups()), text)


def _pair(name: str, between: str, value: str) -> str:
    if not _is_secret(name) or value.startswith(STARS):
        return f"{name}{between}{value}"
    quote = value[0] if value[0] in "\"'" else ""
    return f"{name}{between}{quote}{_stars(value.strip(quote) if quote else value)}{quote}"


def _is_secret(name: str) -> bool:
    """Whether a name of an option or a variable is like a secret's; names of files are not."""
    name = re.sub("[-.]", "_", name)
    return SECRET.search(name) is not None and FILE.search(name) is None


def _stars(value: str) -> str:
    """Stars for a value; a reference to a variable holds no secret, and stays."""
    return value if REFERENCE.fullmatch(value) else STARS


def secret_variables(
    runtime_env: Mapping[str, Any], environment: Mapping[str, str] | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Separate a runtime environment from its secrets.

    Args:
        environment: where references are looked up; None: this process's.

    Returns:
        The runtime environment without variables that have references, which Ray may log; and
        those variables with their values.

    Raises:
        ConfigError: a variable that is referred to is not set.
    """
    environment = os.environ if environment is None else environment
    variables = runtime_env.get(ENV_VARS) or {}
    open_ones = {k: v for k, v in variables.items() if not REFERENCE.search(str(v))}
    filled = {
        name: REFERENCE.sub(lambda found: _value(found[1], environment), str(value))
        for name, value in variables.items()
        if name not in open_ones
    }
    rest = {key: value for key, value in runtime_env.items() if key != ENV_VARS}
    return (rest | {ENV_VARS: open_ones} if open_ones else rest), filled


def _value(name: str, environment: Mapping[str, str]) -> str:
    if name not in environment:
        raise ConfigError(
            f"reward_pools: a runtime_env refers to ${{{name}}}, but the environment of this "
            f"program has no {name}: set it before the start, also for --resume"
        )
    return environment[name]


def with_environment(
    factory: Callable[..., Any],
    variables: Mapping[str, str],
    started: Invocation | None = None,
    directory: str = "",
) -> Callable[..., Any]:
    """A role class whose process first sets environment variables and adopts an invocation. They
    are part of the class, which Ray keeps in memory and does not log.

    Args:
        directory: working directory of the process, if it exists and the process is not in an
            unpacked Ray package; empty: Ray's choice.
    """
    if not variables and started in (None, Invocation()) and not directory:
        return factory
    given = dict(variables)

    class Equipped(factory):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            os.environ.update(given)
            adopt_invocation(started or Invocation())
            if directory and os.path.isdir(directory) and not in_ray_package(Path.cwd()):
                os.chdir(directory)
            super().__init__(*args, **kwargs)

    Equipped.__name__ = Equipped.__qualname__ = getattr(factory, "__name__", "Equipped")
    return Equipped
