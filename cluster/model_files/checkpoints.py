"""Reader of other programs' checkpoints: policies, tokenizers, CLIP, HPSv2, Inception.

The format is recognised by content, not by name: torch.save (`cluster.model_files.torch_files`),
safetensors, or an index of shards. Nothing in a file is executed, and only requested tensors are
built. Prefixes of wrappers (DistributedDataParallel, FSDP) are removed from names.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cluster.errors import CheckpointError
from cluster.io.checksum import verify_sum
from cluster.io.strict_json import MALFORMED
from cluster.model_files.advice import (
    INDEX,
    broken,
    executes,
    index_in,
    listed,
    no_checkpoint,
    refused_object,
    shard_of,
    shown_name,
)
from cluster.model_files.file_kinds import FileKind, file_kind
from cluster.model_files.pickles import MalformedError, Opaque
from cluster.model_files.tensors import CONFIG_KEY, DTYPES, anywhere, open_safetensors
from cluster.model_files.torch_files import TensorRecord, TorchFile, legacy_tensor

LAYOUTS = ("model", "module", "state_dict", "model_state_dict", "params")
"""Keys of the weights in trainers' files: LlamaGen and timm, DeepSpeed, Lightning and open_clip,
PyTorch's tutorials, BasicSR."""
AVERAGES = ("ema", "ema_model", "model_ema", "state_dict_ema", "ema_state_dict", "params_ema")
"""Keys of moving averages: LlamaGen, the public code of 2603.23086, DINO, timm, ..."""
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts that DistributedDataParallel, torch.compile, FSDP and checkpointing add to names."""
COUNTER = "n_averaged"  # of torch.optim.swa_utils.AveragedModel, not a weight
OPTIONS = "args"
FAMILY = '"family"'  # in the description of every network of this program
_NESTED = 3  # layouts in layouts
SAVE_ONES = 'save the ones you mean as {"model": state_dict}'


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, not yet read."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[bool], Tensor]
    """Reads it, on the CPU, as a view of the file; the argument: verify checksums."""
    fault: str = ""
    """Why it is not a plain tensor, and what to do; empty if it is."""


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: names and shapes; weights are read on request."""

    source: str
    tensors: Mapping[str, StoredTensor]
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the trainer, if the file has them."""
    files: tuple[Path, ...] = ()

    def shapes(self, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """The tensors on the meta device.

        Raises:
            CheckpointError: one of them is not a plain tensor.
        """
        try:
            return {
                name: torch.empty(stored.shape, dtype=stored.dtype, device="meta")
                for name, stored in self._wanted(names).items()
            }
        except RuntimeError as error:  # a shape that overflows
            raise CheckpointError(broken(self.source, str(error))) from error

    def read(
        self, names: Collection[str] | None = None, *, check: bool = True
    ) -> dict[str, Tensor]:
        """The tensors (of these names) on the CPU, in the file's dtypes. They are views of the
        file: do not write to them.

        Args:
            check: verify the file's checksums and the one of the download.

        Raises:
            CheckpointError: damaged, or not plain tensors.
        """
        if check:
            for file in self.files:
                verify_sum(file)
        found: dict[str, Tensor] = {}
        for name, stored in self._wanted(names).items():
            try:
                found[name] = stored.read(check)
            except (SafetensorError, ValueError, RuntimeError, TypeError, OSError) as error:
                raise CheckpointError(broken(self.source, f"tensor {name!r}: {error}")) from error
        return found

    def _wanted(self, names: Collection[str] | None) -> dict[str, StoredTensor]:
        chosen = self.tensors if names is None else names
        wanted = {name: self.tensors[name] for name in chosen}
        for name, stored in wanted.items():
            if stored.fault:
                raise CheckpointError(f"{self.source}: tensor {name!r} is {stored.fault}")
        return wanted


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """All weights of a checkpoint; see `open_checkpoint` and `Checkpoint.read`."""
    return open_checkpoint(path).read()


def open_checkpoint(path: str | os.PathLike[str], *, ema: bool = False) -> Checkpoint:
    """The weights in a file, an index of shards, or a directory with either.

    Args:
        ema: the trainer's moving average instead of the weights themselves.

    Raises:
        CheckpointError: missing, damaged, no checkpoint, of an unknown or ambiguous layout, or it
            needs unpickling. Says what was found, and what to do.
    """
    source = os.fspath(path)
    try:
        file = anywhere(path)
        if file.is_dir():
            file = index_in(file, source)
            source = str(file)
        if ema and (_is_index(file) or _is_safetensors(file)):
            raise CheckpointError(
                f"{source}: ema was asked for, but files of this kind hold one set of weights; "
                "leave ema off, or use the trainer's own file"
            )
        opened = _open_shards(file, source) if _is_index(file) else _open_file(file, source, ema)
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(f"{source}: it cannot be read ({reason})") from error
    return Checkpoint(source, _unwrapped(source, opened.tensors), opened.options, opened.files)


def is_own(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a safetensors file of this program; False if it does not exist."""
    try:
        file = anywhere(path)
        if not file.is_file() or not _is_safetensors(file):
            return False
        with safe_open(file, framework="np") as opened:  # reads the header only
            return FAMILY in (opened.metadata() or {}).get(CONFIG_KEY, "")
    except (CheckpointError, SafetensorError, OSError):
        return False


