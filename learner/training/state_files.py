"""The learner's files of a checkpoint: tensors, and a small state."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack
from torch import Tensor

from cluster.errors import CheckpointError
from cluster.io.checksum import UNREADABLE, add_checksum, count, verify_checksum
from cluster.io.files import RESUME, sync, writing
from cluster.model_files.tensors import write_tensors
from learner.grpo.entropy import EntropyState
from learner.training.transfers import to_host

OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "learner.msgpack"


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file."""

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any] = field(default_factory=dict)
    """For its header."""

    def copied(self) -> TensorFile:
        """A copy in host memory, which later steps do not change."""
        return TensorFile(to_host(self.tensors), self.config)


@dataclass(frozen=True)
class LearnerState:
    """State of a learner beside its tensors: learner.msgpack."""

    version: int
    entropy: EntropyState
    base_entropy: float | None
    skipped: tuple[bool, ...] = ()
    """Whether each of the last updates was skipped."""

    def to_bytes(self) -> bytes:
        return add_checksum(msgpack.packb(dataclasses.asdict(self)))

    @classmethod
    def read(cls, directory: Path) -> LearnerState:
        """From a checkpoint's directory.

        Raises:
            CheckpointError: missing or damaged.
        """
        file = directory / STATE_FILE
        try:
            fields = msgpack.unpackb(verify_checksum(file.read_bytes()))
            entropy = fields["entropy"]
            state = cls(
                count(fields["version"]),
                EntropyState(_number(entropy["coefficient"]), _maybe(entropy.get("average"))),
                _maybe(fields["base_entropy"]),
                tuple(_flag(each) for each in fields.get("skipped", ())),
            )
        except (OSError, *UNREADABLE) as error:
            raise CheckpointError(f"{file}: no readable state of a learner ({error!r})") from error
        return state


@dataclass(frozen=True)
class LearnerFiles:
    """All files of a learner, ready to write."""

    tensors: Mapping[str, TensorFile]
    """By file name."""
    state: LearnerState

    def copied(self) -> LearnerFiles:
        """See `TensorFile.copied`."""
        return LearnerFiles({k: file.copied() for k, file in self.tensors.items()}, self.state)

    def write(self, directory: Path) -> None:
        """Write and sync all files.

        Raises:
            StorageError: no space left.
        """
        for name, file in self.tensors.items():
            write_tensors(directory / name, file.tensors, file.config, then=RESUME)
        with writing(directory / STATE_FILE):
            (directory / STATE_FILE).write_bytes(self.state.to_bytes())
            for name in (*self.tensors, STATE_FILE):
                sync(directory / name)


def _number(value: Any) -> float:
    if not isinstance(value, float | int) or not math.isfinite(value):
        raise ValueError(f"a number was expected, found {value!r}")
    return float(value)


def _flag(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError(f"true or false was expected, found {value!r}")
    return value


def _maybe(value: Any) -> float | None:
    return None if value is None else _number(value)
