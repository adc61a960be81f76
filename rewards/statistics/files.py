"""Reads files of feature statistics, a mean `mu` and a covariance `sigma`, as FID tools write them.

Formats, by content: .npz files (pytorch-fid, clean-fid, TTUR, the ADM evaluator, EDM, the public
code of 2603.23086, Tessera) and torch-fidelity's .pt. Only requested arrays are read, and nothing
is unpickled. Errors for other files name their kind and what to do.

Shapes: D feature dimensions, N images.
"""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import scipy.linalg

from cluster.errors import DataError
from cluster.io.checksum import DAMAGED_ARRAYS
from cluster.io.paths import expand_user
from cluster.model_files.file_kinds import FileKind, file_kind
from cluster.model_files.tensors import locate
from rewards.images.sources import read_header
from rewards.statistics.advice import MU, NUMPY, build_command, no_moments, other_kind
from rewards.statistics.torch_files import TorchArrays

SYMMETRY = 1e-6  # relative to the largest entry: float32 files are symmetric to rounding
INDEFINITE = 1e-5  # relative to the norm; rounding to float32 moves eigenvalues by 6e-8 of it
LARGEST = 1e100  # products of larger values may not be finite
END_RECORD, MOST_COMMENT, MANY = 22, 1 << 16, 0xFFFF  # of a zip archive (APPNOTE.TXT 4.3.16)
SIGMA, VARIANCES = "sigma", "sigma_diagonal"


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance, checked."""

    mu: np.ndarray
    """(D,) float64"""
    sigma: np.ndarray
    """(D, D) float64; of variances alone, a diagonal matrix."""
    diagonal: bool = False
    """The file has variances only (`sigma_diagonal`), no covariances."""


class ArraySource(Protocol):
    """Arrays by name."""

    loader: str
    """Function that reads such a file."""

    @property
    def names(self) -> Sequence[str]: ...

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of an array from its header; () if it cannot be read."""
        ...

    def read(self, key: str) -> np.ndarray: ...


class ArrayFile:
    """Arrays of a file, each read on request."""

    def __init__(self, path: str | os.PathLike[str], source: ArraySource) -> None:
        self.path, self._source = path, source
        self.names = sorted(source.names)
        self.shape, self.loader = source.shape, source.loader

    def __contains__(self, key: str) -> bool:
        return key in self.names

    def array(self, key: str) -> np.ndarray:
        """An array of numbers, or of text.

        Raises:
            DataError: damaged, or pickled objects.
        """
        try:
            return self._source.read(key)
        except ValueError as error:
            if "allow_pickle" not in str(error):  # numpy's answer to an array of objects
                raise DataError(
                    f"{self.path}: {key}: damaged ({error}): fetch or build it again"
                ) from error
            raise DataError(
                f"{self.path}: {key}: expected numbers, found pickled Python objects, which are "
                "not read: they can run any program; write the file again with plain arrays"
            ) from error

    def number(self, key: str, otherwise: float) -> float:
        """A number of shape () or (1,); `otherwise` without such an array.

        Raises:
            DataError: not one finite number.
        """
        if key not in self:
            return otherwise
        array = self.array(key)
        if array.size != 1 or array.dtype.kind not in "fiu" or not np.isfinite(array).all():
            raise DataError(
                f"{self.path}: {key}: expected a number, found {_kind(array)}: the file is damaged"
                ", or of another program: fetch or build it again"
            )
        return float(array.reshape(()))

    def count(self, key: str, otherwise: int) -> int:
        """As `number`, for integers >= 0."""
        found = self.number(key, otherwise)
        if found != int(found) or (found < 0 and found != otherwise):
            raise DataError(f"{self.path}: {key}: expected a whole number >= 0, found {found:g}")
        return int(found)

    def numbers(self, key: str, kinds: str, dims: int) -> np.ndarray | None:
        """An array of finite numbers; None without such an array.

        Raises:
            DataError: another dtype kind (numpy's letters) or number of dimensions.
        """
        if key not in self:
            return None
        array = self.array(key)
        if array.dtype.kind not in kinds or array.ndim != dims or not np.isfinite(array).all():
            raise DataError(
                f"{self.path}: {key}: found {_kind(array)}: the file is damaged, build it again"
            )
        return array

    def text(self, key: str) -> str:
        """A string; empty without such an array."""
        if key not in self:
            return ""
        array = self.array(key)
        if array.size != 1 or array.dtype.kind != "U":
            raise DataError(f"{self.path}: {key}: expected a text, found {_kind(array)}")
        return str(array.reshape(()))

    def texts(self, key: str) -> tuple[str, ...]:
        """Strings; () without such an array."""
        if key not in self:
            return ()
        array = self.array(key)
        if array.ndim != 1 or array.dtype.kind != "U":
            raise DataError(f"{self.path}: {key}: expected texts, found {_kind(array)}")
        return tuple(map(str, array))