def _is_index(file: Path) -> bool:
    return file.name.lower().endswith(INDEX)


def _is_safetensors(file: Path) -> bool:
    return file_kind(file) is FileKind.SAFETENSORS


def _open_file(file: Path, source: str, ema: bool = False) -> Checkpoint:
    kind = file_kind(file)
    if kind is FileKind.SAFETENSORS:
        return _open_safetensors(file, source)
    if kind not in (FileKind.TORCH, FileKind.TORCH_LEGACY):
        raise CheckpointError(no_checkpoint(file, source, kind))
    try:
        opened = TorchFile(file)
    except MalformedError as error:
        raise CheckpointError(broken(source, str(error))) from error
    if program := executes(opened.names):
        raise CheckpointError(
            f"{source}: expected tensors in plain containers, found a pickled {program}, which "
            "runs programs on the machine that unpickles it. It was not run here; do not trust "
            "the file, and get the weights from their authors"
        )
    where, state = _weights(source, opened.content, ema)
    tensors: dict[str, StoredTensor] = {}
    for name, value in state.items():
        record = legacy_tensor(value)
        if not isinstance(name, str) or not isinstance(record, TensorRecord):
            raise CheckpointError(_odd(source, where, name, value))
        tensors[name] = StoredTensor(
            record.shape, record.dtype, partial(_read_record, opened, record), record.fault
        )
    return Checkpoint(source, tensors, _options(opened.content), (file,))


def _read_record(opened: TorchFile, record: TensorRecord, check: bool) -> Tensor:
    return opened.read(record, check=check)


def _open_safetensors(file: Path, source: str) -> Checkpoint:
    try:
        opened = open_safetensors(file)
        names = {name: name for name in opened.keys()}  # noqa: SIM118
        noted = opened.metadata() or {}  # save_model: removed tied name -> kept name
        tied = {name for name in noted if name not in names and noted[name] in names}
        names |= {name: noted[name] for name in tied}
        parts = {name: opened.get_slice(kept) for name, kept in names.items()}
        tensors = {
            name: StoredTensor(
                tuple(part.get_shape()),
                DTYPES.get(part.get_dtype(), torch.uint8),
                partial(_read_slice, opened, names[name]),
            )
            for name, part in parts.items()
        }
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{source}: not a whole safetensors file ({error}); fetch it again"
        ) from error
    if not tensors:
        raise CheckpointError(f"{source}: a safetensors file without a tensor; name another file")
    return Checkpoint(source, tensors, {}, (file,))


def _read_slice(opened: Any, name: str, check: bool) -> Tensor:
    return opened.get_tensor(name)


def _open_shards(index: Path, source: str) -> Checkpoint:
    """A checkpoint in several files with an index."""
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        places = content["weight_map"]
        shards = sorted(set(places.values()))
    except MALFORMED as error:
        raise CheckpointError(
            f"{source}: expected an index of shards, JSON with a weight_map of names to files, "
            f"found something else ({error}); fetch it again"
        ) from error
    if not shards or any(not isinstance(s, str) or Path(s).name != s or s in ".." for s in shards):
        raise CheckpointError(
            f"{source}: weight_map must name files beside the index, found {shards[:1]}"
        )
    absent = [shard for shard in shards if not (index.parent / shard).is_file()]
    if absent:
        raise CheckpointError(
            f"{source}: {len(absent)} of {len(shards)} shards are missing, the first is "
            f"{absent[0]!r}: put them beside the index"
        )
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        opened = _open_file(index.parent / shard, str(index.parent / shard))
        expected = {name for name, place in places.items() if place == shard}
        for name in sorted(expected ^ opened.tensors.keys()):
            found = "is not in it" if name in expected else "is in it all the same"
            says = "says that" if name in expected else "does not say that"
            raise CheckpointError(
                f"{index.parent / shard}: {index.name} {says} tensor {name!r} is in this shard, "
                f"but it {found}; fetch both again"
            )
        tensors |= opened.tensors
    return Checkpoint(source, tensors, {}, tuple(index.parent / shard for shard in shards))


