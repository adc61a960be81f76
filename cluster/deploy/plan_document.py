"""The plan of a run, as `python -m learner.plan --json` prints it: how many workers of each role,
and what each needs. Deployment files are made from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from cluster.errors import ConfigError

VERSION = 1
DRIVER, MOMENTS_SERVER = "driver", "moments-server"
LEARNER, SAMPLER, REWARD_SERVER = "learner", "sampler", "reward-server"
REQUIRED = (LEARNER, SAMPLER, REWARD_SERVER, MOMENTS_SERVER, DRIVER)
ROUNDING = 1e-6  # GPUs

_later_fields = ConfigDict(extra="ignore", allow_inf_nan=False)


@dataclass(frozen=True, kw_only=True)
class RolePlan:
    """The workers of one role."""

    __pydantic_config__ = _later_fields

    name: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9_-]*[a-z0-9])?$")]
    """learner, sampler, reward-server, moments-server or driver; of a pool `reward-NAME`."""
    count: Annotated[int, Field(ge=1)]
    """Workers at the start."""
    min: Annotated[int, Field(ge=0)]
    """Fewest workers; `count` where the number stays."""
    max: Annotated[int, Field(ge=1)]
    """Most workers."""
    num_cpus: Annotated[float, Field(ge=0)]
    """CPUs of each worker."""
    num_gpus: Annotated[float, Field(ge=0)] = 0.0
    """GPUs of each worker; a fraction shares one."""
    memory_bytes: Annotated[int, Field(ge=0)]
    """Host memory of each worker, without the object store."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Labels that the plan wants of its nodes."""
    accelerator_type: str = ""
    """Ray's name of its GPU, such as H200; empty: any."""

    @property
    def scales(self) -> bool:
        """Whether the number of workers changes during the run."""
        return self.min < self.max


@dataclass(frozen=True, kw_only=True)
class PlanDocument:
    """A whole fleet, and what it does in an iteration."""

    __pydantic_config__ = _later_fields

    version: int
    preset: Annotated[str, Field(min_length=1)]
    gpu: str = ""
    """Kind of GPU that was planned for; empty without one."""
    gpus: Annotated[int, Field(ge=0)]
    """GPUs in all."""
    arguments: tuple[str, ...]
    """Options of learner.run that realise the plan."""
    roles: tuple[RolePlan, ...]
    object_store_bytes: Annotated[int, Field(ge=0)]
    """Ray's object store of one node."""
    iteration_s: Annotated[float | None, Field(ge=0)] = None
    """Predicted seconds of an iteration; None: not known."""
    images_per_s: Annotated[float | None, Field(ge=0)] = None
    bottleneck: str = ""
    checkpoint_bytes: Annotated[int, Field(ge=0)] = 0

    def role(self, name: str) -> RolePlan:
        """Raises KeyError if the plan has none of this name."""
        for role in self.roles:
            if role.name == name:
                return role
        raise KeyError(name)

    @property
    def workers(self) -> tuple[RolePlan, ...]:
        """Roles that run on worker nodes; the driver and the moments server are on the head."""
        return tuple(role for role in self.roles if role.name not in (DRIVER, MOMENTS_SERVER))


_ADAPTER = TypeAdapter(PlanDocument)


def read_plan(text: str, source: str) -> PlanDocument:
    """Validate a plan document.

    Args:
        text: one JSON object.
        source: of the text, for errors.

    Raises:
        ConfigError: names every wrong field, with what was expected and found.
    """
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{source}: no JSON: {error}; found {text[:80]!r}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: a plan is one JSON object, found {type(values).__name__}")
    if values.get("version") != VERSION:
        raise ConfigError(
            f"{source}: version must be {VERSION}, found {values.get('version')!r}: make the plan "
            "anew with this version's `learner.plan --json`"
        )
    try:
        plan = _ADAPTER.validate_python(values)
    except ValidationError as error:
        found = "; ".join(_explain(item) for item in error.errors())
        raise ConfigError(f"{source}: {found}") from None
    if wrong := list(_contradictions(plan)):
        raise ConfigError(f"{source}: " + "; ".join(wrong))
    return plan


def _explain(item: Any) -> str:
    where = ""
    for part in item["loc"]:
        where += f"[{part}]" if isinstance(part, int) else f".{part}"
    found = "" if item["type"] == "missing" else f", found {item['input']!r:.60}"
    return f"{where.lstrip('.')}: {item['msg']}{found}"


def _contradictions(plan: PlanDocument) -> list[str]:
    names = [role.name for role in plan.roles]
    found = [f"roles has {name!r} twice" for name in sorted(set(names)) if names.count(name) > 1]
    found += [f"roles lacks {name!r}" for name in REQUIRED if name not in names]
    for role in plan.roles:
        if not role.min <= role.count <= role.max:
            found.append(
                f"{role.name}: min <= count <= max must hold, found {role.min}, {role.count}, "
                f"{role.max}"
            )
        if role.num_gpus > 1 and role.num_gpus % 1:
            found.append(f"{role.name}: num_gpus above 1 must be whole, found {role.num_gpus:g}")
    asked = sum(role.count * role.num_gpus for role in plan.roles)
    if asked > plan.gpus + ROUNDING:
        found.append(f"roles take {asked:g} GPUs, but gpus is {plan.gpus}")
    return found
