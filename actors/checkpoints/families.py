"""What a family of policies declares: its networks, its official files, its named models.

A family is one `Family` record in a module of its own (`llamagen.py`, `taming.py`) and one line in
`zoo.FAMILIES`; loading, exporting, planning and preflight read everything from the record.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from actors.models.base import PolicyArchitecture
from actors.models.vq import VQConfig
from cluster.model_files.tensors import weights_directory

HUB = "https://huggingface.co"

Kind = Literal["policy", "tokenizer"]
Tensors = dict[str, Tensor]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class NamedModel:
    """A model that has a name: its architecture, its official file, its tokenizer."""

    name: str
    kind: Kind
    architecture: PolicyArchitecture | VQConfig | None = None
    """None: the project file beside the checkpoint says (taming)."""
    repo: str = ""
    """Repository on the Hugging Face hub; empty where no file is published there."""
    file: str = ""
    """File name in the repository, and in the weights directory."""
    project: str = ""
    """taming: name of the project file in the weights directory."""
    page: str = ""
    """taming: web page that links to the files."""
    origin: str = ""
    """taming: the entry in that page's table of models."""
    tokenizer: str = ""
    """Name of the policy's tokenizer; the policy's own name if its file holds both."""
    published: tuple[PolicyArchitecture, VQConfig] | None = None
    """taming: published sizes of policy and tokenizer, for plans made before the project file is
    there."""

    @property
    def url(self) -> str:
        """Where the official file is, or the page that links to it."""
        if self.project:
            return f"{self.page} (table of models, {self.origin!r})"
        return f"{HUB}/{self.repo}/resolve/main/{self.file}"

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files in the weights directory."""
        return tuple(name for name in (self.file, self.project) if name)

    def path(self, directory: Path | None = None) -> Path:
        """Where `fetch` puts the checkpoint."""
        return (directory or weights_directory()) / self.file

    def project_path(self, directory: Path | None = None) -> Path:
        """Where the project file belongs."""
        return (directory or weights_directory()) / self.project


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family of policies. `config` below stands for an instance of its architecture."""

    architecture: type[PolicyArchitecture]
    """Its attribute `family` is the family's name in the header of our files."""
    module: type[Any]
    """The network, a `Policy`; built from a config."""
    from_official: Callable[[Mapping[str, Tensor], Any, str], Tensors]
    """(official state dict, config, file name) -> tensors under our names."""
    to_official: Callable[[Tensors, Any], Tensors]
    """(our tensors, config) -> state dict of the official module."""
    layouts: Mapping[str, Callable[[Tensors], dict[str, Any]]]
    """What `export` saves of that state dict, by the name of the layout."""
    merge_base: Callable[[Tensors, Mapping[str, Tensor], str], Tensors] | None = None
    """(exported state dict, that of the official base file, the base file's name) -> state dict
    with the base's other tensors; None where official files hold only a policy."""
    check: Callable[[Any, Shapes, Mapping[str, Any]], str] = lambda config, buffers, options: ""
    """(config, shapes of an official file's buffers, its trainer's options) -> how they contradict
    each other, or nothing."""
    buffers: tuple[str, ...] = ()
    """Patterns of names in official files that are no weights and follow from the architecture."""
    tokenizer_prefix: str = ""
    """Prefix of the names of the tokenizer's tensors in a policy's official file."""
    layer_activations: Callable[[Any, Literal["fp32", "bf16"]], int]
    """(config, precision) -> bytes that autograd keeps of one layer, per token."""
    norm_activations: int
    """Bytes that the last norm keeps, per token and unit of width."""
    models: tuple[NamedModel, ...]
    """Its named models, tokenizers included."""

    @property
    def name(self) -> str:
        return self.architecture.family
