"""taming-transformers as a family: project files, tensor names to ours and back, named models.

A Lightning checkpoint holds `transformer.*` (the policy), `first_stage_model.*` (the VQGAN), and
`permuter.*` tables; a VQGAN's own file has no prefix. The number of heads and the like are in the
run's `*-project.yaml`; classes named there (`target`) that are not known here are refused.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from actors.checkpoints.families import Family, Kind, NamedModel
from actors.models.permuters import inverse, permutation
from actors.models.taming import TamingConfig, TamingGPT
from actors.models.vq import VQConfig
from cluster.errors import CheckpointError, ConfigError
from cluster.io import strict_yaml
from cluster.model_files.architectures import from_fields
from cluster.model_files.tensors import locate

T = TypeVar("T")

NET2NET = "taming.models.cond_transformer.Net2NetTransformer"
VQGAN = "taming.models.vqgan.VQModel"
GPT = "taming.modules.transformer.mingpt.GPT"
CLASS_STAGE = "taming.modules.util.Labelator"
START_STAGE = "taming.modules.util.SOSProvider"
COORDINATE_STAGE = "taming.modules.misc.coord.CoordStage"
PERMUTERS = "taming.modules.transformer.permuter."
UNCONDITIONAL = "__is_unconditional__"

POLICY = "transformer."
TOKENIZER = "first_stage_model."
PERMUTER = "permuter."
MASK = ".attn.mask"

PAGE = "https://github.com/CompVis/taming-transformers"


@dataclass(frozen=True, kw_only=True)
class TamingProject:
    """The architectures of a project file."""

    policy: TamingConfig | None
    """None where the file is about a VQGAN alone."""
    tokenizer: VQConfig


@dataclass(frozen=True)
class _Section:
    """A mapping inside a file, which knows its place for the errors."""

    source: str
    field: str
    values: Mapping[str, Any]

    def refuse(self, name: str, problem: str) -> NoReturn:
        place = f"{self.field}.{name}" if name else self.field
        raise CheckpointError(f"{self.source}: {place} {problem}")

    def get(self, name: str, kind: type[T], default: T | None = None) -> T:
        """A value of the right type; one without a default must be there."""
        found = self.values.get(name, default)
        if found is None:
            self.refuse(name, "is missing")
        if not isinstance(found, kind) or (kind is int and isinstance(found, bool)):
            self.refuse(name, f"should be of type {kind.__name__}, found {found!r}")
        return found

    def section(self, name: str) -> _Section:
        return _Section(self.source, f"{self.field}.{name}", self.get(name, dict))

    def numbers(self, name: str) -> tuple[int, ...]:
        return tuple(self.get(name, list))

    def only(self, name: str, default: Any, supported: Any) -> None:
        """Refuse every value of a setting but the one that is implemented."""
        found = self.values.get(name, default)
        if found != supported:
            self.refuse(name, f"is {found!r}, of which only {supported!r} is supported")

    def params(self, *targets: str) -> _Section:
        """The parameters of this section's class, which must be one of `targets`."""
        found = self.get("target", str)
        if found not in targets:
            self.refuse("target", f"is {found!r}, supported is {' or '.join(targets)}")
        return self.section("params")


def read_project(path: str | os.PathLike[str]) -> TamingProject:
    """The architectures of a `*-project.yaml`.

    Raises:
        CheckpointError: no such file, not a project file, or a model that is not supported; names
            the file and the field.
    """
    source = os.fspath(path)
    try:
        content = strict_yaml.load(locate(path).read_text(encoding="utf-8"))
    except ValueError as error:  # not UTF-8, not YAML
        raise CheckpointError(f"{source}: not a YAML file ({error})") from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise CheckpointError(
            f"{source}: has no section 'model'; of the two files of a run's configs folder, this "
            "needs the one that ends in -project.yaml"
        )
    return parse_project(content["model"], source)


def parse_project(model: Mapping[str, Any], source: str) -> TamingProject:
    """The architectures of a project's `model` section.

    Args:
        source: the file's name, for the error.

    Raises:
        CheckpointError: names the source and the field that is missing or not supported.
    """
    section = _Section(source, "model", model)
    params = section.params(NET2NET, VQGAN)
    if section.values["target"] == VQGAN:
        return TamingProject(policy=None, tokenizer=_tokenizer(params)[0])
    tokenizer, resolution = _tokenizer(params.section("first_stage_config").params(VQGAN))
    policy = _policy(params, tokenizer, resolution)
    return TamingProject(policy=policy, tokenizer=tokenizer)


