"""Files of feature statistics, as the tools write them, and everything else that users name."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.io
import torch
from PIL import Image
from safetensors.numpy import save_file

from cluster.errors import DataError, TesseraError
from cluster.model_files.torchvision_ops import ensure_torchvision
from rewards.distribution.reference import (
    Reference,
    StoredReference,
    read_reference,
    read_stored,
    write_reference,
)
from tests.file_rows import reads
from tests.fuzzing import check_reader

FEATURES = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
MU, SIGMA = FEATURES.mean(0), np.cov(FEATURES, rowvar=False)
VARIANCES = SIGMA.diagonal().copy()


def same(stored: StoredReference, mu: np.ndarray = MU, sigma: np.ndarray = SIGMA) -> bool:
    reference = stored.reference
    assert reference.mu.dtype == reference.sigma.dtype == np.float64
    np.testing.assert_allclose(reference.mu, mu, rtol=1e-12)
    np.testing.assert_allclose(reference.sigma, sigma, rtol=1e-12, atol=1e-15)
    return True


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def pooled(images: torch.Tensor) -> torch.Tensor:
    """(N, 3, H, W) -> (N, 6), in the place of a network that would be fetched."""
    return torch.cat([images.mean((2, 3)), images.std((2, 3))], 1)


# What the tools write, with their own code.


@reads("rewards/README.md", "`.npz` of `pytorch-fid --save-stats`")
def test_pytorch_fid(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ensure_torchvision()
    from pytorch_fid import fid_score

    class Network(torch.nn.Module):
        BLOCK_INDEX_BY_DIM = {6: 0}  # noqa: RUF012

        def __init__(self, _blocks: list[int]) -> None:
            super().__init__()

        def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
            return [pooled(images)[..., None, None]]

    monkeypatch.setattr(fid_score, "InceptionV3", Network)
    out = str(tmp_path / "stats.npz")
    fid_score.save_fid_stats([str(pictures), out], 5, "cpu", 6, 0)
    mu, sigma = fid_score.compute_statistics_of_path(out, None, 5, 6, "cpu")
    assert same(read_stored(out), mu, sigma)
    assert read_stored(out).images == -1


@reads("rewards/README.md", "`.npz` of clean-fid, its own and custom ones")
def test_clean_fid(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ensure_torchvision()
    import cleanfid
    from cleanfid import fid

    monkeypatch.setattr(cleanfid, "__file__", str(tmp_path / "cleanfid" / "__init__.py"))
    monkeypatch.setattr(fid, "build_feature_extractor", lambda *_: pooled)
    device = torch.device("cpu")
    fid.make_custom_stats("Mine", str(pictures), device=device, verbose=False)
    monkeypatch.setattr("cleanfid.features.check_download_url", lambda local_folder, url: written)
    written = tmp_path / "cleanfid" / "stats" / "mine_clean_custom_na.npz"
    mu, sigma = fid.get_reference_statistics("mine", "na", split="custom")
    assert same(read_stored(written), mu, sigma)
    kernel = written.with_name("mine_clean_custom_na_kid.npz")
    with pytest.raises(DataError, match=r"features of 12 images in 6 dimensions .*_kid files"):
        read_stored(kernel)


@reads("rewards/README.md", "`...-stat-fid-2048.pt` of torch-fidelity")
def test_torch_fidelity(tmp_path: Path) -> None:
    ensure_torchvision()
    from torch_fidelity.metric_fid import fid_featuresdict_to_statistics_cached
    from torch_fidelity.utils import cache_lookup_one_recompute_on_miss

    class Extractor:
        def get_name(self) -> str:
            return "inception-v3-compat"

    options: dict[str, Any] = {"cache": True, "cache_root": str(tmp_path), "verbose": False}
    features = {"2048": torch.from_numpy(FEATURES)}
    statistics = fid_featuresdict_to_statistics_cached(
        features, "photos", Extractor(), "2048", **options
    )
    (written,) = tmp_path.glob("*.pt")
    assert same(read_stored(written), statistics["mu"], statistics["sigma"])
    upper = written.rename(tmp_path / "STATS.PT")
    assert same(read_stored(upper))
    cache_lookup_one_recompute_on_miss("features", lambda: features["2048"], **options)
    with pytest.raises(DataError, match=r"features of 50 images in 6 .*numpy.cov\(features"):
        read_stored(tmp_path / "features.pt")


@reads("rewards/README.md", "ADM's `VIRTUAL_*.npz`")
def test_adm(tmp_path: Path) -> None:
    """The batch of images beside their statistics, and the spatial ones."""
    images = np.zeros((3, 4, 4, 3), np.uint8)
    spatial = {"mu_s": np.zeros(9), "sigma_s": np.eye(9)}
    np.savez(tmp_path / "v.npz", arr_0=images, mu=MU, sigma=SIGMA, **spatial)
    assert same(read_stored(tmp_path / "v.npz"))


@reads("rewards/README.md", "TTUR's `fid_stats_*.npz` and EDM's `fid-refs/*.npz`")
@pytest.mark.parametrize("name", ["stats.npz", "UPPER.NPZ", "stats.Npz", "stats", "stats.pt"])
def test_plain_arrays_by_any_name(tmp_path: Path, name: str) -> None:
    with (tmp_path / name).open("wb") as file:
        np.savez(file, mu=MU.astype(np.float64), sigma=SIGMA)
    assert same(read_stored(tmp_path / name), MU.astype(np.float64))


def public_file(path: Path, *, full: bool = True, **changes: Any) -> Path:
    """As compute_inception_stats.py and make_gen_stats.py of the public code write it."""
    arrays: dict[str, Any] = {
        "mu": MU.astype(np.float64),
        "sigma": SIGMA,
        "sigma_diagonal": VARIANCES,
        "count": np.array([50], np.int64),
        "dims": np.array([6], np.int64),
        "meta": {"model": "torchvision.inception_v3", "resize": 299, "normalize": None},
    } | changes
    if not full:
        del arrays["sigma"], arrays["meta"]
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


@reads("rewards/README.md", "the public code's `imagenet_train_incv3_299_original.npz`")
def test_the_public_codes_reference(tmp_path: Path) -> None:
    path = public_file(tmp_path / "imagenet_train_incv3_299_original.npz")
    for covariance in ("full", "diagonal"):
        stored = read_stored(path, "torchvision-inception-0", covariance=covariance)  # type: ignore[arg-type]
        assert same(stored, MU.astype(np.float64))
        assert (stored.images, stored.ddof, stored.reference.diagonal) == (50, 1, False)


class Trap:
    """Unpickling it would end the test session."""

    def __reduce__(self) -> tuple:
        return os._exit, (3,)


def test_its_meta_is_never_unpickled(tmp_path: Path) -> None:
    path = public_file(tmp_path / "r.npz", meta=np.array(Trap(), dtype=object))
    assert same(read_stored(path), MU.astype(np.float64))


@reads(
    "rewards/README.md",
    "the public code's `pretrained_gen_stats.npz`, also with `--stats diagonal`",
)
def test_variances_alone_serve_the_diagonal_form(tmp_path: Path) -> None:
    path = public_file(tmp_path / "pretrained_gen_stats.npz", full=False)
    stored = read_stored(path, covariance="diagonal")
    assert same(stored, MU.astype(np.float64), np.diag(VARIANCES))
    assert stored.images == 50
    assert stored.reference.diagonal
    message = r"sigma: expected a covariance .* variances alone .*covariance to diagonal \(.*\), or"
    for read in (read_reference, Reference.from_npz, read_stored):
        with pytest.raises(DataError, match=message):
            read(path)
    with pytest.raises(DataError, match="holds variances alone"):
        _ = stored.reference.factor
    moments = stored.moments()
    np.testing.assert_allclose(moments.cov, np.diag(FEATURES.astype(np.float64).var(0)))
    assert (moments.weight, moments.square_weight) == (50.0, 50.0)


@reads("rewards/README.md", "`.npz` of `python -m rewards.reference`")
def test_our_own(tmp_path: Path) -> None:
    reference = Reference.from_features(FEATURES, "net-1")
    write_reference(tmp_path / "r.npz", reference, images=50)
    stored = read_stored(tmp_path / "r.npz", "net-1")
    np.testing.assert_array_equal(stored.reference.sigma, reference.sigma)
    moments = stored.moments()
    np.testing.assert_array_equal(moments.cov, reference.sigma)  # divided by N, as moments are
    assert (stored.images, stored.ddof, moments.weight) == (50, 0, 50.0)


# Other forms of the same arrays.

FORMS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "float32": lambda: (MU, SIGMA.astype(np.float32)),
    "big-endian": lambda: (MU.astype(">f4"), SIGMA.astype(">f8")),
    "Fortran order": lambda: (MU, np.asfortranarray(SIGMA)),
    "integers": lambda: (np.arange(6), np.eye(6, dtype=np.int64)),
    "long double": lambda: (MU.astype(np.longdouble), SIGMA.astype(np.longdouble)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_forms_of_numbers(tmp_path: Path, form: str, protocol: int) -> None:
    mu, sigma = FORMS[form]()
    np.savez(tmp_path / "f.npz", mu=mu, sigma=sigma)
    assert same(read_stored(tmp_path / "f.npz"), mu.astype(float), sigma.astype(float))
    if protocol:
        torch.save({"mu": mu, "sigma": sigma}, tmp_path / "f.pt", pickle_protocol=protocol)
        assert same(read_stored(tmp_path / "f.pt"), mu.astype(float), sigma.astype(float))


@pytest.mark.parametrize("archive", [True, False])
def test_tensors_and_numbers_in_a_file_of_torch(tmp_path: Path, archive: bool) -> None:
    content = {"mu": torch.from_numpy(MU), "sigma": torch.from_numpy(SIGMA).T, "count": 50}
    content |= {"model": Trap(), 3: "a key that is no text"}
    torch.save(content, tmp_path / "f.pt", _use_new_zipfile_serialization=archive)
    stored = read_stored(tmp_path / "f.pt")
    assert same(stored)
    assert stored.images == 50


# Arrays that cannot be what they are called.

WRONG = {
    r"sigma: expected float64 or float32, found float16, whose three digits": {
        "sigma": SIGMA.astype(np.float16)
    },
    r"mu: expected float64 or float32, found float16": {"mu": MU.astype(np.float16)},
    r"sigma: expected numbers, found an array of complex128": {"sigma": SIGMA.astype(complex)},
    r"sigma: expected a covariance \(6, 6\), found \(6,\), which does not say whether it is var": {
        "sigma": VARIANCES
    },
    r"mu, sigma: expected mu \(D,\) and sigma \(D, D\), found \(1, 6\)": {"mu": MU[None]},
    r"found \(\) and \(6, 6\)": {"mu": np.float64(3)},
    r"found \(6,\) and \(36,\)": {"sigma": SIGMA.ravel()},
    r"sigma: expected finite numbers, found 1 ": {
        "sigma": np.where(np.eye(6) * SIGMA == SIGMA[2, 2], np.nan, SIGMA)
    },
    r"sigma_diagonal: expected the diagonal of sigma, found others \(by 1\)": {
        "sigma_diagonal": VARIANCES + 1
    },
    r"sigma_diagonal: .* found their square roots, standard deviations": {
        "sigma_diagonal": np.sqrt(VARIANCES)
    },
    r"sigma_diagonal: expected variances \(6,\), found \(5,\)": {"sigma_diagonal": VARIANCES[:5]},
    r"dims: expected 6, as mu has, found 2048": {"dims": np.array([2048])},
    r"count: expected a number, found an array of int64 of shape \(2,\)": {
        "count": np.array([50, 50])
    },
    r"count: expected a number, found an array of <U2 of shape \(\)": {"count": np.array("50")},
    r"count: expected a whole number >= 0, found -50": {"count": np.array(-50)},
    r"count: expected a number, found": {"count": np.array(np.nan)},
    r"fingerprint: expected a text, found an array of int64": {"fingerprint": np.array(1)},
    r"class_counts: found an array of float64 of shape \(3,\)": {"class_counts": np.zeros(3)},
}


@pytest.mark.parametrize(("message", "changes"), WRONG.items(), ids=range(len(WRONG)))
def test_impossible_arrays_are_named(tmp_path: Path, message: str, changes: dict) -> None:
    np.savez(tmp_path / "f.npz", **({"mu": MU, "sigma": SIGMA} | changes))
    with pytest.raises(DataError, match=message) as error:
        read_stored(tmp_path / "f.npz")
    assert str(error.value).startswith(str(tmp_path / "f.npz"))
    if "count" not in changes:
        torch.save({"mu": MU, "sigma": SIGMA} | changes, tmp_path / "f.pt")
        with pytest.raises(DataError, match=message):
            read_stored(tmp_path / "f.pt")


def test_negative_variances_are_refused(tmp_path: Path) -> None:
    changed = VARIANCES.copy()
    changed[2] = -0.5
    path = public_file(tmp_path / "f.npz", full=False, sigma_diagonal=changed)
    with pytest.raises(DataError, match=r"sigma_diagonal: expected variances, found a negative"):
        read_stored(path, covariance="diagonal")


@pytest.mark.parametrize("count", [None, 0, 1])
def test_a_history_needs_to_know_of_how_many_images_it_is(tmp_path: Path, count: int) -> None:
    path = public_file(tmp_path / "f.npz", count=count)
    with pytest.raises(DataError, match=r"count: expected the number of images.*count=N"):
        read_stored(path).moments()


# Files of other kinds.


def saved_array(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, array)


def scripted(path: Path) -> None:
    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    torch.jit.save(torch.jit.script(Module()), path)


IMAGES = np.zeros((5, 4, 4, 3), np.uint8)
OTHERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "an EDM pickle": (
        r"pickled Python objects, which are not read.*fid-refs/\*\.npz.* --images IMAGES",
        lambda p: p.write_bytes(pickle.dumps({"fid": {"mu": MU, "sigma": SIGMA}})),
    ),
    "a pickle of protocol 0": (
        "pickled Python objects, which are not read",
        lambda p: p.with_suffix(".pkl").write_bytes(pickle.dumps({"mu": MU}, protocol=0)),
    ),
    "images": (r"holds samples .* --images .*/f", lambda p: _savez(p, arr_0=IMAGES)),
    "images alone": (r"if it holds images, build the ref", lambda p: saved_array(p, IMAGES)),
    "features": (
        r"features of 50 images in 6 .*numpy\.load\('.*'\)\['feats'\]; numpy\.savez\(.*numpy\.cov",
        lambda p: _savez(p, feats=FEATURES),
    ),
    "features in Fortran order": (
        r"features of 50 images in 6",
        lambda p: saved_array(p, np.asfortranarray(FEATURES)),
    ),
    "features with labels": (
        r"features of 50 images in 6",
        lambda p: _savez(p, reps=FEATURES, labels=np.zeros(50)),
    ),
    "a covariance alone": (r"if it is a covariance, write it", lambda p: saved_array(p, SIGMA)),
    "a mean alone": (r"if it is a mean, write it together", lambda p: saved_array(p, MU)),
    "weights": (
        r"needs arrays 'mu' and 'sigma', found \['a', 'b'\]",
        lambda p: torch.save({"a": torch.zeros(3, 4), "b": torch.zeros(4, 5)}, p),
    ),
    "a list of torch": (r"list of torch.save, without mu", lambda p: torch.save([1, 2], p)),
    "a module of torch": (r"of torch.save, without mu", lambda p: torch.save(Trap(), p)),
    "no array in torch": (
        r"mu: expected an array of numbers, found posix\._exit",
        lambda p: torch.save({"mu": Trap(), "sigma": SIGMA}, p),
    ),
    "text in torch": (
        r"mu: damaged \(an array of <U1, not of numbers\)|mu: expected numbers, found an array of",
        lambda p: torch.save({"mu": np.array(["a"]), "sigma": SIGMA}, p),
    ),
    "a script": (r"TorchScript archive: a network, not stat", scripted),
    "safetensors": (
        r"a safetensors file; if it holds mu and sigma, write them as \.npz: python -c",
        lambda p: save_file({"mu": MU, "sigma": SIGMA}, p),
    ),
    "JSON": (r"a text file; statistics are written by", lambda p: p.write_text(json.dumps({}))),
    "MATLAB": (r"a MATLAB file; .*scipy\.io\.loadmat", lambda p: _mat(p)),
    "a web page": (
        r"a web page; the download went to a page about the file",
        lambda p: p.write_text("<!DOCTYPE html><html>404</html>"),
    ),
    "a pointer": (
        r"a Git LFS pointer; run `git lfs pull`",
        lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
    ),
    "an empty file": (r"an empty file; fetch it again", lambda p: p.write_bytes(b"")),
    "Parquet": (
        r"a Parquet file; build the reference of images: .* --images",
        lambda p: pq.write_table(pa.table({"a": [1]}), p),
    ),
    "an image": (
        r"an image; build the reference of images",
        lambda p: Image.fromarray(IMAGES[0]).save(p, "PNG"),
    ),
    "a gzip file": (r"a gzip file; unpack it first", lambda p: p.write_bytes(b"\x1f\x8b\x08")),
    "a zip of files": (r"a zip archive; unpack it first", lambda p: _zipped(p)),
    "bytes": (r"begins with b'\\x00\\x01", lambda p: p.write_bytes(bytes(range(64)))),
    "a folder": (r"found a folder: if it holds images, build.* --images", lambda p: p.mkdir()),
}


def _savez(path: Path, **arrays: np.ndarray) -> None:
    with path.open("wb") as file:
        np.savez(file, **arrays)


def _mat(path: Path) -> None:
    with path.open("wb") as file:
        scipy.io.savemat(file, {"mu": MU, "sigma": SIGMA})


def _zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("stats.npz", b"")


@pytest.mark.parametrize(("message", "make"), OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("name", ["f.npz", "f.PT", "f"])
def test_other_kinds_are_refused_with_what_to_do(
    tmp_path: Path, name: str, message: str, make: Callable[[Path], object]
) -> None:
    make(tmp_path / name)
    (path,) = tmp_path.iterdir()
    with pytest.raises(DataError, match=message) as error:
        read_stored(path)
    assert str(error.value).startswith(str(path))
    for unsafe in ("allow_pickle=True", "weights_only=False", "pickle.load"):
        assert unsafe not in str(error.value)


def test_an_archive_with_more_in_it_is_read_and_a_doubled_array_is_not(tmp_path: Path) -> None:
    np.savez(tmp_path / "f.npz", mu=MU, sigma=SIGMA)
    with zipfile.ZipFile(tmp_path / "f.npz", "a") as archive:
        archive.writestr("README.txt", "how they were made")
        mean = archive.read("mu.npy")
    assert same(read_stored(tmp_path / "f.npz"))
    with (
        zipfile.ZipFile(tmp_path / "f.npz", "a") as archive,
        pytest.warns(UserWarning, match="Duplicate name"),
    ):
        archive.writestr("mu.npy", mean)
    with pytest.raises(DataError, match="an array is in it twice"):
        read_stored(tmp_path / "f.npz")


def test_terabytes_that_are_announced_are_not_asked_for(tmp_path: Path) -> None:
    head = io.BytesIO()
    shape = {"descr": "<f8", "fortran_order": False, "shape": (10**5, 10**5)}
    np.lib.format.write_array_header_1_0(head, shape)
    with zipfile.ZipFile(tmp_path / "f.npz", "w") as archive:
        archive.writestr("sigma.npy", head.getvalue() + bytes(64))
        mean = io.BytesIO()
        np.save(mean, MU)
        archive.writestr("mu.npy", mean.getvalue())
    with pytest.raises(DataError, match=r"found \(6,\) and \(100000, 100000\)"):
        read_stored(tmp_path / "f.npz")


# Damage.


@pytest.mark.parametrize(
    "make",
    [
        lambda p: np.savez(p, mu=MU, sigma=SIGMA),
        lambda p: np.savez_compressed(p, mu=MU, sigma=SIGMA),
        public_file,
        lambda p: public_file(p, full=False),
        lambda p: torch.save({"mu": MU, "sigma": SIGMA}, p),
        lambda p: torch.save({"mu": torch.from_numpy(MU), "sigma": torch.from_numpy(SIGMA)}, p),
    ],
    ids=["npz", "packed npz", "public", "variances", "pt", "pt of tensors"],
)
def test_damaged_files(tmp_path: Path, make: Callable[[Path], object]) -> None:
    """Every array has a checksum: what is read is what was written."""
    path = tmp_path / "f.npz"
    make(path)
    whole = read_stored(path, covariance="diagonal")

    def good(found: object) -> bool:
        assert isinstance(found, StoredReference)
        return same(found, whole.reference.mu, whole.reference.sigma)

    check_reader(path, lambda p: read_stored(p, covariance="diagonal"), 500, good=good)


@pytest.mark.parametrize("protocol", [2, 5])
def test_damaged_files_of_old_torch(tmp_path: Path, protocol: int) -> None:
    """Without a checksum, what is read is at least well-formed."""
    path = tmp_path / "f.pt"
    content = {"mu": MU, "sigma": SIGMA, "count": 50}
    torch.save(content, path, _use_new_zipfile_serialization=False, pickle_protocol=protocol)

    def good(found: object) -> bool:
        assert isinstance(found, StoredReference)
        reference = found.reference
        shapes = reference.mu.shape == (reference.dim,), reference.sigma.shape
        return shapes == (True, (reference.dim, reference.dim)) and bool(
            np.isfinite(reference.mu).all() and np.isfinite(reference.sigma).all()
        )

    check_reader(path, read_stored, 500, good=good, errors=(TesseraError,))
