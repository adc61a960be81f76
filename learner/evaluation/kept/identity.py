"""What kept samples are of: enough to decide whether they may be used again."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from actors.checkpoints.loading import CheckpointConfig
from cluster.errors import CheckpointError
from cluster.io.checksum import sha256_of
from cluster.io.paths import expand_user
from cluster.messages import Condition, FeatureRow
from cluster.model_files.tensors import anywhere
from learner.config import RunConfig, dotted, to_dict
from learner.data.datasets import open_images
from learner.evaluation.held_out import GROUP
from learner.evaluation.rows import Row
from rewards.images.folder import walk
from rewards.reference.fetch import reference_file

logger = logging.getLogger(__name__)

JUDGE, FILES, JUDGE_DEVICE = "judge", "judge_files", "judge_device"
NAMES = ("policy.checkpoint", "tokenizer.checkpoint", "images.source")
"""Fields for messages alone: a file that was moved is the same."""
MODELS = ("checkpoint", "model", "pretrained")
"""Settings that name a file or directory, if it exists."""
READERS = 8  # threads; hashlib releases the GIL
LARGE = 1 << 30  # bytes of a folder that take long enough to say so
EVERY = 16  # hexadecimal digits of digests that are shown


def identity_of(config: RunConfig, row: Row) -> dict[str, Any]:
    """Everything that the samples of a row depend on, as plain values for JSON.

    Reads the files of policy and tokenizer.

    Raises:
        CheckpointError, DataError: a file is missing.
    """
    judge = judge_identity(config)
    if row.spec is None:
        return {"images": _images(row.target.images), **judge}
    return {
        "policy": _model(config.policy),
        "tokenizer": _model(config.tokenizer),
        "sampling": dataclasses.asdict(row.spec),
        "seed": config.seed,
        "num_images": config.evaluation.num_images,
        "images_per_request": GROUP,
        "image_size": config.evaluation.image_size,
        "conditions": digest_of(config.conditions.conditions()),
        "dtype": config.sampler.dtype,
        "image_dtype": config.sampler.image_dtype,
        "kernels": config.sampler.kernels,
        "device": config.sampler.device,
        "reproducible": config.reproducible,
        **judge,
    }


def judge_identity(config: RunConfig) -> dict[str, Any]:
    """The judge's settings, digests of the files that they name, and its kind of device.

    Raises:
        CheckpointError: a file is missing.
    """
    judge = to_dict(config)[JUDGE]
    named = {name: value for name, value in dotted(judge).items() if isinstance(value, str)}
    paths = {
        name: value
        for name, value in named.items()
        if "/" in value
        or (value and name.rpartition(".")[2] in MODELS)  # maybe a file in this directory
    }
    there = {name: place for name, value in paths.items() if (place := _place(value))}
    return {
        JUDGE: judge,
        FILES: {name: file_digest(place) for name, place in there.items()},
        JUDGE_DEVICE: config.reward.device,
    }


def _place(value: str) -> Path | None:
    """The file or directory that a setting names; None for names of a hub's models."""
    try:
        return anywhere(value)
    except CheckpointError:
        return None


def _model(config: CheckpointConfig) -> dict[str, Any]:
    return {
        "checkpoint": config.checkpoint,
        "architecture": config.architecture,
        "ema": config.ema,
        "sha256": file_digest(anywhere(config.source().file)),
    }


def _images(source: str) -> dict[str, Any]:
    opened = open_images(source)
    if isinstance(opened.images, np.ndarray):
        digest = hashlib.sha256(opened.images.tobytes()).hexdigest()
    else:
        digest = images_digest(source)
    return {"source": source, "count": len(opened), "digest": digest}


def images_digest(source: str) -> str:
    """SHA-256 of the file behind a source of images; of a folder, of names and contents of all its
    images and Parquet files, at any depth. Empty if there is neither.

    Of contents, since sizes stay when images are replaced (BMP, raw Parquet), and times change when
    a folder is copied. The judge's networks take longer than hashing; of a folder it is done again
    whenever a command starts.

    Raises:
        DataError: a folder cannot be listed.
        OSError: a file cannot be read.
    """
    path = expand_user(reference_file(source))
    if path.is_file():
        return file_digest(path)
    if not source or not path.is_dir():
        return ""
    contents = walk(path)
    names = sorted([*contents.images, *contents.parquet])
    if (size := sum(map(os.path.getsize, [path / name for name in names]))) > LARGE:
        logger.info(f"reading {len(names)} files of {source} ({size / 1e9:.0f} GB), to know them")
    with ThreadPoolExecutor(READERS) as pool:
        digests = list(pool.map(sha256_of, [path / name for name in names]))
    lines = "".join(f"{digest} {name}\n" for digest, name in zip(digests, names))
    return hashlib.sha256(os.fsencode(lines)).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file, or of all files directly in a directory, by name."""
    if path.is_file():
        state = path.stat()
        return _digest(path, state.st_size, state.st_mtime_ns)
    files = sorted(file for file in path.iterdir() if file.is_file())
    text = "".join(f"{file_digest(file)} {file.name}\n" for file in files)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


@functools.lru_cache(maxsize=256)
def _digest(path: Path, size: int, changed_ns: int) -> str:
    """Cached: several rows are of one policy."""
    return sha256_of(path)


def digest_of(conditions: Sequence[Condition]) -> str:
    """SHA-256 of conditions: texts, classes and features, in order."""
    found = hashlib.sha256()
    for condition in conditions:
        features, digest = condition.features, ""
        if isinstance(features, FeatureRow):
            digest = str(features.digest)
        elif isinstance(features, np.ndarray):
            digest = hashlib.sha256(np.ascontiguousarray(features).tobytes()).hexdigest()
        found.update(repr((condition.text, condition.class_index, digest)).encode())
    return found.hexdigest()


def differences(
    kept: Mapping[str, Any], wanted: Mapping[str, Any], besides: Sequence[str] = ()
) -> list[str]:
    """Fields in which two identities differ: "seed: 0, not 1".

    Args:
        besides: fields (or sections) that may differ.
    """
    left, right = _by_name(kept), _by_name(wanted)
    found = []
    for name in dict.fromkeys([*left, *right]):
        part = any(name == each or name.startswith(f"{each}.") for each in (*NAMES, *besides))
        if not part and left.get(name) != right.get(name):
            found.append(f"{name}: {_short(left.get(name))}, not {_short(right.get(name))}")
    return found


def _by_name(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Values by names with dots; tuples as the lists that JSON makes of them."""
    named = dotted(identity).items()
    return {name: list(value) if isinstance(value, tuple) else value for name, value in named}


def _short(value: Any) -> str:
    if isinstance(value, str) and len(value) == hashlib.sha256().digest_size * 2:
        return f"{value[:EVERY]}..."
    return "none" if value is None else repr(value)
