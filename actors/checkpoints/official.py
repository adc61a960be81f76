"""Selects the weights of a policy or a tokenizer from an official checkpoint.

`cluster.model_files.checkpoints` finds tensors in the file; here, buffers that are no weights are
left out, and files that hold both a policy and its tokenizer are divided.
"""

from __future__ import annotations

import fnmatch
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from actors.checkpoints.families import Kind
from actors.checkpoints.zoo import FAMILIES
from cluster.errors import CheckpointError
from cluster.io.strict_json import MALFORMED
from cluster.model_files.checkpoints import Checkpoint, open_checkpoint

logger = logging.getLogger(__name__)

PARTS: dict[Kind, str] = {"policy": "gpt_model.", "tokenizer": "vq_model."}
"""Prefixes of AR-GRPO's files, which hold both."""
TOKENIZERS = tuple(each.tokenizer_prefix for each in FAMILIES if each.tokenizer_prefix)
BUFFERS = tuple(pattern for each in FAMILIES for pattern in each.buffers)


@dataclass(frozen=True)
class OfficialFile:
    """What is read of an official file."""

    tensors: dict[str, Tensor]
    """Weights, on the CPU, in the file's dtypes; views of the file, to be copied."""
    buffers: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Shapes of what is left out (`Family.buffers`): they show grid and number of heads."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The trainer's options, where the file holds them."""


def open_official(
    path: str | Path, kind: Kind | None = None, *, ema: bool = False, check: bool = True
) -> OfficialFile:
    """Read an official checkpoint, under the names it has there.

    Args:
        ema: take the trainer's moving average instead of the weights.
        kind: which part of a file that holds both.
        check: verify checksums, which reads the whole file.

    Raises:
        CheckpointError: see `cluster.model_files.checkpoints.open_checkpoint`.
    """
    opened = open_checkpoint(path, ema=ema)
    names = _part(opened, kind)
    kept = {name: full for name, full in names.items() if not _is_buffer(name)}
    read = opened.read(kept.values(), check=check)
    return OfficialFile(
        {name: read[full].detach() for name, full in kept.items()},
        {name: opened.tensors[full].shape for name, full in names.items() if name not in kept},
        opened.options or _model_options(opened),
    )


def holds_tokenizer(path: str) -> bool:
    """Whether a file holds a policy and a tokenizer, as AR-GRPO's do; False if unreadable."""
    try:
        names = open_checkpoint(path).tensors
    except CheckpointError:
        return False
    return all(any(name.startswith(part) for name in names) for part in PARTS.values())


def _model_options(opened: Checkpoint) -> dict[str, Any]:
    """The options that AR-GRPO writes beside a model, such as its image size."""
    try:
        text = (opened.files[0].parent / "config.json").read_text(encoding="utf-8")
        options = json.loads(text)
    except (OSError, *MALFORMED):
        return {}
    return options if isinstance(options, dict) and "gpt_model" in options else {}


def _part(opened: Checkpoint, kind: Kind | None) -> dict[str, str]:
    """Names inside the wanted part -> names in the file."""
    present = [part for part in PARTS.values() if any(n.startswith(part) for n in opened.tensors)]
    if not present:
        return {name: name for name in opened.tensors if not _other_part(name, opened, kind)}
    wanted = PARTS[kind] if kind else present[0]
    if wanted not in present:
        raise CheckpointError(
            f"{opened.source}: holds {' and '.join(f'{part}*' for part in present)} as AR-GRPO's "
            f"files do, but no {wanted}*: there is no {kind} in it"
        )
    what = "tokenizer" if wanted == PARTS["tokenizer"] else "policy"
    logger.info("%s: taking %s* for the %s, as AR-GRPO names it", opened.source, wanted, what)
    return {name.removeprefix(wanted): name for name in opened.tensors if name.startswith(wanted)}


def _other_part(name: str, opened: Checkpoint, kind: Kind | None) -> bool:
    """Whether a tensor belongs to the part of an official file that is not read: the tokenizer when
    a policy is read, the policy when a tokenizer is."""
    tokenizer = name.startswith(TOKENIZERS)
    if kind == "policy" or tokenizer:
        return kind == "policy" and tokenizer
    return kind == "tokenizer" and any(other.startswith(TOKENIZERS) for other in opened.tensors)


def _is_buffer(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in BUFFERS)
