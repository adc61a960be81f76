"""Checks before anything starts, for a run and for --dry-run.

Nothing is loaded or downloaded: files are found, headers read, names compared. Workers on other
machines check their own files when they start.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import replace

from actors.models.base import PolicyArchitecture
from actors.preflight import check_models, image_side
from cluster.errors import ConfigError, DataError
from cluster.io.paths import expand_user
from cluster.messages import Condition
from cluster.placement.labels import written
from cluster.placement.nodes import Node
from cluster.preflight import Findings, size_of
from cluster.program.invocation import command_of
from cluster.ray_session.runtime_env import check_runtime_env
from cluster.roles import FleetPlan
from cluster.scheduling.placement import Placement, place
from learner.capacity.cards import this_gpu
from learner.capacity.gpus import processes, share_notes
from learner.config import RunConfig
from learner.data.captions import Peeked, check_encoder, encoder_is_here, peek_captions
from learner.data.conditions import DIGITS as DIGIT_NAMES
from learner.data.conditions import ConditionsConfig
from learner.data.image_checks import check_fit, check_images, fetched
from learner.evaluation.held_out import base_rows
from learner.evaluation.preflight import check_evaluation
from learner.loggers.opening import check_loggers
from learner.monitoring.gallery import gallery_rows
from learner.rollouts.feature_space import (
    RewardSpace,
    read_moments,
    reference_conditions,
    stored_reference,
)
from learner.training.real_tokens import check_source
from rewards.config import NETWORKS, Distribution
from rewards.distribution.diagnostics import few_images_warning
from rewards.distribution.reference import Reference, build_command, read_stored
from rewards.networks.features import FeaturesConfig
from rewards.networks.features_check import feature_dim, fits_fingerprint
from rewards.preflight import check_rewards, check_texts
from rewards.reference.fetch import PUBLISHED, by_file, fetch_command, reference_file


def preflight(config: RunConfig, *, begun: bool = False) -> Findings:
    """Check a configuration without a fleet.

    Args:
        begun: the run resumes a checkpoint, and needs neither files of its start nor loggers.
    """
    findings = Findings()
    policy, tokenizer = check_models(config.policy, config.tokenizer, findings)
    side = image_side(policy, tokenizer)
    check_conditions(config, policy, findings)
    skipped_pools = _skipped_pools(config)
    for name in sorted(skipped_pools):
        with findings.of(f"reward_pools.{name}"):
            check_runtime_env(config.reward_pools[name].runtime_env)
    check_rewards(config.rewards, skipped_pools, side, findings)
    for each in config.rewards.spaces().values():
        _reference(config, each, side, findings)
        if not begun:
            _seed(each, side, findings)
    check_evaluation(config, side, findings)
    _guided_rows(config, policy, findings)
    if config.real.weight:
        with findings.of("real.source"):
            check_source(config.real.source, captioned=bool(config.conditions.captions))
    if config.learner.lora.rank and importlib.util.find_spec("peft") is None:
        findings.problem(
            "learner.lora", "peft to be installed", "none", "pip install 'tessera-rl[lora]'"
        )
    check_loggers(config, findings, begun=begun)
    with findings.of("output.gallery_rows"):
        if config.output.gallery_rows and not config.conditions.captions:  # which may be many
            gallery_rows(config)
    findings.notes += notes(config)
    if policy and tokenizer and not findings.problems and (size := this_gpu()[1]):
        findings.notes += share_notes(processes(config, policy, tokenizer), size)
    return findings


def check_conditions(
    config: RunConfig, policy: PolicyArchitecture | None, findings: Findings
) -> None:
    conditions = config.conditions
    captions = policy is not None and policy.conditioning == "caption"
    if conditions.captions:
        with findings.of("conditions.captions"):
            found = peek_captions(conditions.captions, conditions.column)
            _captions(config, policy, captions, found, findings)
            texts = found.captions.texts
            findings.notes += found.captions.notes
            if conditions.encoder and not found.width:
                check_encoder(conditions.encoder, texts, conditions.long_captions)
                if not encoder_is_here(conditions.encoder):
                    findings.notes.append(
                        f"conditions.encoder: {conditions.encoder} is not on this machine: it is "
                        "fetched when the captions are encoded, before anything is sampled"
                    )
            _check_texts(config, [Condition(text=text) for text in texts], findings)
        return
    if captions:
        findings.problem(
            "conditions.captions",
            "a file of captions, since the policy takes captions",
            "none",
            f"name one ({command_of('actors.captions')} makes it), or another policy",
        )
    known = getattr(policy, "num_classes", 0)
    of_classes = policy is not None and policy.conditioning == "class"
    asked = conditions.classes or range(len(conditions.class_names))
    if of_classes and max(asked) >= known:
        findings.problem(
            "conditions.names",
            f"the {known} classes of {config.policy.checkpoint}, in their order",
            f"{len(conditions.class_names)} names, of which number {max(asked)} is asked for",
            "name the policy's own classes (imagenet for ImageNet's thousand)",
        )
    with findings.of("conditions"):
        _check_texts(config, conditions.conditions(), findings)


def _skipped_pools(config: RunConfig) -> set[str]:
    """Pools with a runtime environment of their own, whose scorers cannot be loaded here."""
    return {name for name, pool in config.reward_pools.items() if pool.runtime_env}


def _check_texts(config: RunConfig, conditions: Sequence[Condition], findings: Findings) -> None:
    judge = config.judge if config.evaluation.num_images else None
    shipped = replace(config.conditions, classes=()) == ConditionsConfig()
    check_texts(
        config.rewards, judge, _skipped_pools(config), conditions, findings, shipped=shipped
    )


def _captions(
    config: RunConfig,
    policy: PolicyArchitecture | None,
    captions: bool,
    found: Peeked,
    findings: Findings,
) -> None:
    """Check a file of captions; `captions`: the policy takes captions."""
    field, width = "conditions.captions", found.width
    if policy is not None and policy.conditioning == "class":
        findings.problem(
            field,
            "nothing, since the policy takes classes",
            config.conditions.captions,
            "leave it empty, or choose a policy of captions",
        )
    if policy is None or not captions:
        return
    if not width and not config.conditions.encoder:
        findings.problem(
            field,
            "captions with features, which the policy reads",
            "text alone",
            f"{command_of('actors.captions')} encodes it, or set conditions.encoder",
        )
    elif width and width != policy.caption_dim:
        findings.problem(
            field,
            f"features of width {policy.caption_dim}, which the policy reads",
            f"width {width}",
            "encode the captions with the encoder that the policy was trained with",
        )
    elif found.longest > policy.caption_tokens:
        findings.problem(
            field,
            f"features of at most {policy.caption_tokens} tokens, which the policy reads",
            f"{found.longest}",
            f"encode the captions with --max-tokens {policy.caption_tokens}",
        )
    if config.conditions.encoder and importlib.util.find_spec("transformers") is None:
        remedy = "pip install 'tessera-rl[t2i]'"
        findings.problem("conditions.encoder", "transformers to be installed", "none", remedy)


def _reference(config: RunConfig, each: Distribution, side: int, findings: Findings) -> None:
    field, term = f"{each.option}.reference", each.term
    published = PUBLISHED.get(term.reference)
    if not fetched(field, term.reference, findings):
        return
    with findings.of(field):
        if not stored_reference(term.reference):
            shape = check_images(field, term.reference, config.conditions)
            covariance = term.covariance
            check_fit(each.features, field, term.reference, shape, side, covariance, findings)
            if term.joint:
                reference_conditions(config, each, shape[0])
            return
        if published is None and not expand_user(term.reference).exists():
            raise ConfigError(_no_reference(term.reference, each.features.options()))
        space, reference = read_moments(config, each)
        _fits_features(each.features, side, space, reference)
        if few := few_images_warning(reference, term.covariance):
            findings.notes.append(f"{field}: {few}")


def _seed(each: Distribution, side: int, findings: Findings) -> None:
    """Check `seed_from`, the moments that the history starts from."""
    field, term, features = f"{each.option}.seed_from", each.term, each.features
    if not term.seed_from:
        return
    with findings.of(field):
        stored = read_stored(term.seed_from, covariance=term.covariance)
        moments = stored.moments()
        _fits_features(features, side, RewardSpace(), stored.reference)
        made_with = stored.reference.fingerprint or f"believed to be of {features.network!r}"
        findings.notes.append(
            f"{field}: the history starts from {term.seed_from}, moments of {moments.weight:.0f} "
            f"images in {moments.dim} dimensions ({made_with}); seed_images are not sampled"
        )
        if few := few_images_warning(stored.reference, term.covariance):
            findings.notes.append(f"{field}: {few}")
        files = (term.seed_from, reference_file(term.reference))
        if len({os.path.realpath(expand_user(file)) for file in files}) == 1:
            findings.notes.append(
                f"{field}: this is the reference itself: the history is meant to start from images "
                "of the base policy, whose moments differ from those of real images"
            )


def _no_reference(path: str, features: str) -> str:
    known = by_file(path)
    remedy = f"build it from real images ({build_command('DIR', features)})"
    if known:
        fetch = f"{fetch_command()} {known.name}"
        remedy = f"name it {known.name} after `{fetch}`, which brings it from {known.url}"
    return f"expected a file of moments, found none at {expand_user(path).absolute()}: {remedy}"


def _fits_features(
    features: FeaturesConfig, side: int, space: RewardSpace, reference: Reference
) -> None:
    """Raises DataError for moments of other features than the run's."""
    fingerprint = reference.fingerprint
    if ours := feature_dim(features, side):
        reference.check_dim(ours + space.added, repr(features.network))
    again = f"build it with the network of the run ({build_command('DIR', features.options())})"
    if fingerprint and not fits_fingerprint(features, fingerprint):
        raise DataError(
            f"expected moments of the features of {features.network!r}, found those of "
            f"{fingerprint!r}: {again}"
        )


