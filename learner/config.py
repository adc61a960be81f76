"""The configuration of a run: one dataclass tree, YAML presets, dotted overrides.

Precedence: command line, then the preset (or the resumed run's config.yaml), then the defaults.
Each option is a field of a dataclass next to the code that uses it; its docstring is its help.
`validate` refuses unknown keys (with the nearest name) and impossible values (with the range).
"""

from __future__ import annotations

import dataclasses
import importlib.resources
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import tyro
import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from actors.checkpoints.loading import PolicyConfig, TokenizerConfig
from actors.sampler import SamplerResources
from cluster.errors import ConfigError, did_you_mean, nearest
from cluster.io import strict_yaml
from cluster.io.paths import expand_user
from cluster.io.strict_yaml import MalformedYamlError
from cluster.messages import SamplingSpec
from cluster.placement.config import PlacementConfig
from cluster.ray_backend.transports import WeightsConfig
from cluster.ray_session.session import RayConfig
from cluster.roles import QuotaConfig
from learner.data.conditions import ConditionsConfig
from learner.grpo.entropy import EntropyConfig
from learner.grpo.loss import LossConfig
from learner.output import EvaluationConfig, OutputConfig, check_output
from learner.training.optimizer import OptimizerConfig
from learner.training.real_tokens import RealTokensConfig
from learner.training.skips import GuardsConfig
from rewards.config import (
    FurtherSpace,
    JudgeConfig,
    RewardPool,
    RewardsConfig,
    RewardServerResources,
)
from rewards.scorers.user_reward_files import RewardFile

DEFAULT_PRESET = "miniature"
YAML = (".yaml", ".yml")
CONTROL_THREADS = 2  # of a reward server: statistics and features beside the scoring


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Tune an autoregressive image policy with GRPO."""

    num_samplers: Annotated[int, Field(ge=1, le=4096)] = 2
    """Number of samplers."""
    num_reward_servers: Annotated[int, Field(ge=1, le=4096)] = 1
    """Number of reward servers."""
    num_learners: Annotated[int, Field(ge=1, le=4096)] = 1
    """Number of learners, a data-parallel group."""
    iterations: Annotated[int, Field(ge=1)] = 200
    """Learning iterations."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of all random numbers of the run."""
    reproducible: bool = False
    """Results that depend on settings and seed alone on GPUs too, of one kind: deterministic
    algorithms, and each request scored alone. Slower; not run on a GPU. Needs sampler.max_groups 1.
    On CPUs results are reproducible without it."""
    groups_per_iteration: Annotated[int, Field(ge=1)] = 10
    """Conditions an iteration draws (P)."""
    rollouts_per_group: Annotated[int, Field(ge=2)] = 16
    """Rollouts of each condition (K)."""
    max_staleness: Annotated[int, Field(ge=0, le=64)] = 0
    """Iterations that sampling runs ahead of learning (S); rollouts are S updates old. 0:
    on-policy; 1: samplers and reward servers work while the learner steps."""
    timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Longest wait for one answer of a worker, seconds."""
    heartbeat_s: Annotated[float, Field(ge=0)] = 60.0
    """Seconds without a heartbeat after which a worker counts as lost. 0: only --timeout-s finds
    workers that hang."""
    max_restarts: Annotated[int, Field(ge=0)] = 3
    """Replacements of one worker within an hour before the run stops."""
    max_failed_share: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of an iteration's images that may fail to be scored; above it the run stops."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    conditions: ConditionsConfig = field(default_factory=ConditionsConfig)
    sampling: SamplingSpec = field(default_factory=SamplingSpec)
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    learner: OptimizerConfig = field(default_factory=OptimizerConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    entropy: EntropyConfig = field(default_factory=EntropyConfig)
    real: RealTokensConfig = field(default_factory=RealTokensConfig)
    guards: GuardsConfig = field(default_factory=GuardsConfig)
    sampler: SamplerResources = field(default_factory=SamplerResources)
    reward: RewardServerResources = field(default_factory=RewardServerResources)
    reward_pools: Annotated[dict[str, RewardPool], tyro.conf.Suppress] = field(default_factory=dict)
    """Further pools of reward servers by name, for scorers that name them; set in a YAML file."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    quota: QuotaConfig = field(default_factory=QuotaConfig)

    def __post_init__(self) -> None:
        if self.num_learners > 1 and 0 < self.learner.num_gpus < 1:
            raise ValueError(
                f"{self.num_learners} learners need a GPU each (NCCL lets no two share one): set "
                f"learner.num_gpus to 1, found {self.learner.num_gpus:g}"
            )
        if self.reproducible and self.sampler.max_groups > 1:
            raise ValueError(
                "reproducible needs sampler.max_groups 1, since which groups are decoded together "
                f"depends on the clock, found {self.sampler.max_groups}: add "
                "--sampler.max-groups 1, or leave out --reproducible"
            )
        for each in self.rewards.spaces().values():
            if each.term.seed_images < 2 * self.rollouts_per_group:
                raise ValueError(
                    f"{each.option}.seed_images must be at least {2 * self.rollouts_per_group} "
                    f"(two groups), found {each.term.seed_images}"
                )
        self._check_pools()
        check_output(self.output, self.evaluation, self.judge.further)

    def _check_pools(self) -> None:
        used = set(self.rewards.pools().values()) - {""}
        for what, pool in self.rewards.pools().items():
            if pool and pool not in self.reward_pools:
                there = ", ".join(self.reward_pools) or "none"
                raise ValueError(
                    f"{what} is to run in the pool {pool!r}, but reward_pools has {there}"
                )
        for pool in self.reward_pools:
            if not pool.isidentifier() or pool == "server":
                raise ValueError(f"reward_pools: {pool!r} is no name (letters, digits, _)")
            if pool not in used:
                raise ValueError(f"reward_pools: no scorer names {pool!r} as its pool")

    @property
    def slots(self) -> int:
        """Groups in flight: (S + 1) P."""
        return (self.max_staleness + 1) * self.groups_per_iteration