def _tokenizer(params: _Section) -> tuple[VQConfig, int]:
    """The VQGAN, and the side of the images that it is made for."""
    layers = params.section("ddconfig")
    params.only("remap", None, None)
    for name, default, supported in (
        ("double_z", True, False),
        ("in_channels", None, 3),
        ("out_ch", None, 3),
        ("resamp_with_conv", True, True),
        ("give_pre_end", False, False),
    ):
        layers.only(name, default, supported)
    multipliers, resolution = layers.numbers("ch_mult"), layers.get("resolution", int)
    if resolution % 2 ** (len(multipliers) - 1):
        layers.refuse("resolution", f"is {resolution}, which ch_mult {multipliers} do not divide")
    attended = layers.numbers("attn_resolutions")
    levels = tuple(level for level in range(len(multipliers)) if resolution >> level in attended)
    fields = {
        "channels": layers.get("ch", int),
        "multipliers": multipliers,
        "num_res_blocks": layers.get("num_res_blocks", int),
        "z_channels": layers.get("z_channels", int),
        "codebook_size": params.get("n_embed", int),
        "codebook_dim": params.get("embed_dim", int),
        "normalise": False,
        "attention_levels": levels,
        "pixel_rule": "taming",
    }
    return from_fields(VQConfig, fields, f"{params.source}: {params.field}"), resolution


def _policy(params: _Section, tokenizer: VQConfig, resolution: int) -> TamingConfig:
    params.only("downsample_cond_size", -1, -1)
    pkeep = params.values.get("pkeep", 1.0)
    if not isinstance(pkeep, int | float) or pkeep <= 0:
        params.refuse(
            "pkeep", f"is {pkeep!r}: a policy trained on noise alone does not decode token by token"
        )
    gpt = params.section("transformer_config").params(GPT)
    if gpt.get("vocab_size", int) != tokenizer.codebook_size:
        gpt.refuse(
            "vocab_size",
            f"is {gpt.get('vocab_size', int)}, but the VQGAN has {tokenizer.codebook_size} codes: "
            "tokens and codes would not match",
        )
    grid = resolution // tokenizer.downsampling
    fields = {
        "dim": gpt.get("n_embd", int, 256),
        "num_layers": gpt.get("n_layer", int, 12),
        "num_heads": gpt.get("n_head", int, 8),
        "vocab_size": gpt.get("vocab_size", int),
        "block_size": gpt.get("block_size", int),
        "n_unmasked": gpt.get("n_unmasked", int, 0),
        "grid": grid,
        "permuter": _permuter(params, grid),
        **_condition(params, resolution),
    }
    return from_fields(TamingConfig, fields, f"{params.source}: {params.field}")


def _condition(params: _Section, resolution: int) -> dict[str, Any]:
    """Fields of the configuration that say what goes before the image's tokens."""
    stage = params.values.get("cond_stage_config")
    if params.get("unconditional", bool, False) or stage == UNCONDITIONAL:
        return {"condition": "none", "sos_token": params.get("sos_token", int, 0)}
    if not isinstance(stage, dict):
        params.refuse("cond_stage_config", f"is {stage!r}, which is not supported")
    section = params.section("cond_stage_config")
    fields = section.params(CLASS_STAGE, START_STAGE, COORDINATE_STAGE)
    if section.values["target"] == CLASS_STAGE:
        return {"condition": "class", "num_classes": fields.get("n_classes", int)}
    if section.values["target"] == START_STAGE:
        return {"condition": "none", "sos_token": fields.get("sos_token", int)}
    return {
        "condition": "coordinates",
        "image_size": resolution,
        "coordinate_levels": fields.get("n_embed", int),
        "coordinate_stride": fields.get("down_factor", int),
    }


def _permuter(params: _Section, grid: int) -> str:
    if params.values.get("permuter_config") is None:
        return "Identity"
    section = params.section("permuter_config")
    name = section.get("target", str).removeprefix(PERMUTERS)
    for side in ("H", "W"):
        found = (section.values.get("params") or {}).get(side, grid)
        if found != grid:
            section.refuse(f"params.{side}", f"is {found}, but the code grid is {grid}x{grid}")
    try:
        permutation(name, grid)
    except ConfigError as error:
        section.refuse("target", f"is not supported: {error}")
    return name