@contextmanager
def open_arrays(path: str | os.PathLike[str]) -> Iterator[ArrayFile]:
    """Open a file of statistics.

    Raises:
        CheckpointError: no such file.
        DataError: another kind of file, or a damaged one.
    """
    if expand_user(path).is_dir():
        raise DataError(
            f"{path}: expected a file of statistics, found a folder: if it holds images, build "
            f"their reference: {build_command(path)}"
        )
    place = locate(path)
    kind = FileKind.BINARY
    try:
        kind = file_kind(place)
        if kind is FileKind.NPZ:
            with np.load(place, allow_pickle=False) as file:
                check_members(file.zip)
                yield ArrayFile(path, _Npz(file))
            return
        if kind in (FileKind.TORCH, FileKind.TORCH_LEGACY):
            yield ArrayFile(path, TorchArrays(place, path))
            return
        reason = other_kind(place, path, kind)
    except DAMAGED_ARRAYS as error:
        what = kind.value.removeprefix("an ") if kind is FileKind.NPZ else "file"
        raise DataError(
            f"{path}: not a readable {what} ({error}): fetch or build it again"
        ) from error
    raise DataError(f"{path}: {reason}")


def read_statistics(
    file: ArrayFile, prefix: str = "", *, suffix: str = "", diagonal: bool = False
) -> Statistics:
    """Mean and covariance of a file.

    Args:
        prefix, suffix: of the arrays' names.
        diagonal: accept variances only (`sigma_diagonal`).

    Raises:
        DataError: missing or invalid arrays.
    """
    mu_key, sigma_key, diagonal_key = (prefix + key + suffix for key in (MU, SIGMA, VARIANCES))
    if mu_key not in file or not {sigma_key, diagonal_key} & set(file.names):
        raise DataError(
            f"{file.path}: {no_moments(file.path, file.names, file.shape, file.loader)}"
        )
    alone = sigma_key not in file
    if alone and not diagonal:
        raise DataError(
            f"{file.path}: {sigma_key}: expected a covariance (D, D), found variances alone "
            f"({diagonal_key}), which serve covariance=diagonal: set the reward's covariance to "
            "diagonal (rewards.loo_fid.covariance), or take statistics with the full covariance "
            "(the public code's make_gen_stats.py --stats both)"
        )
    mu, checks = file.array(mu_key), _Checks(file.path)
    variances = file.array(diagonal_key) if diagonal_key in file else None
    if alone:
        assert variances is not None
        mu, variances = checks.mean(mu_key, mu), checks.variances(diagonal_key, variances, mu.size)
        sigma = np.diag(variances)
    else:
        if shape := file.shape(sigma_key):
            checks.fit(mu_key, mu.shape, sigma_key, shape)
        mu, sigma = checks.moments(mu_key, mu, sigma_key, file.array(sigma_key))
        if variances is not None:
            variances = checks.variances(diagonal_key, variances, mu.size)
            checks.same(diagonal_key, variances, sigma_key, sigma)
    dims = file.count("dims", mu.size) if not prefix + suffix else mu.size
    if dims != mu.size:
        raise checks.refuse("dims", f"{mu.size}, as {mu_key} has", str(dims))
    return Statistics(mu, sigma, alone)


class _Npz:
    loader = NUMPY

    def __init__(self, file: np.lib.npyio.NpzFile) -> None:
        self._file, self.names = file, file.files

    def shape(self, key: str) -> tuple[int, ...]:
        archive = self._file.zip
        assert archive is not None
        try:
            with archive.open(f"{key}.npy") as member:
                return read_header(member, fortran=True)[0]
        except DAMAGED_ARRAYS:
            return ()

    def read(self, key: str) -> np.ndarray:
        return self._file[key]


def check_members(archive: zipfile.ZipFile) -> None:
    """Check an archive's directory: a lost optional array would pass as one that was never written.

    Raises:
        zipfile.BadZipFile: members were lost, renamed or doubled.
    """
    stream = archive.fp
    assert stream is not None
    stream.seek(0, os.SEEK_END)
    stream.seek(max(stream.tell() - END_RECORD - MOST_COMMENT, 0))
    end = stream.read().rpartition(b"PK\x05\x06")[2]
    announced = struct.unpack_from("<H", end, 6)[0] if len(end) >= 8 else -1
    found = archive.infolist()
    if len({member.filename for member in found}) < len(found):
        raise zipfile.BadZipFile("an array is in it twice")
    if announced not in (len(found), MANY):
        raise zipfile.BadZipFile(f"{announced} arrays announced, {len(found)} found")
    for member in found:
        archive.open(member).close()  # compares its two names


