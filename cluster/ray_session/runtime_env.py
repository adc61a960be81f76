"""Checks of Ray runtime environments of pools."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.errors import ConfigError
from cluster.program.secrets import secret_variables


def check_runtime_env(runtime_env: Mapping[str, Any]) -> None:
    """Check fields, types and local folders, as far as possible without a cluster.

    Raises:
        ConfigError: what is wrong; or it refers to a variable that is not set.
    """
    from ray.runtime_env import RuntimeEnv

    environment, _ = secret_variables(runtime_env)
    try:
        RuntimeEnv(**environment)
    except Exception as error:  # each field has its own check and errors
        words = " ".join(str(error).split())
        raise ConfigError(f"Ray refuses this runtime_env: {words}") from error