def policy_tensors(
    state: Mapping[str, Tensor], config: TamingConfig, source: str
) -> dict[str, Tensor]:
    """The policy's tensors of an official state dict, under our names.

    Raises:
        CheckpointError: the file has no policy, a permuter that is not `config`'s, or tensors of a
            part that is not known here.
    """
    strange = [name for name in state if not name.startswith((POLICY, TOKENIZER, PERMUTER))]
    if strange:
        raise CheckpointError(
            f"{source}: tensor {strange[0]!r} is of a part that taming's policies here do not have "
            f"(known are {POLICY}*, {TOKENIZER}* and {PERMUTER}*)"
        )
    found = {
        name.removeprefix(POLICY): tensor
        for name, tensor in state.items()
        if name.startswith(POLICY) and not name.endswith(MASK)
    }
    if not found:
        raise CheckpointError(f"{source}: no tensors {POLICY}*; is this the VQGAN's own file?")
    expected = _permuter_tensors(config)
    for name, tensor in state.items():
        if name.startswith(PERMUTER) and not _equal(tensor, expected.get(name)):
            raise CheckpointError(
                f"{source}: {name!r} is not the table of the permuter {config.permuter!r} on a "
                f"{config.grid}x{config.grid} grid: is this the project file of another run?"
            )
    return found


def official_policy_tensors(state: Mapping[str, Tensor], config: TamingConfig) -> dict[str, Tensor]:
    """A policy's tensors under the official names, with the buffers that the official module has:
    attention masks, and the tables of its permuter. The VQGAN's are not among them."""
    tensors = {POLICY + name: tensor for name, tensor in state.items()}
    mask = torch.ones(config.block_size, config.block_size).tril()
    mask[: config.n_unmasked, : config.n_unmasked] = 1
    for layer in range(config.num_layers):
        tensors[f"{POLICY}blocks.{layer}{MASK}"] = mask[None, None].clone()
    return tensors | _permuter_tensors(config)


def _permuter_tensors(config: TamingConfig) -> dict[str, Tensor]:
    """The official module has no tables for the identity."""
    if config.permuter == "Identity":
        return {}
    forward = permutation(config.permuter, config.grid)
    return {
        f"{PERMUTER}forward_shuffle_idx": forward,
        f"{PERMUTER}backward_shuffle_idx": inverse(forward),
    }


def _equal(found: Tensor, expected: Tensor | None) -> bool:
    return expected is not None and torch.equal(found.cpu().long(), expected)


def _merge_base(tensors: dict[str, Tensor], base: Mapping[str, Tensor], source: str) -> dict:
    """A whole official file: weights of `tensors`, all other parts (VQGAN, masks) of `base`.

    Raises:
        CheckpointError: the base is of another architecture.
    """
    for name, tensor in tensors.items():
        if name not in base or base[name].shape != tensor.shape:
            found = tuple(base[name].shape) if name in base else "nothing"
            raise CheckpointError(
                f"{source}: expected {name!r} of shape {tuple(tensor.shape)}, found {found}: the "
                "base is of another policy"
            )
    weights = (name for name in tensors if name.startswith(POLICY) and not name.endswith(MASK))
    return dict(base) | {name: tensors[name] for name in weights}


def _layer_activations(config: TamingConfig, precision: str) -> int:
    return (40 if precision == "bf16" else 64) * config.dim


def _model(
    name: str, kind: Kind, origin: str, published: tuple[TamingConfig, VQConfig] | None = None
) -> NamedModel:
    return NamedModel(
        name=name,
        kind=kind,
        file=f"{name}.ckpt",
        project=f"{name}-project.yaml",
        page=PAGE,
        origin=origin,
        tokenizer=name if kind == "policy" else "",  # Net2Net files hold their VQGAN
        published=published,
    )


_IMAGENET = (
    TamingConfig(
        dim=1536,
        num_layers=48,
        num_heads=24,
        vocab_size=16384,
        block_size=256,
        grid=16,
        num_classes=1000,
    ),
    VQConfig(codebook_dim=256, normalise=False, pixel_rule="taming"),
)

TAMING = Family(
    architecture=TamingConfig,
    module=TamingGPT,
    from_official=policy_tensors,
    to_official=official_policy_tensors,
    layouts={"official": lambda tensors: {"state_dict": tensors, "global_step": 0}},
    merge_base=_merge_base,
    tokenizer_prefix=TOKENIZER,
    layer_activations=_layer_activations,
    norm_activations=8,
    models=(
        _model("cin_transformer", "policy", "ImageNet (cIN)", _IMAGENET),
        _model("ffhq_transformer", "policy", "FFHQ"),
        _model("celebahq_transformer", "policy", "CelebA-HQ"),
        _model("faceshq_transformer", "policy", "FacesHQ"),
        _model("vqgan-imagenet-f16-1024", "tokenizer", "VQGAN ImageNet (f=16), 1024"),
        _model("vqgan-imagenet-f16-16384", "tokenizer", "VQGAN ImageNet (f=16), 16384"),
    ),
)
