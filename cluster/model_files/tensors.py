"""Safetensors files: locating, reading, writing, strict loading into a module."""

from __future__ import annotations

import difflib
import errno
import importlib.resources
import json
import logging
import math
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cluster.errors import CheckpointError, ConfigError, NotBuiltError
from cluster.io.files import AGAIN, storage_error, writing
from cluster.io.paths import expand_user
from cluster.io.strict_json import dumps
from cluster.model_files.file_kinds import FileKind, described, file_kind
from cluster.model_files.weight_checks import largest, losses, narrower, not_finite
from cluster.program.invocation import command_of

logger = logging.getLogger(__name__)

PACKAGE, BUILT = "package://", "built://"
SCHEMES = (PACKAGE, BUILT)
WEIGHTS_VARIABLE = "TESSERA_WEIGHTS"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Dtypes in safetensors headers."""
CONFIG_KEY = "config"
OS_ERROR = re.compile(r"\(os error (\d+)\)")  # in messages of safetensors


def weights_directory() -> Path:
    """Directory of downloads: $TESSERA_WEIGHTS, or ~/.cache/tessera.

    Raises:
        ConfigError: there is no home directory, and the variable is not set.
    """
    given = os.environ.get(WEIGHTS_VARIABLE)
    try:
        return expand_user(given or "~/.cache/tessera")
    except ConfigError as error:
        raise ConfigError(f"{error}, or set {WEIGHTS_VARIABLE}") from error


def locate(path: str | os.PathLike[str], *, directory: bool = False) -> Path:
    """The file (or directory) behind a path.

    `package://learner.miniature/networks/policy.safetensors` is a file in an installed package,
    `built://mnist/policy.safetensors` one in the directory of downloads, of the networks that
    `python -m learner.miniature.build --system mnist` trains. Every node of a cluster resolves
    both for itself.

    Raises:
        NotBuiltError: there are no networks of that name.
        CheckpointError: there is no such file.
    """
    text = os.fspath(path)
    if text.startswith(BUILT):
        place = _built(text)
    elif text.startswith(PACKAGE):
        package, _, inside = text.removeprefix(PACKAGE).partition("/")
        try:
            place = Path(str(importlib.resources.files(package).joinpath(inside)))
        except ModuleNotFoundError as error:
            raise CheckpointError(f"{text}: no package named {package!r} is installed") from error
    else:
        place = expand_user(text)
    if not (place.is_dir() if directory else place.is_file()):
        kind, other = ("directory", "a file") if directory else ("file", "a folder")
        there = f", which is {other}" if place.is_dir() or place.is_file() else ""
        raise CheckpointError(f"{text}: no such {kind} (looked at {place.absolute()}{there})")
    return place


def built_directory(system: str) -> Path:
    """Where `built://SYSTEM/` is."""
    return weights_directory() / system


def _built(text: str) -> Path:
    """The place of a path below `BUILT`; the file need not exist."""
    system, _, inside = text.removeprefix(BUILT).partition("/")
    directory = built_directory(system)
    if not directory.is_dir():
        raise NotBuiltError(
            f"{BUILT}{system}: expected networks in {directory}, found none: build them, "
            f"`{command_of('learner.miniature.build')} --system {system}`"
        )
    return directory / inside


def anywhere(path: str | os.PathLike[str]) -> Path:
    """As `locate`, for a file or a directory."""
    try:
        return locate(path)
    except CheckpointError:
        try:
            return locate(path, directory=True)
        except CheckpointError:
            pass
        raise


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The architecture in a safetensors file's header."""
    with _open(path) as file:
        return _config(path, file.metadata())