# pydantic refuses unknown keys of nested dataclasses only if each one says so
def _forbid_unknown(kind: type, done: set[type]) -> None:
    if kind in done or not dataclasses.is_dataclass(kind):
        return
    done.add(kind)
    kind.__pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)  # type: ignore[attr-defined]
    for item in dataclasses.fields(kind):
        default = item.default_factory() if callable(item.default_factory) else item.default
        _forbid_unknown(type(default), done)


for _kind in (RunConfig, RewardPool, RewardFile, FurtherSpace):
    _forbid_unknown(_kind, set())
_ADAPTER = TypeAdapter(RunConfig)


def validate(values: Mapping[str, Any], source: str) -> RunConfig:
    """Validate nested plain values.

    Args:
        source: of the values, for errors.

    Raises:
        ConfigError: names every wrong field, with what was expected and found.
    """
    try:
        config = _ADAPTER.validate_python(dict(values))
    except ValidationError as error:
        lines = [_explain(item) for item in error.errors()]
        raise ConfigError(f"{source}: " + "; ".join(lines)) from None
    if lines := list(_flags_as_numbers(values, config)):
        raise ConfigError(f"{source}: " + "; ".join(lines))
    return config


def _flags_as_numbers(given: Any, taken: Any, name: str = "") -> Iterator[str]:
    """Errors for fields where `true`, or YAML's `yes` and `on`, was read as the number 1."""
    if isinstance(given, bool):
        if not isinstance(taken, bool):
            yield f"{name} must be a number, found {str(given).lower()}"
    elif isinstance(given, Mapping):
        for key, value in given.items():
            inner = taken.get(key) if isinstance(taken, Mapping) else getattr(taken, key, value)
            yield from _flags_as_numbers(value, inner, f"{name}.{key}" if name else key)
    elif isinstance(given, list | tuple) and isinstance(taken, list | tuple):
        for number, (value, inner) in enumerate(zip(given, taken)):
            yield from _flags_as_numbers(value, inner, f"{name}[{number}]")


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dictionaries: `changes` over `base`."""
    merged = dict(base)
    for key, value in changes.items():
        nested = isinstance(value, Mapping) and isinstance(base.get(key), Mapping)
        merged[key] = merge(base[key], value) if nested else value
    return merged


def dotted(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, by names with dots, as options have them: loss.kl_coef."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= dotted(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Nested plain values, ready for YAML."""
    return _ADAPTER.dump_python(config, mode="json")


