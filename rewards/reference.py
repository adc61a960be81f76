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
import struct
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg

from cluster.errors import DataError
from cluster.files import replacing
from cluster.invocation import command_of
from cluster.paths import expanded
from cluster.sealing import DAMAGED_ARRAYS
from cluster.tensors import locate
from rewards.fid import Reference
from rewards.reference_images import read_header

SYMMETRY = 1e-6  # relative to the largest entry: float32 files are symmetric to rounding
INDEFINITE = 1e-5  # relative to the norm; rounding to float32 moves eigenvalues by 6e-8 of it
UNKNOWN = -1
END_RECORD, MOST_COMMENT, MANY = 22, 1 << 16, 0xFFFF  # of a zip archive (APPNOTE.TXT 4.3.16)


def build_command(images: object) -> str:
    """How a reference is built from images."""
    return f"{command_of('rewards.reference')} --images {images} --out reference.npz"


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
    class_table: np.ndarray | None = None
    """(C, E) embeddings that the joint moments were made with (`rewards.joint.class_table`)."""
    weight: float = 0.0
    """Factor of the embeddings in the joint moments; 0 where there are none."""


def read_reference(path: str | os.PathLike[str], fingerprint: str = "") -> Reference:
    """Mean and covariance of real images' features, from an .npz file with `mu` and `sigma`.

    Args:
        fingerprint: of the feature network in use; compared where the file names one, too.

    Raises:
        CheckpointError: no such file.
        DataError: says what is wrong with the file, and what to do.
    """
    return read_stored(path, fingerprint).reference


