"""Checks of an evaluation before a run: the judge's networks, and the real images."""

from __future__ import annotations

from cluster.preflight import Findings
from learner.config import RunConfig
from learner.data.image_checks import check_fit, check_images, check_there, fetched
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
    field = "evaluation.images"
    if not evaluation.images:
        return
    if fetched(field, evaluation.images, findings):
        with findings.of(field):
            _real_images(config, pixels, findings)


def _real_images(config: RunConfig, side: int, findings: Findings) -> None:
    """Check `evaluation.images`, and that they fit the judge's feature spaces.

    Raises:
        TesseraError: they do not.
    """
    field, source = "evaluation.images", config.evaluation.images
    check_there(source)
    moments = moments_of(source, config.judge)
    if not has_images(source):
        findings.notes.append(
            f"{field}: {source} holds moments alone: FID is computed, but nothing that compares "
            "single images (precision, recall, density, coverage)"
        )
        return
    shape = check_images(field, source, config.conditions)
    for space, features in config.judge.spaces().items():
        covariance = "known" if space in moments else "full"
        check_fit(features, field, source, shape, side, covariance, findings)
