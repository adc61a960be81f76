"""Official checkpoint files: `python -m actors.weights list | fetch | convert | export`.

`fetch` downloads a named model from the hub, `convert` turns an official file into a safetensors
file that carries its architecture, `export` writes a policy in the official layout, for the
official sampling scripts. Official -> convert -> export reproduces every tensor bit for bit.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    import sys

    from cluster.program.start import run_command

    sys.exit(run_command("actors.weights"))

import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.table import Table
from safetensors import SafetensorError
from torch import Tensor

from actors.checkpoints.families import Family, Kind, NamedModel
from actors.checkpoints.hub import UnreachableError, fetch
from actors.checkpoints.loading import check_fit, count_parameters
from actors.checkpoints.sources import (
    Source,
    architecture_from,
    kind_of,
    official_tensors,
    policy_architecture,
    tokenizer_architecture,
)
from actors.checkpoints.taming import read_project
from actors.checkpoints.taming_vqgan import official_tokenizer_tensors
from actors.checkpoints.zoo import MODELS, family_of, find_model
from actors.models.base import Architecture
from actors.models.vq import VQConfig
from actors.sample_source import complete_checkpoints
from cluster.errors import CheckpointError, ConfigError
from cluster.io.files import replacing
from cluster.io.locks import locked_file
from cluster.io.paths import output_path
from cluster.io.run_layout import POLICY_FILE
from cluster.model_files.tensors import (
    anywhere,
    read_config,
    read_tensors,
    weights_directory,
    write_tensors,
)
from cluster.model_files.weight_checks import check_finite, losses
from cluster.program import logs
from cluster.program.console import exit_status, make_console
from cluster.program.invocation import command_of

logger = logging.getLogger(__name__)

SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")  # of what the official scripts load
CODEBOOK_USED = "quantize.codebook_used"
CODEBOOK_USED_SIZE = 65536


@dataclass(frozen=True, kw_only=True)
class FetchCommand:
    """Download a named model from the Hugging Face hub, resumed and verified."""

    name: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="NAME")]]
    """Name of the model; `list` shows them."""
    directory: str = ""
    """Target; empty is $TESSERA_WEIGHTS or ~/.cache/tessera, where names are looked up."""


@dataclass(frozen=True, kw_only=True)
class ListCommand:
    """Show the named models."""

    directory: str = ""
    """Where to look for fetched files; empty is $TESSERA_WEIGHTS or ~/.cache/tessera."""


@dataclass(frozen=True, kw_only=True)
class ConvertCommand:
    """Turn an official file into a safetensors file that carries its architecture."""

    source: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="SOURCE")]]
    """Official checkpoint (torch.save's, safetensors, a directory of shards), or the name of a
    fetched model."""
    target: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="TARGET")]]
    """File to write, *.safetensors."""
    architecture: str = ""
    """Name of a model, taming's *-project.yaml, or a .json of the fields."""
    ema: bool = False
    """Take the trainer's moving average of the weights."""
    part: Literal["auto", "policy", "tokenizer"] = "auto"
    """Which part of a file that holds policy and tokenizer (taming, AR-GRPO); auto is that of the
    architecture, of taming's files the policy."""
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = "keep"
    """Of the tensors in the target. Overflow to infinity is refused."""


@dataclass(frozen=True, kw_only=True)
class ExportCommand:
    """Write a policy or tokenizer in the official layout, for the official scripts."""

    source: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="SOURCE")]]
    """Safetensors file, checkpoint directory, or run directory (its newest checkpoint)."""
    target: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="TARGET")]]
    """File to write, *.pt or *.ckpt."""
    layout: Literal["official", "fsdp"] = "official"
    """official: {"model": tensors}, taming {"state_dict": tensors}; fsdp: the bare tensors, for
    --from-fsdp."""
    base: str = ""
    """taming: the official file that the policy came from; its tokenizer goes into the target."""


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    commands: dict[type, Callable[[Any], None]] = {
        FetchCommand: run_fetch,
        ListCommand: run_list,
        ConvertCommand: run_convert,
        ExportCommand: run_export,
    }
    command: Any = tyro.cli(
        Annotated[FetchCommand, tyro.conf.subcommand("fetch")]
        | Annotated[ListCommand, tyro.conf.subcommand("list")]
        | Annotated[ConvertCommand, tyro.conf.subcommand("convert")]
        | Annotated[ExportCommand, tyro.conf.subcommand("export")],
        args=arguments,
        prog=command_of("actors.weights"),
        description=__doc__,
    )
    with logs.to_console(make_console()):
        return exit_status(
            lambda: commands[type(command)](command),
            refused=(ConfigError, UnreachableError),
            stopped="stopped; run the same command again to resume",
        )


def run_fetch(command: FetchCommand) -> None:
    """See `actors.checkpoints.hub.fetch`."""
    fetch(find_model(command.name), _directory(command.directory))


def _directory(given: str) -> Path:
    return output_path(given, "--directory") if given else weights_directory()


def run_list(command: ListCommand) -> None:
    """Print the table of models."""
    directory = _directory(command.directory)
    table = Table(title=f"files in {directory}", title_justify="left")
    for column in ("name", "kind", "parameters", "fp32", "grid", "tokenizer", "file"):
        right = column in ("parameters", "fp32")
        table.add_column(column, justify="right" if right else "left", no_wrap=True)
    for model in MODELS.values():
        table.add_row(model.name, model.kind, *_sizes(model, directory), _state(model, directory))
    console = make_console()
    (console if console.is_terminal else make_console(width=200)).print(table)


