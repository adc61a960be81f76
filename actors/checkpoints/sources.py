"""Where a model's tensors and its architecture are: our file, an official one, or a named model.

Our safetensors files carry their architecture. Files of other programs do not: a named model
(`actors.checkpoints.zoo`), taming's project file or a JSON file states it. Nothing is guessed:
head count and grid are not in official files, and wrong ones would load and draw noise.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from actors.checkpoints.families import Kind
from actors.checkpoints.official import OfficialFile, open_official
from actors.checkpoints.taming import TamingProject, read_project
from actors.checkpoints.taming_vqgan import tokenizer_tensors
from actors.checkpoints.zoo import FAMILIES, MODELS, candidates, family_of, find_model
from actors.models.base import Architecture, PolicyArchitecture
from actors.models.vq import VQConfig
from cluster.errors import CheckpointError, ConfigError
from cluster.model_files.architectures import from_fields
from cluster.model_files.checkpoints import is_own
from cluster.model_files.tensors import anywhere, locate, read_config
from cluster.program.invocation import command_of

YAML = (".yaml", ".yml")
JSON = ".json"
SAFETENSORS = ".safetensors"


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a model's tensors and its architecture are; opens nothing."""

    file: str
    architecture: str = ""
    """A named model, or the path of a file; empty: in the header of `file`."""
    ema: bool = False
    name: str = ""
    """The name of the checkpoint, if it is a named model."""

    @classmethod
    def of(cls, checkpoint: str, architecture: str = "", ema: bool = False) -> Source:
        """The source behind a configured checkpoint.

        Raises:
            ConfigError: no such name, or options that the kind of checkpoint does not have.
        """
        if checkpoint in MODELS or _looks_like_name(checkpoint):
            model = find_model(checkpoint)
            if architecture not in ("", checkpoint):
                raise ConfigError(
                    f"checkpoint {checkpoint!r} is a named model, but architecture says "
                    f"{architecture!r}: leave architecture empty, or give the file's path"
                )
            if not model.file:
                raise ConfigError(
                    f"no official file of {checkpoint!r} is published: give the path of your own "
                    f"as checkpoint, and {checkpoint!r} as architecture"
                )
            return cls(file=str(model.path()), architecture=checkpoint, ema=ema, name=checkpoint)
        source = cls(file=checkpoint, architecture=architecture, ema=ema)
        if architecture and _suffix(architecture) not in (*YAML, JSON):
            find_model(architecture)  # raises for an unknown name
        if (architecture or ema) and not source.official:
            raise ConfigError(
                f"{checkpoint} is no official file: it was written by this program and carries its "
                "own architecture and one set of weights, so leave architecture empty and ema off"
            )
        return source

    @property
    def official(self) -> bool:
        """Whether the file was written by another program; name and options decide if it does
        not exist."""
        if Path(self.file).suffix.lower() != SAFETENSORS or self.architecture or self.ema:
            return not is_own(self.file)
        return _is_there(self.file) and not is_own(self.file)

    def project(self) -> TamingProject | None:
        """The taming project file that describes this source, if one does."""
        if _suffix(self.architecture) in YAML:
            return read_project(self.architecture)
        model = MODELS.get(self.architecture)
        if model is None or not model.project:
            return None
        if not model.project_path().is_file():
            raise CheckpointError(
                f"{model.name} needs its project file at {model.project_path()}: run "
                f"`{command_of('actors.weights')} fetch {model.name}` to see which one that is"
            )
        return read_project(model.project_path())

    def open(self, kind: Kind | None = None, *, check: bool = True) -> OfficialFile:
        """Read an official file; see `open_official`.

        Raises:
            CheckpointError: see `open_official`; or not fetched yet, with the command to do it.
        """
        if self.name and not Path(self.file).is_file():
            raise CheckpointError(
                f"{self.name} is not there (looked for {self.file}): run "
                f"`{command_of('actors.weights')} fetch {self.name}`"
            )
        return open_official(self.file, kind, ema=self.ema, check=check)


def policy_architecture(source: Source) -> PolicyArchitecture:
    """The architecture of a policy's source; reads a header or a project file at most.

    Raises:
        CheckpointError: it is a tokenizer's, or not readable.
        ConfigError: it has to be named, and is not.
    """
    found = _architecture(source, "policy")
    assert not isinstance(found, VQConfig)
    return found


def tokenizer_architecture(source: Source) -> VQConfig:
    """As `policy_architecture`, of a tokenizer. taming's policy files hold their tokenizer."""
    found = _architecture(source, "tokenizer")
    assert isinstance(found, VQConfig)
    return found


def planned_policy(source: Source) -> PolicyArchitecture:
    """As `policy_architecture`, for a plan: a taming model without its project file has the
    published sizes."""
    published = _published(source)
    return published[0] if published else policy_architecture(source)


def planned_tokenizer(source: Source) -> VQConfig:
    """As `planned_policy`, of a tokenizer."""
    published = _published(source)
    return published[1] if published else tokenizer_architecture(source)


