"""The manifest of a checkpoint: what it is, and a checksum of every file and of itself."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack

from cluster.errors import CheckpointError
from cluster.io.checksum import UNREADABLE, add_checksum, count, verify_checksum

FORMAT = 3
UNSIGNED_FORMAT = 2  # of version 0.1: no checksum of its own, no run, no configuration
PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class FileDigest:
    """What a file must be."""

    size: int
    sha256: str

    @classmethod
    def of(cls, file: Path) -> FileDigest:
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return cls(file.stat().st_size, digest)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint says of itself."""

    step: int
    """Iterations done."""
    files: Mapping[str, FileDigest]
    """By name; nothing else in the directory belongs to it."""
    run: str = ""
    """Identity of the run (`RunDirectory.identity`); empty in format 2."""
    config: str = ""
    """SHA-256 of the run's configuration; empty in format 2."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """Of the evaluation that was taken at this step, if one was."""
    records: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of the run's rows up to this step, by file (`records.digests`)."""

    def to_bytes(self) -> bytes:
        """msgpack, read back by `from_bytes`."""
        body = msgpack.packb(
            {
                "run": self.run,
                "step": self.step,
                "config": self.config,
                "files": {k: {"size": v.size, "sha256": v.sha256} for k, v in self.files.items()},
                "figures": {
                    k: v if math.isfinite(v) else math.nan for k, v in self.figures.items()
                },
                "records": dict(self.records),
            }
        )
        return add_checksum(body, format=FORMAT)

    @classmethod
    def from_bytes(cls, data: bytes, name: str) -> Manifest:
        """Inverse of `to_bytes`; also reads format 2.

        Args:
            name: of the checkpoint, for errors.

        Raises:
            CheckpointError: damaged, of another format, or it names files that are no plain names.
        """
        try:
            outer = msgpack.unpackb(data)
            found = outer["format"]
            if found not in (FORMAT, UNSIGNED_FORMAT):
                raise CheckpointError(
                    f"checkpoint {name} has format {found!r}, expected {FORMAT} (or "
                    f"{UNSIGNED_FORMAT}): go on with the version that wrote it"
                )
            fields = msgpack.unpackb(verify_checksum(data))
            return cls(
                step=count(fields["step"]),
                files={_plain(key, name): _sum(value) for key, value in fields["files"].items()},
                run=str(fields.get("run", "")),
                config=str(fields.get("config", "")),
                figures={str(k): _figure(v) for k, v in fields.get("figures", {}).items()},
                records={_plain(k, name): str(v) for k, v in fields.get("records", {}).items()},
            )
        except UNREADABLE as error:
            raise CheckpointError(
                f"checkpoint {name}: no readable manifest ({error or type(error).__name__})"
            ) from error


def _plain(key: Any, name: str) -> str:
    """A file's name that stays in its directory."""
    if not isinstance(key, str) or not PLAIN_NAME.fullmatch(key):
        raise CheckpointError(
            f"checkpoint {name}: its manifest names {key!r}, expected plain names of files in its "
            "own directory: it was not written by this program; do not use it"
        )
    return key


def _sum(value: Mapping[str, Any]) -> FileDigest:
    return FileDigest(count(value["size"]), str(value["sha256"]))


def _figure(value: Any) -> float:
    if not isinstance(value, float | int) or math.isinf(value):
        raise ValueError(f"a figure was expected, found {value!r}")
    return float(value)
