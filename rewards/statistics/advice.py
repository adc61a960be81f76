"""Error messages for files without statistics: their kind, and what to do (never to unpickle)."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from cluster.model_files.file_kinds import FileKind, described, presumed_kind
from cluster.program.invocation import command_of
from rewards.images.sources import read_header

MU = "mu"
NUMPY, TORCH = "numpy.load", "torch.load"  # each without pickled objects
SAVE = "numpy.savez('statistics.npz', mu=mu, sigma=sigma)"
FROM_FEATURES = (
    "numpy.savez('statistics.npz', mu=features.mean(0), sigma=numpy.cov(features, rowvar=False), "
    "count=len(features))"
)
EXPECTED = "not an .npz file with arrays 'mu' and 'sigma' (or torch-fidelity's .pt), but"


def build_command(images: object, features: str = "") -> str:
    """The command that builds a reference from images.

    Args:
        features: options that choose the feature network, where it is known.
    """
    options = f" {features}" if features else ""
    return f"{command_of('rewards.reference')} --images {images}{options} --out reference.npz"


def other_kind(place: Path, path: str | os.PathLike[str], kind: FileKind) -> str:
    """Message for a file of another kind."""
    if kind is FileKind.NPY:
        return f"{EXPECTED} {_one_array(place, path)}"
    if kind is FileKind.CUT_ZIP:
        return "not a readable .npz file: it was cut off; fetch or build it again"
    if presumed_kind(place) is FileKind.PICKLE:
        return (
            f"{EXPECTED} pickled Python objects, which are not read: they can run any program. EDM "
            "publishes the same statistics as .npz files (fid-refs/*.npz); otherwise build them "
            f"again from the images: {build_command('IMAGES')}"
        )
    if kind is FileKind.SAFETENSORS:
        return (
            f"{EXPECTED} a safetensors file; if it holds mu and sigma, write them as .npz: python "
            "-c \"import numpy, safetensors.numpy as s; numpy.savez('statistics.npz', "
            f"**s.load_file('{path}'))\""
        )
    if kind in (FileKind.PARQUET, FileKind.IMAGE):
        what = path if kind is FileKind.PARQUET else place.parent
        return f"{EXPECTED} {kind.value}; build the reference of images: {build_command(what)}"
    if kind is FileKind.TORCHSCRIPT:
        return f"{EXPECTED} {kind.value}: a network, not statistics of its features"
    with place.open("rb") as file:
        if file.read(6) == b"MATLAB" or (kind is FileKind.HDF5 and place.suffix.lower() == ".mat"):
            return (
                f"{EXPECTED} a MATLAB file; write its arrays as .npz, with scipy.io.loadmat (h5py "
                f"from version 7.3 on) and {SAVE}"
            )
    if kind in (FileKind.TEXT, FileKind.HDF5, FileKind.GGUF, FileKind.PDF):
        return f"{EXPECTED} {described(place)}; statistics are written by {SAVE}"
    return f"{EXPECTED} {described(place)}"


def _one_array(place: Path, path: str | os.PathLike[str]) -> str:
    """Message for an .npy file."""
    with place.open("rb") as file:
        shape, dtype = read_header(file, fortran=True)
    if len(shape) == 4:
        return f"one array; if it holds images, build the reference: {build_command(path)}"
    if len(shape) == 2 and shape[0] != shape[1]:
        return f"{like_features(shape)}: features = numpy.load({str(path)!r}); {FROM_FEATURES}"
    what = f"one array, {dtype} of shape {shape}"
    if len(shape) in (1, 2):
        part = "a mean" if len(shape) == 1 else "a covariance"
        return f"{what}; if it is {part}, write it together with the other one: {SAVE}"
    return f"{what}, which is neither images (N, H, W, 3) nor features (N, D)"


def no_moments(
    path: str | os.PathLike[str],
    found: Sequence[str],
    shape_of: Callable[[str], tuple[int, ...]],
    loader: str,
) -> str:
    """Message for a file of arrays without moments, by their names and shapes.

    Args:
        loader: function that reads the file.
    """
    if loader == NUMPY and any(len(shape_of(key)) == 4 for key in found):
        return (
            f"holds samples (arrays {found}), not the reference moments 'mu' and 'sigma': build "
            f"them with {build_command(path)}"
        )
    shapes = {key: shape for key in found if len(shape := shape_of(key)) > 1}
    if len(shapes) == 1 and MU not in found:
        ((key, shape),) = shapes.items()
        if len(shape) == 2 and shape[0] != shape[1] and min(shape) > 1:
            loaded = f"features = {loader}({str(path)!r})[{key!r}]"
            return f"holds {like_features(shape)} ({key!r}): {loaded}; {FROM_FEATURES}"
    return f"needs arrays 'mu' and 'sigma', found {found}: is this a file of FID statistics?"


def like_features(shape: tuple[int, ...]) -> str:
    return (
        f"what looks like features of {shape[0]} images in {shape[1]} dimensions (clean-fid's _kid "
        "files and torch-fidelity's caches hold such), not their mean and covariance"
    )
