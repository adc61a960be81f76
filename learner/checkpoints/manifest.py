"""The manifest of a checkpoint: its run and step, and a digest of every file and of itself."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack

from cluster.errors import CheckpointError
from cluster.io.checksum import UNREADABLE, add_checksum, count, sha256_of, verify_checksum

FORMAT = 3
PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class FileDigest:
    """Size and SHA-256 of a file."""

    size: int
    sha256: str

    @classmethod
    def of(cls, file: Path) -> FileDigest:
        return cls(file.stat().st_size, sha256_of(file))


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint records about itself."""

    step: int
    """Iterations done."""
    files: Mapping[str, FileDigest]
    """By name; other files in the directory are ignored."""
    run: str = ""
    """Identity of the run (`RunDirectory.identity`)."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """Results of the evaluation at this step, if there was one."""
    records: Mapping[str, str] = field(default_factory=dict)
    """File name -> SHA-256 of the run's records up to this step (`records.digests`)."""

    def to_bytes(self) -> bytes:
        """msgpack, read back by `from_bytes`."""
        figures = {k: v if math.isfinite(v) else math.nan for k, v in self.figures.items()}
        fields = {
            "run": self.run,
            "step": self.step,
            "files": {k: {"size": v.size, "sha256": v.sha256} for k, v in self.files.items()},
            "figures": figures,
            "records": dict(self.records),
        }
        return add_checksum(msgpack.packb(fields), format=FORMAT)

    @classmethod
    def from_bytes(cls, data: bytes, name: str) -> Manifest:
        """Inverse of `to_bytes`.

        Args:
            name: of the checkpoint, for errors.

        Raises:
            CheckpointError: damaged, of another format, or it names files by a path.
        """
        try:
            outer = msgpack.unpackb(data)
            if outer["format"] != FORMAT:
                raise CheckpointError(
                    f"checkpoint {name} has format {outer['format']!r}, expected {FORMAT}: resume "
                    "with the version that wrote it"
                )
            fields = msgpack.unpackb(verify_checksum(data))
            return cls(
                step=count(fields["step"]),
                files={_plain(key, name): _digest(value) for key, value in fields["files"].items()},
                run=str(fields["run"]),
                figures={str(k): _figure(v) for k, v in fields.get("figures", {}).items()},
                records={_plain(k, name): str(v) for k, v in fields.get("records", {}).items()},
            )
        except UNREADABLE as error:
            raise CheckpointError(
                f"checkpoint {name}: no readable manifest ({error or type(error).__name__})"
            ) from error


def _plain(key: Any, name: str) -> str:
    """The name of a file in the checkpoint's own directory."""
    if not isinstance(key, str) or not PLAIN_NAME.fullmatch(key):
        raise CheckpointError(
            f"checkpoint {name}: its manifest names {key!r}, expected plain names of files in its "
            "own directory: it was not written by this program; do not use it"
        )
    return key


def _digest(value: Mapping[str, Any]) -> FileDigest:
    return FileDigest(count(value["size"]), str(value["sha256"]))


def _figure(value: Any) -> float:
    if not isinstance(value, float | int) or math.isinf(value):
        raise ValueError(f"a figure was expected, found {value!r}")
    return float(value)
