"""Ray runtime environments of pools, before anything is started with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.errors import ConfigError
from cluster.program.secrets import secret_variables


def check_runtime_env(runtime_env: Mapping[str, Any]) -> None:
    """Whether Ray takes it, as far as that is known without a cluster: its fields, their types,
    and that folders of this machine are there.

    Raises:
        ConfigError: what is wrong; or it refers to a variable that is not set.
    """
    from ray.runtime_env import RuntimeEnv

    environment, _ = secret_variables(runtime_env)
    try:
        RuntimeEnv(**environment)
    except Exception as error:  # of any kind: it is checked by a function for each field
        words = " ".join(str(error).split())
        raise ConfigError(f"Ray refuses this runtime_env: {words}") from error
