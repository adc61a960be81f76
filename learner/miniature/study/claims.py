"""What each part was expected to show, as comparisons of policies; results decide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from learner.miniature.study.names import (
    BASE,
    BEST,
    BOTH,
    INSTANCE_ONLY,
    JOINT_ONLY,
    LARGER_WEIGHTS,
    LOO_FID_ONLY,
    MORE_REAL,
    SUPERVISED,
    TRUNCATED,
    TWO_SPACES,
    WITH_ENTROPY,
    WITH_REAL,
)

QUALITY = ("fid", "accuracy", "density", "coverage")
RECALLS = ("recall", "second/recall", "clip/recall")
DIVERSITY = ("coverage", "recall", "second/coverage", "second/recall", "clip/recall")


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A policy is better than another in some figures."""

    says: str
    """A sentence without its full stop."""
    policy: str
    other: str
    metrics: tuple[str, ...]
    of_paper: bool = True
    """The paper says so (its abstract); else this project does."""


NO_GUIDANCE = Claim(
    says="Without guidance, the tuned policy is better than the base policy at its best",
    policy=BOTH,
    other=BEST,
    metrics=QUALITY,
)
MAIN = (
    NO_GUIDANCE,
    Claim(
        says="Rewards of single images raise accuracy",
        policy=INSTANCE_ONLY,
        other=BASE,
        metrics=("accuracy", "clip"),
    ),
    Claim(
        says="They do so at the expense of diversity, of which the base policy has more",
        policy=BASE,
        other=INSTANCE_ONLY,
        metrics=DIVERSITY,
    ),
    Claim(
        says="The distribution reward gives diversity back",
        policy=BOTH,
        other=INSTANCE_ONLY,
        metrics=("fid", *DIVERSITY),
    ),
    Claim(
        says="The distribution reward alone raises quality and diversity",
        policy=LOO_FID_ONLY,
        other=BASE,
        metrics=(*QUALITY, "second/fid", "second/coverage"),
    ),
    Claim(
        says="Adaptive entropy adds diversity",
        policy=WITH_ENTROPY,
        other=BOTH,
        metrics=DIVERSITY,
    ),
    Claim(
        says="Joint with the condition, the distribution reward alone is more accurate",
        policy=JOINT_ONLY,
        other=LOO_FID_ONLY,
        metrics=("accuracy", "fid", "coverage"),
        of_paper=False,
    ),
    Claim(
        says="The tuned policy keeps the recall of the base policy at its best",
        policy=BOTH,
        other=BEST,
        metrics=RECALLS,
        of_paper=False,
    ),
    Claim(
        says="With joint LOO-FID in two spaces, it is better than the base policy at its best",
        policy=TWO_SPACES,
        other=BEST,
        metrics=QUALITY,
        of_paper=False,
    ),
    Claim(
        says="With joint LOO-FID in two spaces, it keeps the recall of the base policy at its best",
        policy=TWO_SPACES,
        other=BEST,
        metrics=RECALLS,
        of_paper=False,
    ),
)


UNGUIDED = (
    Claim(
        says="Rewards beside real images are better than real images alone, without guidance",
        policy=WITH_REAL,
        other=SUPERVISED,
        metrics=QUALITY,
        of_paper=False,
    ),
    Claim(
        says="Rewards beside real images leave more variety than real images alone",
        policy=WITH_REAL,
        other=SUPERVISED,
        metrics=DIVERSITY,
        of_paper=False,
    ),
)


def of_real_images(policy: str, sampling: str) -> tuple[Claim, ...]:
    """Claims on real images beside the rewards.

    Args:
        sampling: how the policy of real images alone is sampled.
    """
    return (
        Claim(
            says="With rewards and real images, it is better than the base policy at its best",
            policy=policy,
            other=BEST,
            metrics=QUALITY,
            of_paper=False,
        ),
        Claim(
            says=f"Rewards beside real images are better than real images alone with {sampling}",
            policy=policy,
            other=f"{SUPERVISED}, {sampling}",
            metrics=(*QUALITY, "recall", "second/recall"),
            of_paper=False,
        ),
    )


def goal(policy: str, sampling: str) -> Claim:
    """Every figure is better than those of the base policy.

    Args:
        sampling: how that is sampled.
    """
    return Claim(
        says=f"{policy}: every figure is better than with {sampling} of the base, in pixels, too",
        policy=policy,
        other=f"{BASE}, {sampling}",
        metrics=(
            *QUALITY,
            "recall",
            *(f"second/{name}" for name in (*QUALITY, "recall") if name != "accuracy"),
        ),
        of_paper=False,
    )


OF_LLAMAGEN = (
    *MAIN,
    *UNGUIDED,
    *of_real_images(WITH_REAL, "CFG 2"),
    goal(WITH_REAL, "CFG 2"),
    goal(MORE_REAL, "CFG 2"),
)
SETTINGS = (
    Claim(
        says="The full covariance is better than the diagonal",
        policy=BOTH,
        other="diagonal covariance",
        metrics=(*QUALITY, "second/fid"),
        of_paper=False,
    ),
    Claim(
        says="The public code's settings are better with its defects mended",
        policy="public code mended",
        other="public code",
        metrics=(*QUALITY, *RECALLS),
        of_paper=False,
    ),
)
CLAIMS: dict[str, Sequence[Claim]] = {  # those of policies that a part leaves out are not shown
    "llamagen": OF_LLAMAGEN,
    "vqgan": (*MAIN, *of_real_images(TRUNCATED, "top-p .8"), goal(TRUNCATED, "top-p .8")),
    "captions": OF_LLAMAGEN,
    "mnist": OF_LLAMAGEN,
    "ablations": SETTINGS,
}
PAIRS = (
    (BOTH, BEST),
    (BOTH, BASE),
    (INSTANCE_ONLY, BASE),
    (BOTH, INSTANCE_ONLY),
    (LOO_FID_ONLY, BASE),
    (JOINT_ONLY, BEST),
    (JOINT_ONLY, LOO_FID_ONLY),
    (WITH_ENTROPY, BOTH),
    (TWO_SPACES, BEST),
    (TWO_SPACES, BASE),
    (TWO_SPACES, BOTH),
    (WITH_REAL, BEST),
    (WITH_REAL, f"{BASE}, CFG 2"),
    (WITH_REAL, BASE),
    (WITH_REAL, TWO_SPACES),
    (WITH_REAL, LARGER_WEIGHTS),
    (MORE_REAL, f"{BASE}, CFG 2"),
    (MORE_REAL, WITH_REAL),
    (WITH_REAL, SUPERVISED),
    (WITH_REAL, f"{SUPERVISED}, CFG 2"),
    (TRUNCATED, BEST),
    (TRUNCATED, f"{BASE}, top-p .8"),
    (TRUNCATED, TWO_SPACES),
    (TRUNCATED, f"{SUPERVISED}, top-p .8"),
)
"""Policies of the table of comparisons, where a part has both."""


def pairs_of(part: str, arms: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Policies to compare; of ablations each with the usual settings, of recall with CFG 2."""
    if part == "ablations":
        return tuple((arm, BOTH) for arm in arms if arm != BOTH)
    if part == "recall":
        return tuple((arm, f"{BASE}, CFG 2") for arm in arms)
    return PAIRS