def _weights(source: str, content: Any, ema: bool) -> tuple[str, Mapping[Any, Any]]:
    """(name, state dict) of the weights in a trainer's file."""
    if not isinstance(content, dict):
        raise CheckpointError(_odd(source, "", None, content))
    keys = AVERAGES if ema else LAYOUTS
    where, state = "the file", content
    for _ in range(_NESTED):
        present = [key for key in keys if key in state and not _is_tensor(state[key])]
        if len(present) > 1:  # a rate under "ema", a name under "model"
            present = [key for key in present if _may_hold_tensors(state[key])] or present
        if len(present) > 1:
            raise CheckpointError(
                f"{source}: ambiguous, weights under {listed(present)} at once; save the one you "
                'mean as {"model": state_dict}'
            )
        if not present:
            break
        where, state = present[0], state[present[0]]
        keys = LAYOUTS
        if not isinstance(state, dict):
            break
    if ema and where == "the file":
        raise CheckpointError(
            f"{source}: ema was asked for, but the file has no {listed(AVERAGES[1:])}, and no "
            f"{AVERAGES[0]!r} entry; found {listed(content)}; leave ema off, or use the trainer's "
            "own file"
        )
    if ema and state is None:
        raise CheckpointError(
            f"{source}: ema was asked for, but {where!r} is empty: the trainer kept no average; "
            "leave ema off"
        )
    others = [name for name, value in content.items() if not _is_tensor(value)]
    if where == "the file" and others:
        if isinstance(state[others[0]], Opaque):
            raise CheckpointError(_odd(source, where, others[0], state[others[0]]))
        average = next((key for key in AVERAGES if _may_hold_tensors(content.get(key))), "")
        remedy = f"set ema for the average under {average!r}" if average and not ema else SAVE_ONES
        raise CheckpointError(
            f"{source}: expected weights under {listed(LAYOUTS)}, or nothing but tensors, found "
            f"the entries {listed(content)}; {remedy}"
        )
    if isinstance(state, Opaque):
        raise CheckpointError(refused_object(source, state.name, f" under {where!r}"))
    if not isinstance(state, dict) or not state:
        found = "nothing" if isinstance(state, dict) else _type(state)
        raise CheckpointError(f"{source}: expected tensors by name in {where}, found {found}")
    return where, state


def _may_hold_tensors(value: Any) -> bool:
    """Whether it is an empty dict, or one with a tensor at most one level down."""
    if not isinstance(value, dict):
        return False
    dicts = {id(part): part for part in value.values() if isinstance(part, dict)}
    inside = (part for found in (value, *dicts.values()) for part in found.values())
    return not value or any(_is_tensor(part) for part in inside)


def _is_tensor(value: Any) -> bool:
    return isinstance(legacy_tensor(value), TensorRecord)


def _odd(source: str, where: str, name: Any, value: Any) -> str:
    """Message for something other than a tensor."""
    if isinstance(value, Opaque):
        under = f" under {shown_name(name)} in {where}" if where else ""
        return refused_object(source, value.name, under)
    if not where:
        return (
            f"{source}: expected a dict of tensors, or one under {listed(LAYOUTS)}, found "
            f"{_type(value)}"
        )
    found = f"{_type(value)} under {shown_name(name)}"
    return f"{source}: expected tensors by name in {where}, found {found}"


def _type(value: Any) -> str:
    if isinstance(value, Opaque):
        return value.name
    return "Tensor" if _is_tensor(value) else type(value).__name__


def _options(content: Any) -> dict[str, Any]:
    found = content.get(OPTIONS) if isinstance(content, dict) else None
    if isinstance(found, Opaque):  # argparse.Namespace
        found = found.state
    return found if isinstance(found, dict) else {}


def _unwrapped(source: str, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors by names without the parts of wrappers."""
    names: dict[str, str] = {}
    for name in tensors:
        plain = ".".join(part for part in name.split(".") if part not in WRAPPERS) or name
        if plain in names:
            raise CheckpointError(
                f"{source}: {names[plain]!r} and {name!r} are both {plain!r} without the names of "
                "wrappers; save the inner model's state dict"
            )
        names[plain] = name
    if len(names) > 1 and COUNTER in names and names[COUNTER] == COUNTER:
        del names[COUNTER]
    adapter = next((name for name in names if re.search(r"\.lora_[AB]\.", name)), "")
    if adapter:
        raise CheckpointError(
            f"{source}: tensor {adapter!r} is a low-rank adapter's; merge the adapters into the "
            "weights (peft's merge_and_unload) and save that model"
        )
    if (number := shard_of(Path(source).name)) and len(names):
        raise CheckpointError(
            f"{source}: this is one of {number} shards; name the index (*{INDEX}) or the "
            "directory that holds all of them"
        )
    return {plain: tensors[name] for plain, name in names.items()}