def read_shapes(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file on the meta device; unknown dtypes are int8."""
    with _open(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        try:
            return {
                name: torch.empty(
                    part.get_shape(), dtype=DTYPES.get(part.get_dtype(), torch.int8), device="meta"
                )
                for name, part in slices.items()
            }
        except (SafetensorError, RuntimeError) as error:  # of a shape that overflows
            raise _damaged(path, error) from error


def read_tensors(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, on the CPU."""
    with _open(path) as file:
        try:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, RuntimeError, TypeError) as error:
            raise _damaged(path, error) from error


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    *,
    then: str = AGAIN,
) -> None:
    """Write a safetensors file whose header carries `config` (JSON).

    Args:
        then: what to do after fixing the cause of an error.

    Raises:
        StorageError: there is no room for it.
    """
    plain = _apart({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    place = Path(path)
    with writing(place, then=then):
        try:
            save_file(plain, place, metadata={CONFIG_KEY: dumps(dict(config))})
        except SafetensorError as error:  # an error of the system, as text
            number = OS_ERROR.search(str(error))
            code = int(number[1]) if number else None
            raise storage_error(place, str(error), code, then=then) from error
        os.chmod(place, 0o644)  # safetensors writes files that only the owner can read


def _apart(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors, with copies of those that share memory (safetensors refuses tied weights)."""
    end = 0
    apart = dict(tensors)
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].data_ptr()):
        if tensor.data_ptr() < end:
            apart[name] = tensor.clone()
        end = max(end, tensor.data_ptr() + tensor.numel() * tensor.itemsize)
    return apart


def load_strict(
    module: torch.nn.Module,
    tensors: Mapping[str, torch.Tensor],
    source: str,
    *,
    ignore: Collection[str] = (),
) -> None:
    """Load a state dict whose names, shapes and types fit exactly, with finite numbers.

    Args:
        source: the file's name, for the error.
        ignore: prefixes of tensors that may be in the file, but not in the module.

    Raises:
        CheckpointError: names the first tensor that is missing, unexpected, of another shape, an
            integer tensor, not finite, or beyond the range of the module's dtype.
    """
    wanted = module.state_dict()
    given = {
        name: tensor
        for name, tensor in tensors.items()
        if name in wanted or not name.startswith(tuple(ignore))
    }
    missing = [name for name in wanted if name not in given]
    unexpected = [name for name in given if name not in wanted]
    if missing or unexpected:
        raise CheckpointError(_misfit(module, source, missing, unexpected))
    for name, tensor in given.items():
        if tensor.shape != wanted[name].shape:
            raise CheckpointError(_misshapen(module, source, name, tensor, wanted[name]))
        if wanted[name].is_floating_point() and not tensor.is_floating_point():
            raise CheckpointError(
                f"{source}: tensor {name!r} is {tensor.dtype}, expected floating-point weights; "
                "take the file that was not quantised"
            )
        _check_numbers(source, name, tensor, wanted[name])
    module.load_state_dict(given, strict=True)


def _check_numbers(source: str, name: str, given: torch.Tensor, own: torch.Tensor) -> None:
    """Check that a tensor is finite, also in the module's dtype."""
    bound = largest(given)
    if not math.isfinite(bound):
        if not own.is_meta and torch.equal(given.cpu(), own.cpu().to(given.dtype)):
            return  # a mask of the module itself
        raise CheckpointError(not_finite(source, name, given))
    if narrower(given.dtype, own.dtype):
        if torch.tensor(bound, dtype=torch.float64).to(own.dtype).isinf():
            losses({name: given}, own.dtype).refuse_overflow(source, own.dtype)
        if own.dtype is torch.float16 and (
            lost := losses({name: given}, own.dtype).warning(own.dtype)
        ):
            logger.warning("%s: %s", source, lost)


def _misshapen(
    module: torch.nn.Module, source: str, name: str, given: torch.Tensor, own: torch.Tensor
) -> str:
    if own.numel() and not given.numel():
        return (
            f"{source}: tensor {name!r} is empty, of shape {tuple(given.shape)}: ZeRO-3 and FSDP "
            "write such files where a process has no part of it; save the whole state dict"
        )
    return (
        f"{source}: tensor {name!r} has shape {tuple(given.shape)}, but {type(module).__name__} "
        f"expects {tuple(own.shape)}: is this the file of another model size?"
    )


def _misfit(module: torch.nn.Module, source: str, missing: list[str], unexpected: list[str]) -> str:
    parts = [f"{source} does not fit {type(module).__name__}:"]
    if prefix := _prefix(missing, unexpected):
        return (
            f"{parts[0]} the names of its weights begin with {prefix!r}, as of a part of another "
            f"module (Lightning's have such names): save that part's weights alone, "
            f'torch.save({{"model": {{k.removeprefix({prefix!r}): v for k, v in state_dict.items() '
            f"if k.startswith({prefix!r})}}}}, PATH)"
        )
    if missing:
        parts.append(f"{len(missing)} tensors are missing, the first is {missing[0]!r}")
        close = difflib.get_close_matches(missing[0], unexpected, n=1)
        if close:
            parts.append(f"(the file has {close[0]!r})")
    if unexpected:
        parts.append(f"{len(unexpected)} tensors are unexpected, the first is {unexpected[0]!r}")
    return " ".join(parts)


def _prefix(missing: list[str], unexpected: list[str]) -> str:
    """Common prefix of all missing names in the file (Lightning's `model.`); else empty."""
    first = missing[0] if missing else ""
    found = [
        name.removesuffix(first) for name in unexpected if first and name.endswith(f".{first}")
    ]
    given = set(unexpected)
    return next((part for part in found if all(part + name in given for name in missing)), "")


def open_safetensors(file: Path) -> Any:
    """Open a safetensors file, whose tensors are read on request, on the CPU.

    Raises:
        SafetensorError: damaged.
        OSError: it cannot be read.
    """
    try:
        return safe_open(file, framework="pt", device="cpu")
    except RuntimeError as error:  # torch's: the system gives no map of more than its memory
        raise OSError(errno.ENOMEM, f"it is larger than this machine's memory: {error}") from error


def _open(path: str | os.PathLike[str]) -> Any:
    file = locate(path)
    try:
        return open_safetensors(file)
    except OSError as error:
        raise CheckpointError(
            f"{os.fspath(path)}: it cannot be read ({error.strerror or error})"
        ) from error
    except SafetensorError as error:
        if file_kind(file) is not FileKind.SAFETENSORS:
            raise CheckpointError(
                f"{os.fspath(path)}: expected a safetensors file, found {described(file)}"
            ) from error
        raise _damaged(file, error) from error


def _damaged(path: str | os.PathLike[str], error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{os.fspath(path)}: not a whole safetensors file ({error}); fetch or build it again"
    )


def _config(path: str | os.PathLike[str], metadata: Mapping[str, str] | None) -> dict[str, Any]:
    text = (metadata or {}).get(CONFIG_KEY)
    if text is None:
        raise CheckpointError(
            f"{os.fspath(path)}: the file's header has no {CONFIG_KEY!r} entry with the "
            "architecture; was it written by this program?"
        )
    try:
        config = json.loads(text)
    except ValueError as error:
        raise _damaged(path, error) from error
    if not isinstance(config, dict):
        raise _damaged(path, TypeError(f"the architecture is {text[:40]!r}"))
    return config
