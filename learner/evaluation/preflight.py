"""Checks of an evaluation before a run: the judge's networks, and the real images."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from cluster.preflight import Findings
from learner.config import RunConfig
from learner.data.image_checks import check_fit, check_images, check_there, fetched
from learner.evaluation.held_out import SPLITS
from learner.evaluation.in_run import figures_of, judge_fid
from learner.evaluation.real_images import has_images, moments_of
from rewards.preflight import check_judge, same_networks


def check_evaluation(config: RunConfig, side: int, findings: Findings) -> None:
    """Check what a run's evaluations need.

    Args:
        side: pixels a side of the policy's images; 0 if unknown.
    """
    evaluation, conditions = config.evaluation, config.conditions
    if not evaluation.num_images:
        return
    asked = conditions.classes or range(len(conditions.class_names))
    pixels = evaluation.image_size or side
    check_judge(config.judge, pixels, None if conditions.captions else asked, findings)
    findings.notes += same_networks(config.rewards, config.judge)
    networks = [features.network for features in config.judge.spaces().values()]
    if "inception" in networks and evaluation.num_images < 2 * SPLITS:
        findings.notes.append(
            f"evaluation.num_images {evaluation.num_images}: below {2 * SPLITS} images the "
            f"Inception Score is of 1 split, not {SPLITS}, and no published one compares with it"
        )
    field, source = "evaluation.images", evaluation.images
    moments: Collection[str] | None = None
    if source and fetched(field, source, findings):
        with findings.of(field):
            check_there(source)
            moments = None if has_images(source) else moments_of(source, config.judge)
            _real_images(config, pixels, findings)
    found = figures_of(config.judge, moments=moments)
    _check_guard(config, found, findings)
    if config.output.keep_best not in ("", *found):
        findings.problem(
            "output.keep_best",
            f"a figure that these evaluations have ({', '.join(found)})",
            repr(config.output.keep_best),
            "choose one of them, or add to the judge what it needs (judge.*)",
        )


def _check_guard(config: RunConfig, found: Sequence[str], findings: Findings) -> None:
    """Whether the guard against reward hacking has its figure."""
    evaluation, figure = config.evaluation, judge_fid(config)
    if not (evaluation.every and evaluation.images) or figure in found:
        return
    needed = "real images, or moments of that space"
    if evaluation.hacking == "stop":
        findings.problem(
            "evaluation.images",
            f"{needed}, for {figure}, which evaluation.hacking watches",
            f"{evaluation.images}, which does not give it",
            "name real images, or set evaluation.hacking to off",
        )
    elif evaluation.hacking != "off":
        findings.notes.append(
            f"evaluation.hacking never acts: it watches {figure}, and {evaluation.images} does not "
            f"give it (it needs {needed})"
        )


def _real_images(config: RunConfig, side: int, findings: Findings) -> None:
    """Check `evaluation.images`, and that they fit the judge's feature spaces.

    Raises:
        TesseraError: they do not.
    """
    field, source = "evaluation.images", config.evaluation.images
    moments = moments_of(source, config.judge)
    if not has_images(source):
        findings.notes.append(
            f"{field}: {source} holds moments alone: FID is computed, but nothing that compares "
            "single images (precision, recall, density, coverage)"
        )
        return
    shape = check_images(field, source, config.conditions)
    k = config.evaluation.neighbours
    if shape[0] <= k:
        findings.problem(
            field,
            f"more than {k} images, for {k} nearest neighbours",
            f"{shape[0]} in {source}",
            "name a larger set, or fewer evaluation.neighbours",
        )
    for space, features in config.judge.spaces().items():
        covariance = "known" if space in moments else "full"
        check_fit(features, field, source, shape, side, covariance, findings)