def _published(source: Source) -> tuple[PolicyArchitecture, VQConfig] | None:
    model = MODELS.get(source.architecture)
    if model is None or model.published is None or model.project_path().is_file():
        return None
    return model.published


def kind_of(source: Source) -> Kind:
    """Whether a source holds a policy or a tokenizer; taming's policy files are policies.

    Raises:
        CheckpointError, ConfigError: as `policy_architecture`.
    """
    if (project := source.project()) is not None:
        return "tokenizer" if project.policy is None else "policy"
    if source.architecture in MODELS:
        return MODELS[source.architecture].kind
    return "tokenizer" if _header(source, "policy").get("family") == VQConfig.family else "policy"


def official_tensors(
    source: Source, architecture: Architecture, *, check: bool = True
) -> dict[str, Tensor]:
    """The tensors of an official file under our names, in the file's dtypes.

    Args:
        check: verify checksums, which reads the whole file.

    Raises:
        CheckpointError: see `open_official`; or the file contradicts the architecture.
    """
    kind: Kind = "tokenizer" if isinstance(architecture, VQConfig) else "policy"
    file = source.open(kind, check=check)
    _refuse_contradiction(source, file, architecture)
    if not isinstance(architecture, VQConfig):
        return family_of(architecture).from_official(file.tensors, architecture, source.file)
    if source.project() is not None:
        return tokenizer_tensors(file.tensors, source.file)
    return file.tensors


def architecture_from(header: Mapping[str, Any], path: str, kind: Kind) -> Architecture:
    """The architecture that a header or JSON file describes.

    Raises:
        CheckpointError: of another kind, or with a field that is not known.
    """
    fields = dict(header)
    family = str(fields.pop("family", None))
    policies = {family.name: family.architecture for family in FAMILIES}
    wanted: dict[str, type[Any]] = policies if kind == "policy" else {VQConfig.family: VQConfig}
    if family not in wanted:
        raise CheckpointError(
            f"{path} holds a {family!r}, expected a {' or a '.join(map(repr, wanted))}"
        )
    return from_fields(wanted[family], fields, path)


def _architecture(source: Source, kind: Kind) -> Architecture:
    if (project := source.project()) is not None:
        found = project.policy if kind == "policy" else project.tokenizer
        if found is None:
            raise CheckpointError(f"{source.architecture} describes a VQGAN, expected a policy")
        return found
    model = MODELS.get(source.architecture)
    if model is None or model.architecture is None:
        return architecture_from(_header(source, kind), source.architecture or source.file, kind)
    if model.kind != kind:
        raise CheckpointError(f"{model.name} is a {model.kind}, expected a {kind}")
    return model.architecture


def _header(source: Source, kind: Kind) -> Mapping[str, Any]:
    """The fields of an architecture, of a safetensors header or a JSON file."""
    if not source.official:
        return read_config(source.file)
    if not source.architecture:
        raise ConfigError(_which_architecture(source, kind))
    if _suffix(source.architecture) != JSON:
        find_model(source.architecture)  # raises for an unknown name
    try:
        fields = json.loads(locate(source.architecture).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source.architecture}: not valid JSON ({error})") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{source.architecture}: expected an object of architecture fields")
    return fields


def _which_architecture(source: Source, kind: Kind) -> str:
    tensors = source.open(kind, check=False).tensors
    if any(name.startswith(("transformer.", "decoder.up.")) for name in tensors):
        advice = "this is a taming file, so give the path of its *-project.yaml"
    elif names := candidates(tensors, kind) or candidates(tensors, "tokenizer"):
        advice = f"width, depth and vocabulary are those of {', '.join(names)}"
    else:
        advice = f"no named {kind} has its width, depth and vocabulary; give a .json of the fields"
    lacks = "its number of heads and its grid" if kind == "policy" else "its architecture"
    option = "architecture" if kind == "policy" else "the tokenizer's architecture"
    return f"{source.file} is an official file, which does not say {lacks}: set {option}; {advice}"


def _refuse_contradiction(source: Source, file: OfficialFile, architecture: Architecture) -> None:
    """Refuse a file whose name, buffers or options belong to another architecture."""
    for model in MODELS.values():
        if model.file == Path(source.file).name and model.architecture not in (None, architecture):
            raise CheckpointError(
                f"{source.file} has the name of the official file of {model.name}, but "
                f"architecture is {source.architecture}; rename the file if it is not that one"
            )
    if isinstance(architecture, VQConfig):
        return
    if contradiction := family_of(architecture).check(architecture, file.buffers, file.options):
        raise CheckpointError(f"{source.file}, architecture {source.architecture}: {contradiction}")


def _looks_like_name(checkpoint: str) -> bool:
    """Whether a checkpoint is neither a path nor a file name."""
    if {"/", "\\"} & set(checkpoint) or Path(checkpoint).suffix:
        return False
    return not Path(checkpoint).exists()


def _is_there(path: str) -> bool:
    try:
        return anywhere(path).exists()
    except CheckpointError:
        return False


def _suffix(path: str) -> str:
    return Path(path).suffix.lower()