def _guided_rows(config: RunConfig, policy: PolicyArchitecture | None, findings: Findings) -> None:
    """Refuse guidance scales in evaluations of a policy that cannot be guided."""
    guided = [row for row in base_rows(config) if row.spec.guided_sampling]
    if policy is None or policy.guidable or not config.evaluation.num_images:
        return
    if guided and config.sampling.guidance == "none":
        findings.problem(
            "evaluation.cfg_scales",
            f"none, since {config.policy.checkpoint} was trained without a null condition",
            ", ".join(f"{scale:g}" for scale in config.evaluation.cfg_scales),
            "leave them out: --evaluation.cfg-scales without a value, or cfg_scales: []",
        )


def notes(config: RunConfig) -> list[str]:
    """Notes on settings that are valid but most likely not intended."""
    found = []
    if note := config.sampling.guidance_note:
        found.append(f"sampling.cfg_scale: {note}")
    if not any(term.weight for term in config.rewards.terms().values()):
        others = {
            "loss.kl_coef": config.loss.kl_coef,
            "entropy.controller": config.entropy.controller != "none",
            "real.weight": config.real.weight,
        }
        left = [name for name, value in others.items() if value]
        what = f"all that changes the policy is {', '.join(left)}" if left else "nothing is learned"
        found.append(
            f"all weights of rewards are 0 (rewards.*.weight): rewards are logged, and {what}"
        )
    terms = {f"rewards.{name}": getattr(config.rewards, name) for name in ("clip", "hps")}
    networks = {name: term for name, term in terms.items() if term.enabled}
    if config.evaluation.num_images:
        networks |= {f"judge.{name}": each for name, each in config.judge.scorers().items()}
    digits = tuple(config.conditions.class_names) == DIGIT_NAMES
    for name, network in networks.items():
        ours = network.model.startswith(NETWORKS)
        captions = network.model.startswith(f"{NETWORKS}/captions/")
        if ours and not (digits and bool(config.conditions.captions) == captions):
            found.append(
                f"{name}.model is the miniature's, which knows the ten digits alone: name "
                "a model for these conditions"
            )
    evaluation, best = config.evaluation, config.output.keep_best
    if not evaluation.num_images and (evaluation.every or best):
        found.append(
            "evaluation.num_images is 0: there is no evaluation, and evaluation.every and "
            "output.keep_best do nothing"
        )
    if config.learner.warmup > config.iterations:
        found.append(
            f"learner.warmup {config.learner.warmup} is not over within {config.iterations} "
            "iterations: the learning rate never reaches learner.lr"
        )
    return found


