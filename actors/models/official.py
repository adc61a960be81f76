"""The files that LlamaGen, taming-transformers and their trainers write, as plain tensors.

Such files are pickles. They are read with `torch.load(weights_only=True)`, which builds tensors and
plain containers and calls nothing else; a file that asks for more is refused, with the name it
asked for. Layouts (facts of the official code, FoundationVision/LlamaGen at ce98ec4):

    model         LlamaGen's DDP trainer, tokenizer trainer, and most published files
    module        DeepSpeed
    state_dict    Lightning (taming)
    bare          FSDP: the dict of tensors itself (LlamaGen XXL and 3B)
    ema           beside `model`, if the trainer kept an average; read on request only
"""

from __future__ import annotations

import argparse
import fnmatch
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from cluster.errors import CheckpointError
from cluster.sums import verify_sum
from cluster.tensors import locate

SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
LAYOUTS = ("model", "module", "state_dict")
EMA = "ema"

CACHES = ("freqs_cis", "causal_mask", "*.kv_cache.*")
"""Names that are left out: tables of the official module that follow from the architecture, not
weights. Its `generate` registers the KV cache as a submodule, so a model saved after sampling
carries it; rotary table and mask are plain attributes there, and buffers in derived code."""

WRAPPERS = ("module.", "_orig_mod.")  # DistributedDataParallel, torch.compile

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
_LFS = b"version https://git-lfs"


class _LightningCallback:
    """Stands for a class of Lightning that old versions use as a *key* of their callbacks' state.
    It is empty, and nothing of Lightning is imported."""


# All that a file may name beside tensors and plain containers: the options of LlamaGen's trainers,
# and the key above.
_ALLOWED: list[Any] = [
    argparse.Namespace,
    (_LightningCallback, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"),
]


@dataclass(frozen=True)
class OfficialFile:
    """What was read."""

    tensors: dict[str, Tensor]
    """Weights, on the CPU, in the file's dtypes. They may be views of the file: copy them."""
    caches: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Shapes of what was left out (`CACHES`): they betray the grid and the number of heads."""
    options: dict[str, Any] = field(default_factory=dict)
    """The trainer's options, where the file holds them."""


def read_official(path: str | Path, *, ema: bool = False) -> dict[str, Tensor]:
    """The weights in an official checkpoint file, under the names they have there.

    Args:
        ema: take the trainer's moving average instead of the weights themselves.

    Raises:
        CheckpointError: missing, damaged, not a checkpoint, of an unknown or ambiguous layout, or
            holding anything that would have to be unpickled.
    """
    return open_official(path, ema=ema).tensors


def open_official(path: str | Path, *, ema: bool = False) -> OfficialFile:
    """As `read_official`, with what the file says beside its weights."""
    file = locate(path)
    legacy = sniff(file)
    verify_sum(file)
    content = _load(file, mmap=not legacy)
    named = _weights(file, content, ema)
    _refuse_wrappers(file, named)
    caches = {name: tensor for name, tensor in named.items() if _is_cache(name)}
    options = content.get("args") if named is not content else None
    return OfficialFile(
        {name: tensor.detach() for name, tensor in named.items() if name not in caches},
        {name: tuple(tensor.shape) for name, tensor in caches.items()},
        dict(vars(options)) if isinstance(options, argparse.Namespace) else {},
    )


def sniff(file: Path) -> bool:
    """Whether the file is of torch's format before 1.6, which cannot be mapped into memory."""
    with file.open("rb") as stream:
        head = stream.read(64)
        if head.startswith(_ZIP):
            return False
        if head.startswith(_PICKLE):
            return True
        raise CheckpointError(f"{file}: expected a PyTorch checkpoint, found {_describe(head)}")


def _describe(head: bytes) -> str:
    if not head:
        return "an empty file; fetch it again"
    if head.startswith(_LFS):
        return "a Git LFS pointer instead of the file; run `git lfs pull`, or fetch the file itself"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "a web page; the download went to a page about the file, fetch the file itself"
    if head[8:10] == b'{"':
        return "a safetensors file; name it *.safetensors"
    return f"a file that begins with {head[:8]!r}; is it whole, and is it the right one?"


def _load(file: Path, *, mmap: bool) -> Any:
    try:
        with torch.serialization.safe_globals(_ALLOWED), file.open("rb") as stream:
            source: Path | BinaryIO = file if mmap else stream
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refusal(file, str(error))) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError) as error:
        raise CheckpointError(
            f"{file}: not a whole PyTorch checkpoint; was it cut short? Fetch it again"
        ) from error


def _refusal(file: Path, message: str) -> str:
    found = re.search(r"GLOBAL ([\w.]+)", message)
    if found is None:
        return (
            f"{file}: not a checkpoint that can be read without running code in it; fetch it "
            "again, or use another file"
        )
    return (
        f"{file}: expected tensors in plain containers, found a pickled {found.group(1)}, which is "
        "refused because it could run code. If you trust the file, save its weights alone, "
        'torch.save({"model": state_dict}, PATH), where it was made'
    )


def _weights(file: Path, content: Any, ema: bool) -> Mapping[str, Tensor]:
    """The state dict of a layout, checked to be one."""
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{file}: expected a dict of tensors, or one under {_listed(LAYOUTS)}, found "
            f"{type(content).__name__}"
        )
    if ema and EMA not in content:
        raise CheckpointError(
            f"{file}: ema was asked for, but the file has no {EMA!r} entry; found "
            f"{_listed(content)}; leave ema off, or use the trainer's own file"
        )
    layouts = [EMA] if ema else [name for name in LAYOUTS if name in content]
    if len(layouts) > 1:
        raise CheckpointError(
            f"{file}: ambiguous, weights under {_listed(layouts)} at once; save the one you mean "
            'as {"model": state_dict}'
        )
    if not layouts and not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(
            f"{file}: expected weights under {_listed(LAYOUTS)}, or nothing but tensors, found the "
            f"entries {_listed(content)}"
        )
    where, state = (layouts[0], content[layouts[0]]) if layouts else ("the file", content)
    if not isinstance(state, dict) or not state:
        found = "nothing" if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(f"{file}: expected tensors by name in {where}, found {found}")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{file}: expected tensors by name in {where}, found {type(value).__name__} under "
                f"{name!r}"
            )
    return state


def _refuse_wrappers(file: Path, state: Mapping[str, Tensor]) -> None:
    for wrapper in WRAPPERS:
        if all(name.startswith(wrapper) for name in state):
            raise CheckpointError(
                f"{file}: all names begin with {wrapper!r}, as in a model that was saved inside a "
                "wrapper; save the inner model's state dict (the official trainers do)"
            )


def _is_cache(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in CACHES)


def _listed(names: Any, limit: int = 8) -> str:
    shown = [repr(name) for name in list(names)[:limit]]
    return ", ".join(shown) + (", ..." if len(names) > limit else "") if shown else "nothing"
