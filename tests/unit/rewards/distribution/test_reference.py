"""Reference files: what is read, and what is refused."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from cluster.errors import CheckpointError, DataError
from rewards.distribution.reference import Reference, read_reference, read_stored, write_reference

IMAGES = np.zeros((5, 3, 4, 3), np.uint8)
CLASSES = np.arange(5)


def statistics(dim: int = 6, seed: int = 0) -> dict[str, np.ndarray]:
    x = np.random.default_rng(seed).normal(size=(50, dim)).astype(np.float32)
    return {"mu": x.mean(0), "sigma": np.cov(x.T)}


def test_what_fid_tools_write_is_read(tmp_path: Path) -> None:
    """pytorch-fid and clean-fid: mu and sigma; ADM: samples and spatial statistics beside them."""
    file, known = tmp_path / "stats.npz", statistics()
    extra = {"mu_s": np.zeros(3), "sigma_s": np.eye(3), "arr_0": IMAGES}
    for further in ({}, extra):
        np.savez(file, **known, **further)
        stored = read_stored(file)
        np.testing.assert_array_equal(stored.reference.mu, known["mu"].astype(np.float64))
        np.testing.assert_array_equal(stored.reference.sigma, known["sigma"])
        assert stored.reference.mu.dtype == np.float64
        assert (stored.images, stored.ddof, stored.reference.fingerprint) == (-1, 1, "")
        assert read_reference(file, "any network").dim == 6


def test_single_precision_of_low_rank_is_no_error(tmp_path: Path) -> None:
    """Rounded to float32, zero eigenvalues come out a little below zero."""
    x = np.random.default_rng(0).normal(size=(20, 100))
    np.savez(tmp_path / "s.npz", mu=np.zeros(100), sigma=np.cov(x.T).astype(np.float32))
    assert read_reference(tmp_path / "s.npz").dim == 100


@pytest.mark.parametrize("images", [12, 100])
def test_both_factors_are_roots_of_sigma(images: int) -> None:
    """Of its numerical rank, also where there are fewer images than dimensions."""
    reference = Reference.from_features(np.random.default_rng(0).normal(size=(images, 20)))
    for factor in (reference.factor, reference.triangle):
        assert factor.shape == (20, min(images - 1, 20))
        np.testing.assert_allclose(factor @ factor.T, reference.sigma, atol=1e-13)
    assert not np.triu(reference.triangle, 1).any()


def test_written_and_read_again(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(50, 6))
    reference = Reference.from_features(x, "net-1")
    file = tmp_path / "new" / "ref.npz"
    write_reference(file, reference, images=50)
    stored = read_stored(file, "net-1")
    np.testing.assert_array_equal(stored.reference.mu, reference.mu)
    np.testing.assert_array_equal(stored.reference.sigma, reference.sigma)
    assert (stored.images, stored.ddof, stored.reference.fingerprint) == (50, 0, "net-1")
    assert Reference.from_npz(file).fingerprint == "net-1"
    assert os.listdir(file.parent) == ["ref.npz"]
    with pytest.raises(DataError, match=r"expected features 'net-2', .* made with 'net-1'.*again"):
        read_stored(file, "net-2")
    with pytest.raises(DataError, match=r"no joint moments .* --labels --joint classes"):
        read_stored(file, joint=True)


class Trap:
    """Unpickling it would end the test session."""

    def __reduce__(self) -> tuple:
        return os._exit, (3,)


SIGMA = statistics()["sigma"]
BROKEN = {
    r"holds samples \(arrays \['arr_0', 'arr_1'\]\).* --images .*f.npz --out": {
        "arr_0": IMAGES,
        "arr_1": CLASSES,
    },
    r"needs arrays 'mu' and 'sigma', found \['mean'\]: is this": {"mean": np.zeros(6)},
    r"mu, sigma: expected mu \(D,\) and sigma \(D, D\), found \(6, 1\) and \(6, 6\): .* again": {
        "mu": np.zeros((6, 1))
    },
    r"found \(0,\) and \(6, 6\)": {"mu": np.zeros(0)},
    r"found \(6,\) and \(6, 5\)": {"sigma": SIGMA[:, :5]},
    r"mu: expected finite numbers, found 1 that are not finite": {
        "mu": np.array([1, 2, np.nan, 4, 5, 6])
    },
    r"sigma: expected finite numbers, found 36 that are not finite": {"sigma": SIGMA * np.inf},
    r"sigma: expected a symmetric matrix, found one that is not symmetric \(by 1\)": {
        "sigma": SIGMA + np.triu(np.ones((6, 6)), 1)
    },
    r"sigma: expected a covariance, found a negative variance of -": {"sigma": -SIGMA},
    r"sigma: expected a covariance, found a negative variance of -0.5": {
        "sigma": np.diag([1, 1, 1, 1, 1, -0.5])
    },
    r"mu: expected numbers, found an array of <U1": {"mu": np.array(list("abcdef"))},
    r"mu: expected numbers, found pickled Python objects, which are not read": {
        "mu": np.array([Trap()])
    },
}


@pytest.mark.parametrize(("message", "changes"), BROKEN.items(), ids=range(len(BROKEN)))
def test_broken_files_are_named(tmp_path: Path, message: str, changes: dict) -> None:
    file = tmp_path / "f.npz"
    foreign = not {"mu", "sigma"} & changes.keys()
    np.savez(file, **(changes if foreign else statistics() | changes))
    with pytest.raises(DataError, match=message) as error:
        read_reference(file)
    assert str(error.value).startswith(str(file))


def test_other_kinds_of_files_are_named(tmp_path: Path) -> None:
    file = tmp_path / "f.npz"
    np.savez(file, **statistics())
    whole = file.read_bytes()
    cases = {
        "not a readable .npz file: it was cut off": whole[: len(whole) // 2],
        "pickled Python objects, which are not read": pickle.dumps(Trap()),
        "not an .npz file with arrays 'mu' and 'sigma'": b"mu, sigma",
    }
    for message, data in cases.items():
        file.write_bytes(data)
        with pytest.raises(DataError, match=message):
            read_reference(file)
    with file.open("wb") as stream:
        np.save(stream, IMAGES)
    with pytest.raises(DataError, match="one array; if it holds images, build the reference"):
        read_reference(file)
    damaged = bytearray(whole)
    damaged[200] ^= 1  # inside of mu
    file.write_bytes(damaged)
    with pytest.raises(DataError, match=r"not a readable .npz file \(Bad CRC.*fetch or build it"):
        read_reference(file)
    with pytest.raises(CheckpointError, match="no such file"):
        read_reference(tmp_path / "none.npz")


def test_a_short_array_in_a_whole_file_is_named(tmp_path: Path) -> None:
    array = io.BytesIO()
    np.save(array, np.zeros(100))
    with zipfile.ZipFile(tmp_path / "f.npz", "w") as file:
        file.writestr("mu.npy", array.getvalue()[:200])
        file.writestr("sigma.npy", array.getvalue())
    with pytest.raises(DataError, match=r"mu: damaged .*: fetch or build it again"):
        read_reference(tmp_path / "f.npz")