def listed(findings: Findings) -> list[str]:
    """Lines of all problems, downloads and notes."""
    lines = findings.refusal()
    if findings.downloads:
        total = sum(download.size for download in findings.downloads)
        lines.append(f"downloads, together {size_of(total)}:")
        lines += [f"  {download}" for download in findings.downloads]
    return lines + [f"note: {note}" for note in findings.notes]


def placement_lines(plan: FleetPlan, nodes: Sequence[Node]) -> list[str]:
    """Placement on some nodes: one line a role, then one a node with GPUs or of several."""
    try:
        placement = place(plan, nodes)
    except ConfigError as error:  # a dry run on a laptop, for a cluster
        return [f"does not fit here: {error}"]
    lines = [_placed(role) for role in placement.roles]
    for node in nodes:
        if node.gpus or len(nodes) > 1:
            here = [str(seat) for seat in placement.seats if seat.node == node.name]
            lines.append(f"{node}: {', '.join(here) or 'nothing'}")
    return lines + ([f"note: {placement.note}"] if placement.note else [])


def _placed(p: Placement) -> str:
    threads = f"{p.num_threads} thread{'s' if p.num_threads > 1 else ''}"
    each = f"{p.num_cpus:g} CPU, {p.num_gpus:g} GPU each"
    where = [f"accelerator_type {p.accelerator_type}"] if p.accelerator_type else []
    where += [f"labels {written(p.labels)}"] if p.labels else []
    return ", ".join([f"{p.count} x {p.role}: {each}, {p.device}, {threads}", *where])
