"""Messages for files that are not readable checkpoints, by kind of file."""

from __future__ import annotations

import re
import tarfile
import zipfile
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from cluster.errors import CheckpointError
from cluster.model_files.file_kinds import FileKind, described

INDEX = ".index.json"
SUPPORTED = "a checkpoint (torch.save's file, safetensors, or the index of its shards)"
SAVE = 'torch.save({"model": model.state_dict()}, PATH)'
_FILES = (  # names that libraries give; earlier ones are preferred
    f"model.safetensors{INDEX}",
    f"diffusion_pytorch_model.safetensors{INDEX}",
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
    f"pytorch_model.bin{INDEX}",
    "pytorch_model.bin",
)
LONGEST = 200  # characters of a name in messages
_BEGINNING = 60  # bytes of a text in messages
_SHARD = re.compile(r"-\d+-of-0*([1-9]\d*)\.[a-z]+$", re.IGNORECASE)
_CHECKPOINT = re.compile(r"\.(pt|pth|ckpt|bin|safetensors)$", re.IGNORECASE)

# Modules and functions that harmful pickles name, and files of weights do not.
_PROGRAMS = frozenset(
    {"os", "posix", "nt", "sys", "subprocess", "pty", "shutil", "socket", "ctypes", "runpy", "imp"}
    | {"importlib", "code", "codeop", "pdb", "commands", "webbrowser", "pickle", "marshal"}
)
_RUNNERS = frozenset(
    f"{module}.{name}"
    for module in ("builtins", "__builtin__")
    for name in ("eval", "exec", "execfile", "compile", "open", "__import__", "input", "vars")
)

_ADVICE: dict[FileKind, str] = {
    FileKind.TORCHSCRIPT: (
        "a TorchScript archive, a program with its weights, as OpenAI's CLIP files are; programs "
        "are not run. For OpenAI's CLIP name the tag `openai`; of another, save the weights alone: "
        "torch.save(torch.jit.load(FILE).state_dict(), PATH)"
    ),
    FileKind.PICKLE: (
        "a pickle that torch.save did not write; pickled objects are not read, they can run any "
        f"program. Save the weights where it was made: {SAVE}"
    ),
    FileKind.NPZ: (
        "an .npz file of arrays, as JAX programs save weights; convert them to this model's names "
        "in safetensors"
    ),
    FileKind.NPY: "one array, not weights by name; name another file",
    FileKind.GGUF: (
        "a GGUF file of quantised weights, which cannot be tuned; take the file it was made from"
    ),
    FileKind.HDF5: "an HDF5 file, as Keras writes; convert it to PyTorch's names in safetensors",
    FileKind.IMAGE: "an image; name the weights",
    FileKind.PARQUET: "a Parquet file; name the weights",
    FileKind.PDF: "a PDF; name the weights",
}


def no_checkpoint(file: Path, source: str, kind: FileKind) -> str:
    """Message for a kind of file that is not a checkpoint."""
    advice = _ADVICE.get(kind) or described(file)
    if kind is FileKind.CUT_ZIP:
        advice = "a checkpoint that was cut off, or another damaged zip archive; fetch it again"
    elif kind is FileKind.ZIP and (inside := _inside_zip(file)):
        advice = f"a zip archive with {inside} in it; unpack it, and name that file"
    elif kind is FileKind.TAR:
        advice = _tar(file)
    elif file.suffix.lower() == ".msgpack":
        advice = "flax's msgpack; convert it to PyTorch's names in safetensors"
    elif kind is FileKind.TEXT:
        advice = _text(file)
    return f"{source}: expected {SUPPORTED}, found {advice}"


def broken(source: str, problem: str) -> str:
    """Message for a truncated file."""
    return f"{source}: not a whole checkpoint ({problem}); was it cut short? Fetch it again"


def executes(names: Collection[str]) -> str:
    """The first function or class that can run programs; empty if there is none."""
    for name in sorted(names):
        if name.split(".")[0] in _PROGRAMS or name in _RUNNERS:
            return name
    return ""