def load_preset(name: str) -> RunConfig:
    """A shipped preset by name, or a YAML file by path.

    Raises:
        ConfigError: no such preset or file, or it does not validate.
    """
    folder = importlib.resources.files("learner").joinpath("presets")
    shipped = sorted(
        entry.name.removesuffix(".yaml")
        for entry in folder.iterdir()
        if entry.name.endswith(".yaml")
    )
    if name in shipped:
        return parse_yaml(
            folder.joinpath(f"{name}.yaml").read_text(encoding="utf-8"), f"preset {name}"
        )
    path = expand_user(name)
    if path.is_dir() or not path.exists():
        raise ConfigError(_no_preset(name, path, shipped))
    return load_file(path)


def _no_preset(name: str, path: Path, shipped: list[str]) -> str:
    """The error for a preset that is neither shipped nor a file."""
    there = f"shipped presets are {', '.join(shipped)}"
    if name and path.is_dir():
        return f"--preset {name} is a directory: name a YAML file in it ({there})"
    if path.suffix.lower() not in YAML and len(path.parts) < 2:  # a name, not a path
        hint = did_you_mean(name, shipped)
        return f"no preset {name!r}: {hint}there are {', '.join(shipped)}, or a path"
    try:
        beside = sorted(str(path.with_name(file.name)) for file in path.parent.iterdir())
    except OSError:
        beside = []
    close = nearest(str(path), [file for file in beside if file.endswith(YAML)])
    close = close or nearest(path.stem, shipped)
    hint = f"did you mean {close!r}? " if close else ""
    return f"--preset {name}: there is no such file (looked at {path.absolute()}); {hint}{there}"


def load_file(path: Path) -> RunConfig:
    """A configuration from a YAML file.

    Raises:
        ConfigError: it cannot be read, or does not validate.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    return parse_yaml(text, str(path))


def dump(config: RunConfig) -> str:
    """The configuration as YAML, every field written out."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def parse_yaml(text: str, source: str) -> RunConfig:
    """A configuration from YAML text; `source` names it in errors.

    Raises:
        ConfigError: no YAML, or it does not validate.
    """
    try:
        values = strict_yaml.load(text)
    except MalformedYamlError as error:
        raise ConfigError(f"{source} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{source} must be a mapping of fields, found {type(values).__name__}")
    return validate(values, source)


def _explain(item: Any) -> str:
    """One error of pydantic in a line: field, expectation, what was found, what to do."""
    path = [str(part) for part in item["loc"]]
    name = ".".join(path)
    if item["type"] == "unexpected_keyword_argument":
        return f"unknown field {name!r}{_nearest(path)}"
    found = item.get("input")
    if dataclasses.is_dataclass(found) or not isinstance(found, (str, int, float, list, tuple)):
        found = None
    message = item["msg"].removeprefix("Value error, ").removeprefix("Input ")
    where = f"{name} " if name else ""
    return f"{where}{message}" + (f", found {found!r}" if found is not None else "")


def _nearest(path: list[str]) -> str:
    kind: Any = RunConfig
    for part in path[:-1]:
        kind = get_args(kind)[1] if get_args(kind) else get_type_hints(kind)[part]
    names = [item.name for item in dataclasses.fields(kind)]
    close = nearest(path[-1], names, cutoff=0.5)
    return f", did you mean {close!r}?" if close else f": there are {', '.join(names)}"
