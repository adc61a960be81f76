"""Reference moments of real images: `python -m rewards.reference --images photos --out ref.npz`,
or published ones: `python -m rewards.reference fetch imagenet256`.

Reads the files that FID tools write (pytorch-fid, clean-fid, torch-fidelity, the ADM evaluator's
batches: arrays `mu` and `sigma`, whatever else is in them), and writes such files, with more in
them: how many images, of which feature network, of which classes.

Shapes: D feature dimensions, E embedding dimensions, C classes.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    import sys

    from cluster.program import run_command

    sys.exit(run_command("rewards.reference"))

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cluster.errors import DataError
from cluster.files import replacing
from cluster.paths import expanded
from rewards.fid import Reference
from rewards.leave_one_out import Covariance
from rewards.moments import Moments
from rewards.statistics_advice import build_command
from rewards.statistics_files import open_arrays, read_statistics

UNKNOWN = -1


@dataclass(frozen=True)
class StoredReference:
    """What a reference file holds."""

    reference: Reference
    """Of the features, or of features joined with conditions (`read_stored(joint=True)`)."""
    images: int = UNKNOWN
    """How many real images; -1 where the file does not say."""
    ddof: int = 1
    """sigma is divided by images - ddof. Files that do not say are taken for FID tools', which use
    numpy.cov and with it 1; sigma is used as it is written (at 10,000 images the difference is
    1e-4 of sigma)."""
    class_counts: np.ndarray | None = None
    """(C,) int64, images of each class."""
    class_names: tuple[str, ...] = ()
    """One a class, as the images' folders or labels name them; () where the file has none."""
    class_table: np.ndarray | None = None
    """(C, E) embeddings that the joint moments were made with (`rewards.joint.class_table`)."""
    weight: float = 0.0
    """Factor of the embeddings in the joint moments; 0 where there are none."""

    def moments(self) -> Moments:
        """The moments of these images, each of weight 1, as if they were added up here.

        Raises:
            DataError: the file does not say of how many images they are.
        """
        path, count = self.reference.source, self.images
        if count < 2:
            raise DataError(
                f"{path}: count: expected the number of images, which is the weight of their "
                f"moments, found {'none' if count == UNKNOWN else count}: write it beside them: "
                "numpy.savez('statistics.npz', mu=mu, sigma=sigma, count=N)"
            )
        cov = self.reference.sigma * ((count - self.ddof) / count)
        weight = float(count)
        return Moments(mean=self.reference.mu, cov=cov, weight=weight, square_weight=weight)


def read_reference(path: str | os.PathLike[str], fingerprint: str = "") -> Reference:
    """Mean and covariance of real images' features, from a file with `mu` and `sigma`.

    Args:
        fingerprint: of the feature network in use; compared where the file names one, too.

    Raises:
        CheckpointError: no such file.
        DataError: says what is wrong with the file, and what to do.
    """
    return read_stored(path, fingerprint).reference


def read_stored(
    path: str | os.PathLike[str],
    fingerprint: str = "",
    *,
    joint: bool = False,
    covariance: Covariance = "full",
) -> StoredReference:
    """As `read_reference`, with everything else the file holds.

    Args:
        joint: the moments of features joined with conditions, (D + E), instead of the features'.
        covariance: what is asked of them; for "diagonal", a file with variances alone will do.

    Raises:
        CheckpointError: no such file.
        DataError: says what is wrong with the file, and what to do; also where `joint` is asked
            for and the file has no joint moments.
    """
    with open_arrays(path) as file:
        if joint and "joint_mu" not in file and "mu" in file:
            raise DataError(
                f"{path}: has no joint moments of features and conditions: build it with "
                f"{build_command('IMAGES')} --labels --joint classes"
            )
        prefix = "joint_" if joint else ""
        found = read_statistics(file, prefix, diagonal=covariance == "diagonal")
        made_with = file.text("fingerprint")
        # "count": of the public code of 2603.23086, whose `meta` is pickled and not looked at
        images = file.count("images" if "images" in file else "count", UNKNOWN)
        ddof, weight = file.count("ddof", 1), file.number("joint_weight", 0.0)
        counts, names = file.numbers("class_counts", "iu", 1), file.texts("class_names")
        table = file.numbers("joint_table", "f", 2)
    if fingerprint and made_with and fingerprint != made_with:
        raise DataError(
            f"{path}: fingerprint: expected features {fingerprint!r}, the file was made with "
            f"{made_with!r}: build it again with this network, {build_command('IMAGES')}"
        )
    return StoredReference(
        reference=Reference(
            found.mu, found.sigma, made_with, str(path), images, diagonal=found.diagonal
        ),
        images=images,
        ddof=ddof,
        class_counts=counts,
        class_names=names,
        class_table=table,
        weight=weight,
    )


def write_reference(
    path: str | os.PathLike[str],
    reference: Reference,
    *,
    images: int = UNKNOWN,
    ddof: int = 0,
    extra: dict[str, np.ndarray] | None = None,
) -> None:
    """Write a file that `read_reference` and the FID tools read; it appears whole or not at all.

    Args:
        ddof: what the reference's sigma was divided by is images - ddof; stored, not changed.
        extra: further arrays, by key; none may need pickling.
    """
    arrays: dict[str, Any] = {
        "mu": reference.mu,
        "sigma": reference.sigma,
        "fingerprint": np.array(reference.fingerprint),
        "images": np.array(images),
        "ddof": np.array(ddof),
    }
    write_arrays(expanded(path), arrays | (extra or {}))


def write_arrays(path: Path, arrays: dict[str, Any]) -> None:
    """An .npz file, renamed into place when it is whole."""
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)
        file.flush()
        os.fsync(file.fileno())


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["fetch"]:
        from rewards.reference_fetch import run as fetch

        return fetch(list(given[1:]))
    from rewards.reference_build import run  # it imports this module

    return run(arguments)
