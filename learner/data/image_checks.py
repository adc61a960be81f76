"""Checks of real images before a run: that they are there, and fit the policy's and a network."""

from __future__ import annotations

from contextlib import suppress

from cluster.errors import CheckpointError, DataError, did_you_mean
from cluster.io.paths import expand_user
from cluster.model_files.tensors import locate
from cluster.preflight import Download, Findings
from learner.data.conditions import ConditionsConfig
from learner.data.datasets import open_images
from learner.data.named_sets import CLASSES, NAMES, is_named
from rewards.distribution.diagnostics import few_images
from rewards.networks.convnet import convnet_config
from rewards.networks.features import FeaturesConfig, convnet_file
from rewards.networks.features_check import feature_dim
from rewards.reference.fetch import PUBLISHED, fetch_command, reference_file


def fetched(field: str, reference: str, findings: Findings) -> bool:
    """Whether a published reference is on this machine; True for other references."""
    published = PUBLISHED.get(reference)
    if published is None or published.place().is_file():
        return True
    command = f"{fetch_command()} {published.name}"
    remedy = f"{command} ({published.url})"
    findings.problem(field, f"{published.name} at {published.place()}", "nothing there", remedy)
    if published.url not in (download.url for download in findings.downloads):
        findings.downloads.append(
            Download(
                field=field,
                name=published.file,
                url=published.url,
                size=published.size,
                command=command,
            )
        )
    return False


def check_there(source: str) -> None:
    """
    Raises:
        CheckpointError: neither a set or a published reference by that name, nor a path.
    """
    if is_named(source) or expand_user(source).is_dir():
        return
    names = [*NAMES, *PUBLISHED]
    try:
        locate(reference_file(source))
    except CheckpointError as error:
        hint = did_you_mean(source, names).strip() or f"there are {', '.join(names)}, or a path"
        raise CheckpointError(f"{error}: {hint}") from error


def check_images(field: str, source: str, conditions: ConditionsConfig) -> tuple[int, int, int]:
    """Check that real images exist, and show the run's classes; returns their N, H, W.

    Raises:
        DataError: they do not.
    """
    check_there(source)
    images = open_images(source)
    height, width = images.size
    if is_named(source) and not conditions.captions:
        ours = len(conditions.class_names)
        if ours != CLASSES:
            raise DataError(
                f"expected real images of the {ours} classes of conditions.names, found the ten "
                f"digits ({source}): set {field} to images or moments of these classes"
                + ("" if field.startswith("rewards") else ", or evaluation.num_images to 0")
            )
    return len(images), height, width


def check_fit(
    features: FeaturesConfig,
    field: str,
    source: str,
    shape: tuple[int, int, int],
    side: int,
    covariance: str,
    findings: Findings,
) -> None:
    """Check that real images and the policy's fit one feature space, and warn if there are few.

    Raises:
        DataError: pixels are compared, or a network that takes one size alone, and the images have
            another.
    """
    count, height, width = shape
    if features.network == "pixels" and side and (height, width) != (side, side):
        raise DataError(
            f"{source}: expected images of {side} x {side}, as the policy's, since pixels are "
            f"compared ({side * side} dimensions), found {height} x {width} ({height * width}): "
            "resize them, or choose a network"
        )
    if features.network == "convnet":
        with suppress(CheckpointError):  # a problem of the network's own field
            takes = convnet_config(convnet_file(features)).image_size
            if (height, width) != (takes, takes):
                raise DataError(
                    f"{source}: expected images of {takes} x {takes}, as the feature network "
                    f"{convnet_file(features)} takes, found {height} x {width}: choose a network "
                    "for these images, or other images"
                )
    dim = feature_dim(features, side)
    if dim and covariance == "full" and (few := few_images(source, count, dim)):
        findings.notes.append(f"{field}: {few}")
