"""Whether scorers read the texts that they will be given, before anything is started.

Tokenizers alone are loaded, and only from what is here: of a model whose tokenizer would be fetched
nothing can be said, and its scorer answers for each image.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from cluster.errors import CheckpointError, DataError
from cluster.messages import Condition
from cluster.preflight import Findings
from cluster.text_limits import faults, notes
from rewards.config import NETWORKS, JudgeConfig, RewardsConfig
from rewards.networks.open_clip_models import NoTokenizerError, tokenizer_of
from rewards.networks.open_clip_sources import (
    HUB,
    TOKENIZERS,
    Source,
    architecture_of,
    directory_of,
    find_source,
    hub_tokenizer_of,
)
from rewards.networks.tokens import reading_of
from rewards.preflight import is_cached
from rewards.scorers.prompts import LONG_CAPTIONS, PromptConfig, Prompts
from rewards.scorers.text_image import TextImageConfig

AT_MOST = 20_000  # conditions that are looked at: seconds


def check_texts(
    rewards: RewardsConfig,
    judge: JudgeConfig | None,
    skipped_pools: Collection[str],
    conditions: Sequence[Condition],
    findings: Findings,
    *,
    shipped: bool = False,
) -> None:
    """Texts of every scorer that compares images with words.

    Args:
        judge: None where nothing is evaluated.
        skipped_pools: pools with a runtime environment of their own.
        shipped: the conditions are the miniature's, which its own networks are known to read: for
            these no tokenizer is loaded (a second at every start).
    """
    scorers: list[tuple[str, TextImageConfig, str]] = [
        (f"rewards.{name}", term, term.model)
        for name, term in (("clip", rewards.clip), ("hps", rewards.hps))
        if term.enabled and term.pool not in skipped_pools
    ]
    if judge is not None:
        scorers.append(("judge.clip", judge.clip, judge.clip.model))
    for field, config, model in scorers:
        if shipped and model.startswith(NETWORKS) and config.prompts == PromptConfig():
            continue
        with findings.of(f"{field}.prompts"):
            _check(field, config, model, conditions[:AT_MOST], findings)


def _check(
    field: str,
    config: TextImageConfig,
    model: str,
    conditions: Sequence[Condition],
    findings: Findings,
) -> None:
    tokenizer = local_tokenizer(model)
    if tokenizer is None:
        return
    prompts = Prompts(config.prompts)
    # of one condition's sentences the longest stands for all
    texts = [max(prompts(condition), key=len) for condition in conditions]
    readings = [reading_of(tokenizer, text) for text in texts]
    option = f"{field}.{LONG_CAPTIONS}"
    if wrong := faults(texts, readings, config.prompts.long_captions, option):
        raise DataError(f"{field}: the conditions' texts, by the tokenizer of {model}: {wrong}")
    findings.notes += [f"{field} ({model}): {note}" for note in notes(texts, readings)]


def local_tokenizer(model: str) -> Any:
    """The tokenizer of an open_clip model; None where it would have to be fetched, or cannot be
    loaded (then neither can the model, which has checks of its own)."""
    try:
        if directory_of(model) is not None:
            source = find_source(model, "")
        elif model.startswith(HUB) or not architecture_of(model):
            return None
        else:
            source = Source(name=model)
        fetched = hub_tokenizer_of(source)
        if fetched and not any(is_cached(fetched, file) for file in TOKENIZERS[:2]):
            return None
        return tokenizer_of(source)
    except (NoTokenizerError, CheckpointError, OSError):
        return None