def refused_object(source: str, name: str, under: str) -> str:
    """Message for an object in the place of weights.

    Args:
        under: place in the file, after a space; empty: the whole file.
    """
    if name.startswith("torch.distributed"):
        return (
            f"{source}: expected tensors, found a {name}{under}, which is one machine's part: save "
            "the whole state dict (torch.distributed.checkpoint.state_dict.get_model_state_dict "
            "with full_state_dict=True)"
        )
    return (
        f"{source}: expected tensors in plain containers, found a pickled {name}{under}, which is "
        "refused because building it could run code. If you trust the file, save its weights "
        f"alone, {SAVE}, where it was made"
    )


def shard_of(name: str) -> int:
    """Number of shards of which a file is one, by its name; else 0."""
    found = _SHARD.search(name)
    number = int(found[1]) if found else 0
    return number if number > 1 else 0


def index_in(directory: Path, source: str) -> Path:
    """The checkpoint in a directory of `save_pretrained`: an index of shards, or one file.

    Raises:
        CheckpointError: there is none; says what the directory is.
    """
    for name in _FILES:
        if (directory / name).is_file():
            return directory / name
    expected = f"{source}: expected a checkpoint, found a directory"
    if (directory / ".metadata").is_file():
        raise CheckpointError(
            f"{expected} of torch.distributed.checkpoint, a part of each process: put "
            "them together with `python -m torch.distributed.checkpoint.format_utils "
            "dcp_to_torch DIRECTORY FILE` and name that file"
        )
    if (directory / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{expected} of peft's adapters, which are no whole model: merge them "
            "(model.merge_and_unload()), save that model, and name its file"
        )
    _refuse_deepspeed(directory, expected)
    names = sorted(file.name for file in directory.iterdir() if _CHECKPOINT.search(file.name))
    if any(shard_of(name) for name in names):
        raise CheckpointError(
            f"{expected} with shards ({names[0]}, ...) and no {_FILES[0]}, which says what is in "
            "them: fetch it, too"
        )
    inside = f"with {', '.join(names[:4])}: name one of them" if names else "with none in it"
    raise CheckpointError(f"{expected} {inside}")


def _refuse_deepspeed(directory: Path, expected: str) -> None:
    parts = sorted(directory.glob("**/mp_rank_*_model_states.pt"))[:9]
    zero = next(directory.glob("**/*zero_pp_rank_*"), None)
    if zero is not None and zero.name.endswith("model_states.pt"):
        raise CheckpointError(
            f"{expected} of DeepSpeed's ZeRO-3, in parts: put them together with the script beside "
            "it, `python zero_to_fp32.py DIRECTORY FILE`, and name that file"
        )
    if parts:
        which = f"name {parts[0]}" if len(parts) == 1 else "put its parts together first"
        raise CheckpointError(f"{expected} of DeepSpeed: {which}")


def _inside_zip(file: Path) -> str:
    """A checkpoint in an archive."""
    with zipfile.ZipFile(file) as archive:
        return next((name for name in archive.namelist() if _CHECKPOINT.search(name)), "")


def _text(file: Path) -> str:
    with file.open("rb") as stream:
        start = stream.read(_BEGINNING).decode("utf-8", "replace")
    return (
        f"a text file that begins with {start!r}: if that is what a server answered, fetch the "
        "file again, else name the weights"
    )


def _tar(file: Path) -> str:
    try:
        with tarfile.open(file, mode="r:") as archive:
            names = [member.name for _, member in zip(range(9), archive)]
    except (tarfile.TarError, OSError, ValueError, EOFError):
        return "a tar archive that is not whole; fetch it again"
    if {"storages", "pickle"} <= set(names):
        return (
            "a file of torch before 0.2, a tar archive; load it once with torch.load where you "
            "trust it, and save it again"
        )
    return f"a tar archive ({', '.join(names[:3])}, ...); unpack it, and name the checkpoint in it"


def listed(names: Iterable[Any], limit: int = 8) -> str:
    """The first names, quoted, for a message."""
    every = list(names)
    shown = [shown_name(name) for name in every[:limit]]
    return ", ".join(shown) + (", ..." if len(every) > limit else "") if shown else "nothing"


def shown_name(name: Any) -> str:
    """Any object used as a name in a file, for a message."""
    if isinstance(name, str):
        return f"{name[:LONGEST]!r}" + ("..." if len(name) > LONGEST else "")
    small = isinstance(name, int) and abs(name) < 1 << 64  # Python prints no number of any length
    return repr(name) if small else f"({type(name).__name__})"