def run_convert(command: ConvertCommand) -> None:
    """Official file to safetensors."""
    command = replace(command, target=output_path(command.target, "TARGET"))
    source = Source.of(command.source, command.architecture, command.ema)
    if not source.official:
        raise ConfigError(
            f"{command.source} is no official file: it was written by this program already"
        )
    if command.target.suffix.lower() != ".safetensors":
        raise ConfigError(f"{command.target}: expected a name that ends in .safetensors")
    kind: Kind = kind_of(source) if command.part == "auto" else command.part
    architecture: Architecture = (
        policy_architecture(source) if kind == "policy" else tokenizer_architecture(source)
    )
    with _fresh(command.target) as partial:
        tensors = official_tensors(source, architecture)
        check_fit(tensors, architecture, source)
        check_finite(tensors, source.file)
        if command.dtype != "keep":
            tensors = in_dtype(tensors, getattr(torch, command.dtype), source.file)
        write_tensors(partial, tensors, architecture.to_dict())
    _report(command.target, tensors)


def in_dtype(tensors: Mapping[str, Tensor], dtype: torch.dtype, source: str) -> dict[str, Tensor]:
    """Tensors in another type; warns of underflow.

    Args:
        source: the file's name, for messages.

    Raises:
        CheckpointError: a number would become infinite.
    """
    lost = losses(tensors, dtype)
    lost.refuse_overflow(source, dtype)
    if warning := lost.warning(dtype):
        logger.warning("%s: %s", source, warning)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def run_export(command: ExportCommand) -> None:
    """Safetensors to an official layout."""
    command = replace(command, target=output_path(command.target, "TARGET"))
    source = newest_policy(command.source)
    if command.target.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"{command.target}: expected a name that ends in {' '.join(SUFFIXES)}")
    header = read_config(source)
    kind: Kind = "tokenizer" if header.get("family") == VQConfig.family else "policy"
    architecture = architecture_from(header, str(source), kind)
    family = family_of(architecture)
    if command.base and (kind == "tokenizer" or family.merge_base is None):
        raise ConfigError(f"base is for taming's policies, but {source} is none: leave it empty")
    if command.layout not in family.layouts:
        raise ConfigError(
            f"the scripts of {family.name} read no layout but {', '.join(family.layouts)}"
        )
    with _fresh(command.target) as partial:
        tensors = read_tensors(source)
        check_fit(tensors, architecture, Source(file=str(source)))
        check_finite(tensors, str(source))
        tensors = official_state(tensors, architecture, family, command.base)
        torch.save(family.layouts[command.layout](tensors), partial)
    _report(command.target, tensors)


def official_state(
    tensors: dict[str, Tensor], architecture: Architecture, family: Family, base: str = ""
) -> dict[str, Tensor]:
    """The whole state dict of the official module, from tensors under our names.

    Args:
        base: official file whose other parts (taming: VQGAN, permuter) are added.

    Raises:
        CheckpointError: the base is of another architecture.
        ConfigError: there is no official layout that holds them.
    """
    if not isinstance(architecture, VQConfig):
        state = family.to_official(tensors, architecture)
        if base and family.merge_base:
            return family.merge_base(state, Source.of(base).open().tensors, base)
        return state
    if architecture.pixel_rule == "taming":
        return official_tokenizer_tensors(tensors)
    # A buffer of usage counts that the official tokenizer has and loads strictly.
    return {CODEBOOK_USED: torch.zeros(CODEBOOK_USED_SIZE), **tensors}


def newest_policy(source: str) -> Path:
    """The policy's file of a file, checkpoint directory or run directory.

    Raises:
        CheckpointError: no such path.
        ConfigError: no policy there.
    """
    place = anywhere(source)
    if place.is_file():
        return place
    if (place / POLICY_FILE).is_file():
        return place / POLICY_FILE
    steps = {step: path / POLICY_FILE for step, path in complete_checkpoints(place).items()}
    if not steps:
        raise ConfigError(
            f"{source}: expected a safetensors file, a checkpoint directory with {POLICY_FILE}, or "
            f"a run directory with checkpoints/step_*/{POLICY_FILE}"
        )
    return steps[max(steps)]


@contextmanager
def _fresh(target: Path) -> Iterator[Path]:
    """A temporary file that is renamed to `target` when complete; never overwrites."""
    try:
        with locked_file(target, str(target)):
            if target.exists():
                raise ConfigError(f"{target} exists and is not overwritten; name another file")
            with replacing(target) as partial:
                yield partial
    except (OSError, RuntimeError, SafetensorError) as error:  # the latter two: a full disk
        raise CheckpointError(f"{target}: not written ({error})") from error


def _report(target: Path, tensors: dict[str, Tensor]) -> None:
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    size = _human(target.stat().st_size)
    print(f"{target}: {len(tensors)} tensors, {', '.join(dtypes)}, {size}")


def _sizes(model: NamedModel, directory: Path) -> tuple[str, str, str, str]:
    """Parameters, size in fp32, grid and tokenizer."""
    architecture: Architecture | None = model.architecture
    place = model.project_path(directory)
    if model.project and place.is_file():
        project = read_project(place)
        architecture = project.policy if model.kind == "policy" else project.tokenizer
    if architecture is None:
        return "?", "?", "?", model.tokenizer
    count = count_parameters(architecture)
    if isinstance(architecture, VQConfig):
        grid = f"1/{architecture.downsampling}"
    else:
        grid = f"{architecture.grid}x{architecture.grid}"
    return f"{count / 1e6:,.0f} M", _human(4 * count), grid, model.tokenizer


def _state(model: NamedModel, directory: Path) -> str:
    if not model.file:
        return "none published"
    if all((directory / name).is_file() for name in model.files):
        return f"{model.file}, {_human(model.path(directory).stat().st_size)}"
    return "to be placed by hand" if model.project else "not fetched"


def _human(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
