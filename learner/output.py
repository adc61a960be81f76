"""Options of output, checkpoints and evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from pydantic import Field
from tyro.constructors import PrimitiveConstructorSpec

from cluster.io.strict_json import number
from cluster.messages import MOST_CFG_SCALE
from learner.training.skips import Action
from rewards.metrics.figures import BETTER, OF_A_SPACE, SECOND_SPACE, better, prefix_of

FIGURES = tuple(name for name in BETTER if better(name) and name != "vendi")
"""What `output.keep_best` may name, beside SPACE/NAME: figures with a better direction."""
ALONE = ("accuracy", "clip", "hps", "inception_score", "r_precision")
"""Those that do not compare with real images."""

LOCAL = ("file", "local")
"""URL schemes of local directories."""


LoggerName = Literal["tensorboard", "wandb", "mlflow"]


def _names(words: list[str]) -> tuple[str, ...]:
    """`wandb,mlflow` and `wandb mlflow` -> the names.

    Raises:
        ValueError: says which are known.
    """
    names = tuple(name for word in words for name in word.split(",") if name)
    known = get_args(LoggerName)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"expected some of {', '.join(known)}, found {', '.join(unknown)}")
    return tuple(dict.fromkeys(names))


Names = PrimitiveConstructorSpec(
    nargs="*",
    metavar="[{" + ",".join(get_args(LoggerName)) + "} ...]",
    instance_from_str=_names,
    is_instance=lambda value: isinstance(value, tuple),
    str_from_instance=list,
)
"""How the command line takes the names of loggers."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Evaluation by the judge, before, during and after training."""

    num_images: Annotated[int, Field(ge=0)] = 1000
    """Images of each evaluated policy. Equally many of each class (rounded up), or of as many
    captions, evenly spaced; 0: no evaluation, whatever the options below and output.keep_best."""
    cfg_scales: tuple[Annotated[float, Field(gt=1, le=MOST_CFG_SCALE)], ...] = (1.5, 2.0)
    """Guidance scales at which the base policy is evaluated, too."""
    every: Annotated[int, Field(ge=0)] = 0
    """Iterations between evaluations while training (evaluations.jsonl, TensorBoard); each has a
    checkpoint. 0: only before and after training."""
    images: str = "digits:held-out"
    """Real images to compare with: "digits:held-out"; imagenet256 (64, 128, 512), ADM's, after
    `python -m rewards.reference fetch imagenet256`; or a folder of images, Parquet files, or an
    .npz file with uint8 images arr_0, moments mu and sigma, or both. Empty: none, scores alone."""
    image_size: Annotated[int, Field(ge=0, le=4096)] = 0
    """Side in pixels to which samples are resized before rounding to 8 bits, as LlamaGen's
    --image-size-eval (256 for policies of 384 pixels); 0: not resized."""
    neighbours: Annotated[int, Field(ge=1)] = 5
    """Number of neighbours (k) of precision, recall, density and coverage."""
    patience: Annotated[int, Field(ge=0)] = 0
    """Evaluations while training without a better value of output.keep_best's figure, after which
    training ends as it does at its last iteration: the current policy is evaluated and reported.
    With --resume, a larger value or 0 trains on. 0: never."""
    hacking: Action = "warn"
    """Guard against reward hacking: rewards rise while the judge's FID, in a space that no reward
    uses, gets worse. off | warn | stop."""
    max_fid_rise: Annotated[float, Field(gt=0)] = 0.1
    """Share of its least value by which that FID may rise before evaluation.hacking acts."""
    diversity: Action = "warn"
    """Guard against lost diversity: coverage or recall far below the base policy's. off | warn |
    stop."""
    max_diversity_loss: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """Share of the base policy's coverage and recall that may be lost before evaluation.diversity
    acts."""


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """Checkpoints, galleries and rollouts of a run."""

    checkpoint_every: Annotated[int, Field(ge=1)] = 50
    """Iterations between checkpoints; the last iteration always has one."""
    keep_checkpoints: Annotated[int, Field(ge=1)] = 3
    """Number of newest checkpoints to keep."""
    keep_every: Annotated[int, Field(ge=0)] = 0
    """Also keep every checkpoint whose iteration is a multiple of this, itself a multiple of
    checkpoint_every; 0: none."""
    keep_best: str = ""
    """Also keep the checkpoint with the best evaluation while training (evaluation.every), by this
    figure: fid, sfid (the least), density, coverage, precision, recall, inception_score, clip, hps,
    accuracy (the most), or second/fid and so on, in the judge's second space (or a further one);
    best.json names it. Empty: none."""
    background: bool = True
    """Write checkpoints in the background, from a copy of policy and optimizer in the learner's
    host memory (12 bytes a parameter; from a GPU up to 21). False: the learner waits, without a
    copy."""
    checkpoint_url: str = ""
    """Copy checkpoints to this URL (s3://, gs://, file://, or any that pyarrow or fsspec opens), a
    directory for this run only; credentials come from the environment. --resume takes the newest of
    both places."""
    gallery_every: Annotated[int, Field(ge=0)] = 50
    """Iterations between galleries; 0: only before and after training."""
    gallery_columns: Annotated[int, Field(ge=1, le=64)] = 12
    """Images of each row of a gallery, always from the same random numbers."""
    gallery_rows: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Classes in galleries, by index (captions by their number in the file, from 0). Empty: all, or
    16 evenly spaced ones."""
    loggers: Annotated[tuple[LoggerName, ...], Names] = ("tensorboard",)
    """Tools that show curves and galleries: tensorboard, wandb (Weights & Biases), mlflow, by their
    own settings (WANDB_MODE, MLFLOW_TRACKING_URI); --output.loggers wandb,mlflow. --resume
    continues their runs."""
    rollouts: bool = True
    """Write every rollout with its scores to Parquet."""


def check_output(
    output: OutputConfig, evaluation: EvaluationConfig, further: Iterable[str] = ()
) -> None:
    """Refuse contradictory settings of evaluations and checkpoints.

    Args:
        further: names of the judge's further feature spaces.

    Raises:
        ValueError: says what to set.
    """
    if output.keep_best and evaluation.num_images and not evaluation.every:
        raise ValueError(
            f"output.keep_best {output.keep_best!r} needs evaluations while training: set "
            "evaluation.every to the number of iterations between them"
        )
    spaces = [prefix_of(space) for space in (SECOND_SPACE, *further)]
    figures = (*FIGURES, *(prefix + name for prefix in spaces for name in OF_A_SPACE))
    if output.keep_best and output.keep_best not in figures:
        raise ValueError(
            f"output.keep_best: expected a figure of the evaluation ({', '.join(figures)}), found "
            f"{output.keep_best!r}"
        )
    if output.keep_best not in ("", *ALONE) and not evaluation.images:
        raise ValueError(
            f"output.keep_best {output.keep_best!r} compares with real images: name them by "
            f"evaluation.images, or choose one of {', '.join(ALONE)}"
        )
    if evaluation.patience and not output.keep_best:
        raise ValueError(
            f"evaluation.patience {evaluation.patience} watches the figure of output.keep_best, "
            "which also keeps the best checkpoint: set that, to fid for example"
        )
    if output.keep_every % output.checkpoint_every:
        raise ValueError(
            f"output.keep_every must be a multiple of output.checkpoint_every "
            f"({output.checkpoint_every}), found {output.keep_every}"
        )
    check_url(output.checkpoint_url)


def best_step(figure: str, figures: Mapping[int, Mapping[str, float]]) -> int | None:
    """The step with the best value of a figure, the earlier of equals; None if no step has one.

    Args:
        figures: step -> figures of its evaluation.
    """
    sign = 1 if better(figure) == "lower" else -1
    found = [
        (sign * values[figure], step)
        for step, values in figures.items()
        if math.isfinite(number(values.get(figure)))
    ]
    return min(found)[1] if found else None


def check_url(url: str) -> None:
    """Refuse what is no URL, or contains credentials, which would be written into files.

    Raises:
        ValueError: says what was found.
    """
    scheme, mark, rest = url.partition("://")
    if url and not (scheme and mark):
        raise ValueError(
            f"output.checkpoint_url must be a URL (s3://bucket/run, file:///place), found {url!r}"
        )
    if scheme in LOCAL and not rest.startswith("/"):
        raise ValueError(
            f"output.checkpoint_url must name a place by its whole path (file:///place), found "
            f"{url!r}: where a relative one leads depends on where a command is started"
        )
    if "@" in rest.partition("/")[0]:
        raise ValueError(
            "output.checkpoint_url must not hold a user or a password: they would be written into "
            "the run's files; give them by the environment"
        )
