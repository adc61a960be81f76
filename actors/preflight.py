"""Checks policy and tokenizer before a run starts: files exist and fit, by their headers."""

from __future__ import annotations

import math
from pathlib import Path

from actors.checkpoints.families import NamedModel
from actors.checkpoints.loading import (
    CheckpointConfig,
    PolicyConfig,
    TokenizerConfig,
    check_fit,
    count_parameters,
    file_shapes,
)
from actors.checkpoints.sources import Source, planned_policy, planned_tokenizer
from actors.checkpoints.zoo import MODELS
from actors.models.base import Architecture, PolicyArchitecture
from actors.models.vq import VQConfig
from cluster.errors import TesseraError
from cluster.model_files.tensors import anywhere
from cluster.preflight import Download, Findings
from cluster.program.invocation import command_of

FP32 = 4


def check_models(
    policy: PolicyConfig, tokenizer: TokenizerConfig, findings: Findings
) -> tuple[PolicyArchitecture | None, VQConfig | None]:
    """Check both, and whether they fit each other; reads no weights.

    Returns:
        Their architectures; None if unknown.
    """
    ours = _check("policy", policy, findings)
    theirs = _check("tokenizer", tokenizer, findings)
    assert not isinstance(ours, VQConfig)
    assert theirs is None or isinstance(theirs, VQConfig)
    if ours and theirs and ours.vocab_size != theirs.codebook_size:
        named = MODELS.get(policy.checkpoint)
        belongs = f" ({named.tokenizer} belongs to {named.name})" if named else ""
        findings.problem(
            "tokenizer.checkpoint",
            f"a codebook of {ours.vocab_size} codes, as the policy draws",
            f"{theirs.codebook_size} in {tokenizer.checkpoint}",
            f"name the tokenizer that the policy was trained with{belongs}",
        )
    return ours, theirs


def image_side(policy: PolicyArchitecture | None, tokenizer: VQConfig | None) -> int:
    """Pixels a side of the policy's images; 0 if unknown."""
    if policy is None or tokenizer is None:
        return 0
    return math.isqrt(policy.num_tokens) * tokenizer.downsampling


def _check(field: str, config: CheckpointConfig, findings: Findings) -> Architecture | None:
    source = config.source()
    if source.name and (absent := _absent(MODELS[source.name])):
        _not_fetched(field, MODELS[source.name], absent, findings)
        try:
            return _planned(field, source)
        except TesseraError:
            return None  # not known without its files
    with findings.of(f"{field}.checkpoint"):
        anywhere(source.file)  # before the architecture, which may be in its header
        architecture = _planned(field, source)
        check_fit(file_shapes(source, architecture), architecture, source)
        return architecture
    return None


def _absent(model: NamedModel) -> list[Path]:
    places = [model.path(), *([model.project_path()] if model.project else [])]
    return [place for place in places if not place.is_file()]


def _not_fetched(field: str, model: NamedModel, absent: list[Path], findings: Findings) -> None:
    command = f"{command_of('actors.weights')} fetch {model.name}"
    if model.project:
        command += " says where from"
    places = " and ".join(map(str, absent))
    findings.problem(
        f"{field}.checkpoint",
        f"{model.name} at {places}",
        "nothing there",
        f"{command} ({model.url})",
    )
    architecture = model.architecture or (model.published[0] if model.published else None)
    size = FP32 * count_parameters(architecture) if architecture else 0
    if all(download.url != model.url for download in findings.downloads):
        findings.downloads.append(
            Download(field=field, name=model.name, url=model.url, size=size, command=command)
        )


def _planned(field: str, source: Source) -> Architecture:
    return planned_policy(source) if field == "policy" else planned_tokenizer(source)