def read_stored(
    path: str | os.PathLike[str], fingerprint: str = "", *, joint: bool = False
) -> StoredReference:
    """As `read_reference`, with everything else the file holds.

    Args:
        joint: the moments of features joined with conditions, (D + E), instead of the features'.

    Raises:
        CheckpointError: no such file.
        DataError: says what is wrong with the file, and what to do; also where `joint` is asked
            for and the file has no joint moments.
    """
    prefix = "joint_" if joint else ""
    try:
        with _open(path) as file:
            check_members(file.zip)
            mu_key, sigma_key = f"{prefix}mu", f"{prefix}sigma"
            if mu_key not in file or sigma_key not in file:
                raise DataError(f"{path}: {_no_moments(file, str(path), joint)}")
            mu, sigma = _array(file, path, mu_key), _array(file, path, sigma_key)
            fields = {
                key: _array(file, path, key)
                for key in ("fingerprint", "images", "ddof", "class_counts", "joint_weight")
                if key in file
            }
            if "joint_table" in file:
                fields["joint_table"] = _array(file, path, "joint_table")
    except DAMAGED_ARRAYS as error:
        raise DataError(
            f"{path}: not a readable .npz file ({error}): fetch or build it again"
        ) from error
    mu, sigma = _check(path, mu_key, mu, sigma_key, sigma)
    made_with = str(fields.get("fingerprint", ""))
    if fingerprint and made_with and fingerprint != made_with:
        raise DataError(
            f"{path}: fingerprint: expected features {fingerprint!r}, the file was made with "
            f"{made_with!r}: build it again with this network, {build_command('IMAGES')}"
        )
    images = int(fields.get("images", UNKNOWN))
    return StoredReference(
        reference=Reference(mu, sigma, made_with, str(path), images),
        images=images,
        ddof=int(fields.get("ddof", 1)),
        class_counts=fields.get("class_counts"),
        class_table=fields.get("joint_table"),
        weight=float(fields.get("joint_weight", 0.0)),
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


def _open(path: str | os.PathLike[str]) -> Any:
    """The .npz file; nothing in it is read yet, and nothing is ever unpickled."""
    place = locate(path)
    if not zipfile.is_zipfile(place):
        with place.open("rb") as file:
            start = file.read(6)
        if start == b"\x93NUMPY":
            what = f"one array; if it holds images, build the reference: {build_command(path)}"
        elif start[:1] == b"\x80":
            what = "pickled Python objects, which are not read: they can run any program"
        elif start[:2] == b"PK":
            what = "not a readable .npz file: it was cut off; fetch or build it again"
        else:
            what = "not an .npz file with arrays 'mu' and 'sigma', as FID tools write them"
        raise DataError(f"{path}: {what}")
    return np.load(place, allow_pickle=False)


def check_members(archive: zipfile.ZipFile) -> None:
    """Refuse an archive whose directory lost or renamed a member: an optional array that is not
    found would be taken for one that never was.

    Raises:
        zipfile.BadZipFile: says so.
    """
    stream = archive.fp
    assert stream is not None
    stream.seek(0, os.SEEK_END)
    stream.seek(max(stream.tell() - END_RECORD - MOST_COMMENT, 0))
    end = stream.read().rpartition(b"PK\x05\x06")[2]
    announced = struct.unpack_from("<H", end, 6)[0] if len(end) >= 8 else -1
    found = archive.infolist()
    if announced not in (len(found), MANY):
        raise zipfile.BadZipFile(f"{announced} arrays announced, {len(found)} found")
    for member in found:
        archive.open(member).close()  # compares its two names


def _array(file: Any, path: str | os.PathLike[str], key: str) -> np.ndarray:
    try:
        return file[key]
    except ValueError as error:
        if "allow_pickle" not in str(error):  # numpy's answer to an array of objects
            raise DataError(f"{path}: {key}: damaged ({error}): fetch or build it again") from error
        raise DataError(
            f"{path}: {key}: expected numbers, found pickled Python objects, which are not read: "
            "they can run any program; write the file again with plain arrays"
        ) from error


def _no_moments(file: Any, path: str, joint: bool) -> str:
    if joint and "mu" in file:
        return (
            "has no joint moments of features and conditions: build it with "
            f"{build_command('IMAGES')} --labels --joint classes"
        )
    found = sorted(file.files)
    if any(len(_shape(file, key)) == 4 for key in found):
        return (
            f"holds samples (arrays {found}), not the reference moments 'mu' and 'sigma': build "
            f"them with {build_command(path)}"
        )
    return f"needs arrays 'mu' and 'sigma', found {found}: is this a file of FID statistics?"


def _shape(file: Any, key: str) -> tuple[int, ...]:
    """Shape of an array, of which no more than the header is read; () if it cannot be."""
    try:
        with file.zip.open(f"{key}.npy") as member:
            return read_header(member)[0]
    except DAMAGED_ARRAYS:
        return ()


def _check(
    path: str | os.PathLike[str], mu_key: str, mu: np.ndarray, sigma_key: str, sigma: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and covariance (D, D) as float64, or what is wrong with them."""

    def refuse(key: str, expected: str, found: str) -> DataError:
        again = "the file was not written by an FID tool, or is damaged: build it again"
        return DataError(f"{path}: {key}: expected {expected}, found {found}: {again}")

    for key, array in ((mu_key, mu), (sigma_key, sigma)):
        if array.dtype.kind not in "fiu":
            raise refuse(key, "numbers", f"an array of {array.dtype}")
    dim = mu.size
    if not dim or mu.shape != (dim,) or sigma.shape != (dim, dim):
        expected = f"{mu_key} (D,) and {sigma_key} (D, D)"
        raise refuse(f"{mu_key}, {sigma_key}", expected, f"{mu.shape} and {sigma.shape}")
    mu, sigma = mu.astype(np.float64), sigma.astype(np.float64)
    for key, array in ((mu_key, mu), (sigma_key, sigma)):
        if not np.isfinite(array).all():
            count = int((~np.isfinite(array)).sum())
            raise refuse(key, "finite numbers", f"{count} that are not finite")
    largest = np.abs(sigma).max()
    gap = np.abs(sigma - sigma.T).max()
    if gap > SYMMETRY * largest:
        found = f"one that is not symmetric (by {gap:.3g})"
        raise refuse(sigma_key, "a symmetric matrix", found)
    sigma = (sigma + sigma.T) / 2
    slack = INDEFINITE * np.linalg.norm(sigma)
    try:  # of a shifted matrix: cheaper than eigenvalues, which only the message needs
        scipy.linalg.cholesky(sigma + (slack or 1.0) * np.eye(dim))
    except scipy.linalg.LinAlgError:
        lowest = scipy.linalg.eigvalsh(sigma)[0]
        raise refuse(sigma_key, "a covariance", f"a negative variance of {lowest:.3g}") from None
    return mu, sigma


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["fetch"]:
        from rewards.reference_fetch import run as fetch

        return fetch(list(given[1:]))
    from rewards.reference_build import run  # it imports this module

    return run(arguments)
