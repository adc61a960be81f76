"""All systems of the miniature, by name."""

from __future__ import annotations

from cluster.errors import ConfigError, did_you_mean
from learner.miniature.systems.captions import CAPTIONS
from learner.miniature.systems.llamagen import LLAMAGEN
from learner.miniature.systems.mnist import MNIST
from learner.miniature.systems.system import System
from learner.miniature.systems.vqgan import VQGAN

SYSTEMS: dict[str, System] = {system.name: system for system in (LLAMAGEN, VQGAN, CAPTIONS, MNIST)}


def system_of(name: str) -> System:
    """The system of a name.

    Raises:
        ConfigError: there is none.
    """
    if name not in SYSTEMS:
        raise ConfigError(
            f"--system {name!r}: {did_you_mean(name, SYSTEMS)}there are {', '.join(SYSTEMS)}"
        )
    return SYSTEMS[name]


def system_of_preset(preset: str) -> System:
    """The system that a preset tunes.

    Raises:
        ConfigError: its networks are not built here.
    """
    for system in SYSTEMS.values():
        if system.preset == preset:
            return system
    known = ", ".join(system.preset for system in SYSTEMS.values())
    raise ConfigError(f"no system has the preset {preset!r}: there are {known}")
