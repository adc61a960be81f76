"""The rows of an evaluation's table: targets under sampling specs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from actors.sample_source import with_guidance
from cluster.errors import ConfigError
from cluster.messages import SamplingSpec
from learner.config import RunConfig
from learner.evaluation.targets import Target

NUMBERS = {"temperature": float, "top_k": int, "top_p": float}
"""Numbers of a sampling -> their types."""
EXAMPLE = "temperature=0.9,top_k=2000,top_p=0.95"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A target, and how it is sampled."""

    name: str
    target: Target
    spec: SamplingSpec | None = None
    """None: of images that are given."""

    @property
    def folder(self) -> str:
        """Name of the directory of its samples."""
        step = self.target.step
        named = f"step {step}" in self.name or not self.target.tuned or step is None
        name = self.name if named else f"{self.name} step {step}"
        return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.").lower() or "images"


def rows_of(
    targets: Sequence[Target],
    config: RunConfig,
    cfg_scales: Sequence[float] = (),
    samplings: Sequence[str] = (),
) -> list[Row]:
    """Every target under every sampling and guidance scale.

    Args:
        cfg_scales: 1 is no guidance. Empty: the configured sampling; of policies that were not
            tuned, and without samplings, also the scales of `evaluation.cfg_scales`.
        samplings: see `parse_sampling`. Empty: the configured one.

    Raises:
        ConfigError: impossible values, or rows that would share a directory.
    """
    rows: list[Row] = []
    for target in targets:
        if target.policy is None:
            rows.append(Row(name=target.name, target=target))
            continue
        rows += [
            Row(name=f"{target.name}{label(spec)}", target=target, spec=spec)
            for spec in _specs(target, config, cfg_scales, samplings)
        ]
    for number, row in enumerate(rows):
        if row.folder in (other.folder for other in rows[:number]):
            raise ConfigError(
                f"two rows are called {row.name!r}: name each scale and each sampling once"
            )
    return rows


def _specs(
    target: Target, config: RunConfig, cfg_scales: Sequence[float], samplings: Sequence[str]
) -> list[SamplingSpec]:
    usual = config.sampling.learned() if target.tuned else config.sampling
    numbers = [parse_sampling(text) for text in samplings] or [{}]
    scales: list[float] = list(cfg_scales)
    if not scales:
        scales = [usual.cfg_scale]
        if not (samplings or target.tuned or usual.guided_sampling):
            scales += config.evaluation.cfg_scales
    return [
        with_guidance(usual, cfg_scale=scale, **changes) for changes in numbers for scale in scales
    ]


def parse_sampling(text: str) -> dict[str, float | int]:
    """The numbers of a sampling, as "temperature=0.9,top_k=2000,top_p=0.95"; those not named stay
    as configured.

    Raises:
        ConfigError: another name, or no number.
    """
    found: dict[str, float | int] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        name = name.strip().replace("-", "_")
        if name not in NUMBERS or name in found:
            raise ConfigError(
                f"--samplings: expected {', '.join(NUMBERS)}, each at most once, as in {EXAMPLE}, "
                f"found {text!r}"
            )
        try:
            found[name] = NUMBERS[name](value)
        except ValueError:
            raise ConfigError(
                f"--samplings: {name} must be a number, found {value!r} in {text!r}"
            ) from None
    return found


def label(spec: SamplingSpec) -> str:
    """How a spec differs from sampling the policy as it is: ", CFG 1.5, top-k 2000"; empty if it
    does not."""
    parts = {
        "CFG": spec.cfg_scale if spec.guided_sampling else 1,
        "T": spec.temperature,
        "top-k": spec.top_k,
        "top-p": spec.top_p,
    }
    usual = SamplingSpec()
    defaults = (1, usual.temperature, usual.top_k, usual.top_p)
    changed = [(name, v) for (name, v), d in zip(parts.items(), defaults, strict=True) if v != d]
    return "".join(f", {name} {value:g}" for name, value in changed)
