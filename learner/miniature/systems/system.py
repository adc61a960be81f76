"""What a system of the miniature declares: its preset, its networks, and how each is trained.

A system is one `System` record in a module of its own (`llamagen.py`) and one line in
`registry.SYSTEMS`; building, presets and studies read everything from the record.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cluster.io.files import replacing
from cluster.model_files.tensors import write_tensors
from learner.miniature.training import Batches, LabelledImages, Tick

TOKENIZER, POLICY = "tokenizer.safetensors", "policy.safetensors"
AUTOENCODER = "autoencoder.safetensors"


@dataclass(frozen=True, kw_only=True)
class Network:
    """One network of a system."""

    name: str
    """Key of its random numbers, and its line of the progress; other networks have others."""
    file: str
    """What `train` writes last, by `Job.write`, relative to the folder of networks; files beside it
    may belong to it."""
    steps: int
    data: Callable[[], LabelledImages]
    train: Callable[[Job], None]
    """Trains the network and writes its file; may read files of networks listed before it."""
    of_judge: bool = False
    """Has the judge's seed, the same for every build."""


@dataclass(frozen=True, kw_only=True)
class System:
    """Networks that are tuned together by one preset."""

    name: str
    preset: str
    """Name of the preset that uses the networks."""
    networks: tuple[Network, ...]
    """All that the preset reads, in an order in which they can be trained."""
    places: Mapping[str, Any]
    """The preset's fields, nested as in YAML, that name files or directories of the networks:
    their paths relative to the folder."""
    on_demand: bool = False
    """The networks are not shipped: the preset names them as `built://NAME/...`, and they are built
    where it looks for them."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """The training of one network, as its function gets it."""

    network: Network
    folder: Path
    """The folder of all networks."""
    seed: int
    steps: int
    tick: Tick
    """To be called once a step."""

    @property
    def file(self) -> Path:
        """Where the network goes; its directory is there."""
        return self.folder / self.network.file

    def batches(self) -> Batches:
        """The data with a random generator of this network's own. Seeds torch's global generator
        too, for initial weights: call it just before the module is made."""
        mixed = self.seed * 1_000_003 + zlib.crc32(self.network.name.encode())
        torch.manual_seed(mixed)
        return Batches(self.network.data(), torch.Generator().manual_seed(mixed))

    def write(self, module: nn.Module, config: Mapping[str, Any]) -> None:
        """Write the network's file, whole or not at all, with `config` in its header."""
        with replacing(self.file) as partial:
            write_tensors(partial, module.state_dict(), config)