def _kind(array: np.ndarray) -> str:
    return f"an array of {array.dtype} of shape {array.shape}"


@dataclass(frozen=True)
class _Checks:
    """Checks of the arrays of a file; all raise DataError."""

    path: str | os.PathLike[str]

    def refuse(self, key: str, expected: str, found: str) -> DataError:
        again = "the file was not written by an FID tool, or is damaged: build it again"
        return DataError(f"{self.path}: {key}: expected {expected}, found {found}: {again}")

    def mean(self, key: str, mu: np.ndarray) -> np.ndarray:
        """(D,) float64"""
        self._numbers(key, mu)
        if not mu.size or mu.shape != (mu.size,):
            raise self.refuse(key, "a mean (D,)", f"{mu.shape}")
        return self._finite(key, mu)

    def variances(self, key: str, variances: np.ndarray, dim: int) -> np.ndarray:
        """(D,) float64, >= 0 up to rounding."""
        self._numbers(key, variances)
        if variances.shape != (dim,):
            raise self.refuse(key, f"variances ({dim},)", f"{variances.shape}")
        variances = self._finite(key, variances)
        if variances.min() < -INDEFINITE * variances.max():
            raise self.refuse(key, "variances", f"a negative one of {variances.min():.3g}")
        return np.maximum(variances, 0)

    def same(
        self, diagonal_key: str, variances: np.ndarray, sigma_key: str, sigma: np.ndarray
    ) -> None:
        """Variances must be the diagonal of sigma."""
        diagonal = np.maximum(sigma.diagonal(), 0)
        apart = float(np.abs(variances - diagonal).max())
        if apart <= INDEFINITE * max(diagonal.max(), variances.max()):
            return
        what = f"others (by {apart:.3g})"
        if np.allclose(variances**2, diagonal, rtol=1e-3, atol=0):
            what = "their square roots, standard deviations"
        raise self.refuse(diagonal_key, f"the diagonal of {sigma_key}", what)

    def fit(self, mu_key: str, mu: tuple[int, ...], sigma_key: str, sigma: tuple[int, ...]) -> None:
        """Check the shapes before large arrays are read."""
        dim = mu[0] if len(mu) == 1 else 0
        if dim and sigma == (dim,):
            raise self.refuse(
                sigma_key,
                f"a covariance ({dim}, {dim})",
                f"({dim},), which does not say whether it is variances or standard deviations "
                f"(variances are read from an array {VARIANCES!r}, for covariance=diagonal)",
            )
        if not dim or sigma != (dim, dim):
            expected = f"{mu_key} (D,) and {sigma_key} (D, D)"
            raise self.refuse(f"{mu_key}, {sigma_key}", expected, f"{mu} and {sigma}")

    def moments(
        self, mu_key: str, mu: np.ndarray, sigma_key: str, sigma: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mean (D,) and covariance (D, D) as float64."""
        for key, array in ((mu_key, mu), (sigma_key, sigma)):
            self._numbers(key, array)
        self.fit(mu_key, mu.shape, sigma_key, sigma.shape)
        mu, sigma = self._finite(mu_key, mu), self._finite(sigma_key, sigma)
        gap = np.abs(sigma - sigma.T).max()
        if gap > SYMMETRY * np.abs(sigma).max():
            found = f"one that is not symmetric (by {gap:.3g})"
            raise self.refuse(sigma_key, "a symmetric matrix", found)
        sigma = (sigma + sigma.T) / 2
        slack = INDEFINITE * np.linalg.norm(sigma)
        try:  # cheaper than eigenvalues, which only the message needs
            scipy.linalg.cholesky(sigma + (slack or 1.0) * np.eye(mu.size))
        except scipy.linalg.LinAlgError:
            lowest = scipy.linalg.eigvalsh(sigma)[0]
            found = f"a negative variance of {lowest:.3g}"
            raise self.refuse(sigma_key, "a covariance", found) from None
        return mu, sigma

    def _numbers(self, key: str, array: np.ndarray) -> None:
        if array.dtype.kind not in "fiu":
            raise self.refuse(key, "numbers", f"an array of {array.dtype}")
        if array.dtype.kind == "f" and array.dtype.itemsize < 4:
            raise self.refuse(
                key,
                "float64 or float32",
                f"{array.dtype}, whose three digits are too few for distances of covariances",
            )

    def _finite(self, key: str, array: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):  # of longer types
            array = array.astype(np.float64)
        if not np.isfinite(array).all():
            count = int((~np.isfinite(array)).sum())
            raise self.refuse(key, "finite numbers", f"{count} that are not finite")
        if (largest := np.abs(array).max(initial=0)) > LARGEST:
            raise self.refuse(key, f"numbers below {LARGEST:g}", f"{largest:.3g}")
        return array
