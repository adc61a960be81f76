"""Reference outputs of the official code, and the weights they belong to.

Each file holds its model's `config` and outputs, no weights: `recipe.py` makes every tensor from
(seed, name, shape). Outputs are of FoundationVision/LlamaGen at
ce98ec41803a74a90ce68c40ababa9eaeffeb4ec, fp32 on a CPU.
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.parity import recipe

FAMILIES = ("llamagen-gpt", "llamagen-vq", "taming-")
TINY_WIDTH = 128  # up to here, the closer tolerances apply


class Arrays(dict[str, np.ndarray]):
    """Entries of a file. A test that asks for one that is not there is skipped, by its name: files
    hold what their maker could compute."""

    def __init__(self, path: Path) -> None:
        with np.load(path, allow_pickle=False) as file:
            super().__init__({name: file[name] for name in file.files})
        self._path = path

    def __missing__(self, name: str) -> np.ndarray:
        pytest.skip(f"{self._path.name} has no {name!r}")


@dataclass(frozen=True)
class Reference:
    """One file."""

    path: Path

    @cached_property
    def arrays(self) -> Arrays:
        return Arrays(self.path)

    @cached_property
    def config(self) -> dict[str, Any]:
        """
        Raises:
            pytest.UsageError: not a file of the format.
        """
        try:
            config = json.loads(str(dict(self.arrays)["config"]))
            if not str(config["family"]).startswith(FAMILIES):
                raise ValueError(f"of family {config['family']!r}")
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise pytest.UsageError(
                f"{self.path}: expected a file of reference outputs with a config of a family in "
                f"{FAMILIES} ({type(error).__name__}: {error})"
            ) from error
        return config

    @property
    def model(self) -> dict[str, Any]:
        return self.config["model"]

    def state(self) -> dict[str, torch.Tensor]:
        """The checkpoint's tensors, official names, architecture buffers included."""
        state = recipe.make_state_dict(self.config["shapes"], self.config["seed"])
        recipe.check(state, self.config["weight_sums"])
        tensors = {name: torch.from_numpy(array) for name, array in state.items()}
        buffers = self.config.get("architecture_buffers", {})
        return tensors | {name: torch.zeros(shape) for name, shape in buffers.items()}

    def part(self, name: str) -> Any:
        """A part of the configuration; a test of what is not there is skipped, by its name."""
        if not self.config.get(name):
            pytest.skip(f"the configuration of {self.path.name} has no {name!r}")
        return self.config[name]

    def tensor(self, name: str) -> torch.Tensor:
        array = self.arrays[name]
        return torch.from_numpy(array.astype(np.int64) if array.dtype == np.int32 else array)


def references(folder: Path, family: str) -> list[Reference]:
    """Every file of a family in a folder; of several families, if their names begin alike.

    Raises:
        pytest.UsageError: there is no file, or one that is not of the format: it would be left out
            without a word.
    """
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    found = [Reference(path) for path in files if path.suffix.lower() == ".npz"]
    if not found:
        raise pytest.UsageError(f"--parity-data {folder}: expected a folder with .npz files")
    return [reference for reference in found if reference.config["family"].startswith(family)]
