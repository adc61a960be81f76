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
    """A command line to be written into files: values of options with names like secrets, and
    passwords in URLs, are replaced by stars."""
    found: list[str] = []
    hidden = False
    for word in arguments:
        flag, equals, _ = word.partition("=")
        is_option = word.startswith("--")
        secret = is_option and bool(SECRET.search(flag.replace("-", "_").replace(".", "_")))
        if secret and equals:
            word = f"{flag}={STARS}"
        elif hidden and not is_option:
            word = STARS
        hidden = secret and not equals
        found.append(IN_URL.sub(f"://{STARS}@", word))
    return found


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
