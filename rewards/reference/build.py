"""Builds a reference: real images to features to moments, batch by batch.

Worker processes decode images; this process runs the network and adds up features in the order of
the images. The result is the same for any number of workers, also after a stop and a resume.
"""

from __future__ import annotations

import hashlib
import math
import os
import signal
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from torch.utils.data import DataLoader, Dataset

from cluster.errors import ConfigError, DataError, TesseraError
from cluster.io.checksum import DAMAGED_ARRAYS
from cluster.io.locks import locked_file
from cluster.io.paths import expand_user, output_path
from cluster.io.strict_json import dumps
from cluster.program.console import FAILED, INTERRUPTED, REFUSED, progress_bar
from cluster.program.help import answer_help
from cluster.program.invocation import command_of
from cluster.program.signals import STOPPING, interrupt, signal_handler
from cluster.program.streams import escaped
from rewards.base import FeatureExtractor
from rewards.distribution.joint import class_table
from rewards.images.class_labels import described, read_class_names
from rewards.images.decoding import ImageSource, Loaded
from rewards.images.sources import open_source
from rewards.networks.features import FeaturesConfig, load_features
from rewards.reference.captions import embed_captions
from rewards.reference.features import extract
from rewards.reference.sums import BLOCK, Conditions, Part, ReferenceSums

OF_LABELS = ("class_names", "label_column", "num_classes")
AHEAD = 3  # batches that each worker prepares
ABOUT = (
    "Mean and covariance of real images' features, for FID and the distribution reward. After a "
    "stop, the same command resumes. `fetch imagenet256` instead of options downloads ADM's "
    "published moments."
)
COMMON = {
    "from what, to where": ("--images", "--out", "--overwrite"),
    "features": ("--features.network", "--features.checkpoint", "--features.model"),
    "conditions": ("--labels", "--class-names", "--joint", "--joint-dim", "--captions"),
    "how": ("--device", "--workers", "--batch", "--skip-unreadable"),
}
"""What --help shows; --help-all shows every option."""


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """Mean and covariance of real images' features, for FID and the distribution reward."""

    images: Annotated[str, tyro.conf.arg(metavar="SOURCE")]
    """A folder of images (at any depth), a Parquet file or a folder of them (a column of encoded
    images), or an .npz or .npy file of uint8 samples (N, H, W, 3)."""
    out: Path
    """The .npz file to write."""
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    image_column: str = ""
    """Parquet column of the images; empty: the only one that holds encoded images."""
    labels: bool = False
    """Count the images of each class: folders directly below the source, a Parquet column, or
    arr_1 of an .npz file."""
    label_column: str = ""
    """Parquet column of the classes, integers or names; empty: "label"."""
    class_names: str = ""
    """A text file with the names of all classes, one a line, in the order of their numbers. Empty:
    decimal names are class numbers, other names are numbered in alphabetical order."""
    num_classes: int = 0
    """Number of classes; 0: as many as the source has."""
    joint: Literal["none", "classes", "captions", "embeddings"] = "none"
    """Also store moments of features joined with their conditions, for the conditional FID: with
    classes (implies --labels), with --captions, or with the rows of --embeddings."""
    joint_dim: int = 0
    """Dimensions of the embedding. Classes: 0 is one-hot; fewer for hundreds of classes. Captions:
    0 holds .99 of the variance, at most 64."""
    joint_weight: float = 0.0
    """Factor of the embeddings; 0: their total variance equals the features'."""
    joint_seed: int = 0
    """Seed of the classes' random projection."""
    captions: Path | None = None
    """The images' captions with text features, in the order of the source: a Parquet file from
    `python -m actors.captions`, with the encoder of the policy."""
    embeddings: Path | None = None
    """An .npy file (N, E) with the embedding of every image's condition, such as CLIP's of its
    caption, in the order of the source."""
    batch: int = 64
    """Images at a time."""
    workers: int = 0
    """Processes that decode images; 0: the main process does."""
    num_threads: int = 0
    """Threads of the feature network; 0: all cores."""
    device: str = "cpu"
    """Where the feature network runs."""
    skip_unreadable: bool = False
    """Leave out images that cannot be read and report their number; else they are an error."""
    save_every: float = 60.0
    """Seconds between saves of the sums."""
    overwrite: bool = False
    """Replace an existing --out."""

    def check(self) -> None:
        """
        Raises:
            ConfigError: options out of range, or that exclude each other.
        """
        if self.out.suffix.lower() != ".npz":
            raise ConfigError(f"--out must be an .npz file, found {self.out}")
        if self.out.exists() and not self.overwrite:
            raise ConfigError(f"{self.out} is there already: --overwrite replaces it")
        for name, least in (("batch", 1), ("workers", 0), ("num_threads", 0), ("num_classes", 0)):
            if getattr(self, name) < least:
                flag = name.replace("_", "-")
                raise ConfigError(f"--{flag} must be >= {least}, found {getattr(self, name)}")
        if not 0 <= self.joint_weight < math.inf:
            raise ConfigError(f"--joint-weight must be >= 0, found {self.joint_weight}")
        for name in ("embeddings", "captions"):
            if (self.joint == name) != (getattr(self, name) is not None):
                raise ConfigError(f"--joint {name} and --{name} FILE go together")
        joint = self.joint == "classes"
        for needed, there, names in (
            ("--labels or --joint classes", self.labels or joint, OF_LABELS),
            ("--joint classes", joint, ("joint_seed",)),
            ("--joint classes or captions", joint or self.captions, ("joint_dim",)),
            ("--joint", self.joint != "none", ("joint_weight",)),
        ):
            for name in names:
                if getattr(self, name) and not there:
                    raise ConfigError(f"--{name.replace('_', '-')} needs {needed}")


def read_conditions(config: ReferenceConfig, source: ImageSource) -> Conditions:
    """Classes and embeddings as the options ask for them.

    Raises:
        DataError: the source has no classes, or embeddings or captions do not fit it.
        ConfigError: too few classes or too many dimensions.
    """
    classes, table, rows, names, projection = None, None, None, tuple[str, ...](), None
    num_classes = config.num_classes
    if config.labels or config.joint == "classes":
        given = read_class_names(expand_user(config.class_names)) if config.class_names else ()
        labels = source.classes(given)
        classes, names = labels.indices, labels.names
        if num_classes and labels.count > num_classes:
            last = labels.count - 1
            what = f"class {last} {names[last]!r}" if names else f"class {last}"
            raise DataError(f"--num-classes {num_classes}, but {what} is there (from 0)")
        num_classes = num_classes or labels.count
        if names and len(names) < num_classes:
            names += ("",) * (num_classes - len(names))
    if config.joint == "classes":
        try:
            table = class_table(num_classes, config.joint_dim, config.joint_seed)
        except ValueError as error:
            raise ConfigError(f"--joint classes: {error}") from None
    if config.embeddings is not None:
        rows = _read_rows(config.embeddings, len(source))
    if config.captions is not None:
        projection, rows = embed_captions(config.captions, source, config.joint_dim)
    return Conditions(classes, num_classes, table, rows, names, projection)


def _read_rows(path: Path, count: int) -> np.ndarray:
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except DAMAGED_ARRAYS as error:
        raise DataError(f"{path}: not a readable .npy file ({error})") from error
    if not isinstance(rows, np.ndarray) or rows.ndim != 2 or len(rows) != count:
        found = f"shape {rows.shape}" if isinstance(rows, np.ndarray) else "an .npz file"
        raise DataError(
            f"{path}: expected an .npy array ({count}, E), a row an image, found {found}"
        )
    if rows.dtype.kind not in "fiu":
        raise DataError(f"{path}: expected an array of numbers, found {rows.dtype}")
    for start in range(0, count, BLOCK):
        if not np.isfinite(rows[start : start + BLOCK]).all():
            raise DataError(
                f"{path}: an embedding of images {start} to {min(start + BLOCK, count) - 1} is not "
                "finite: leave its image out, or fill it in"
            )
    return rows


class _Batches(Dataset[list[Loaded] | TesseraError]):
    """Decoded images in batches, for a DataLoader; errors are returned, which keeps their text."""

    def __init__(self, source: ImageSource, first: int, size: int) -> None:
        self._source, self.starts, self._size = source, range(first, len(source), size), size

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> list[Loaded] | TesseraError:
        start = self.starts[index]
        try:
            return list(self._source.read(start, min(start + self._size, len(self._source))))
        except TesseraError as error:
            return error


def _start_worker(number: int) -> None:
    for stopping in STOPPING:  # sent to the whole process group; the parent ends its workers
        signal.signal(stopping, signal.SIG_IGN)


def parts(
    config: ReferenceConfig, source: ImageSource, extractor: FeatureExtractor, first: int
) -> Generator[Part, None, None]:
    """Features of all batches from image `first` on, in order.

    Raises:
        DataError: an image's features; or a worker process was lost.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(config.num_threads or cores or 1)
    batches = _Batches(source, first, config.batch)
    loader = DataLoader(
        batches,
        batch_size=None,
        num_workers=config.workers,
        collate_fn=_unchanged,
        multiprocessing_context="spawn" if config.workers else None,  # forks inherit threads
        worker_init_fn=_start_worker,
        prefetch_factor=AHEAD if config.workers else None,
    )
    for start, loaded in zip(batches.starts, loader):
        if isinstance(loaded, TesseraError):
            raise loaded
        yield extract(loaded, extractor, start)


def _unchanged(batch: Any) -> Any:
    return batch


@contextmanager
def _lost_workers() -> Iterator[None]:
    """
    Raises:
        DataError: a process of the DataLoader died in the block.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):  # how torch begins its report of a loss
            raise
        raise DataError(
            "a process was lost, most likely for want of memory: the same command resumes; try "
            "fewer --workers or a smaller --batch"
        ) from error


@dataclass(frozen=True)
class Plan:
    """The loaded and checked inputs of a build."""

    config: ReferenceConfig
    source: ImageSource
    extractor: FeatureExtractor
    conditions: Conditions

    @property
    def partial(self) -> Path:
        """Saved sums of an unfinished build."""
        return self.config.out.with_name(f".{self.config.out.name}.partial.npz")

    @property
    def key(self) -> str:
        """Digest of everything that the sums depend on."""
        known = [self.source.fingerprint, self.extractor.fingerprint, self.conditions.fingerprint]
        return hashlib.sha256(dumps(known).encode()).hexdigest()


def prepare(config: ReferenceConfig) -> Plan:
    """Load the inputs and check the options against the images.

    Raises:
        TesseraError: they do not fit.
    """
    config.check()
    source = open_source(config.images, config.image_column, config.label_column)
    conditions = read_conditions(config, source)
    return Plan(config, source, load_features(config.features, config.device), conditions)


def build(plan: Plan) -> ReferenceSums:
    """Add up the features of all images, resuming an unfinished build, and write the reference.

    Raises:
        DataError: names an image that cannot be read or used; the sums are saved.
    """
    config, sums = plan.config, ReferenceSums(plan.key, plan.conditions)
    unfit = sums.load(plan.partial, allow_skipped=config.skip_unreadable)
    if unfit:
        print(f"not resuming from {plan.partial}: {unfit}", file=sys.stderr)
    elif sums.cursor:
        print(f"resuming at image {sums.cursor} ({plan.partial})", file=sys.stderr)
    total, saved = len(plan.source), time.monotonic()
    batches = parts(config, plan.source, plan.extractor, sums.cursor)
    progress = progress_bar("reference", total, "images", sums.cursor)
    try:
        with _lost_workers(), closing(batches), progress as advance:
            for part in batches:
                if part.unreadable and not config.skip_unreadable:
                    name, error = part.unreadable[0]
                    raise DataError(
                        f"{name}: cannot be read ({error}): replace it, or leave out what cannot "
                        "be read with --skip-unreadable"
                    )
                sums.add(part)
                advance(part.stop - part.start)
                if time.monotonic() - saved >= config.save_every:
                    sums.save(plan.partial)
                    saved = time.monotonic()
    except BaseException:  # also Ctrl-C
        sums.save(plan.partial)
        raise
    weight = config.joint_weight
    sums.write(config.out, plan.extractor.fingerprint, plan.source.fingerprint, weight)
    plan.partial.unlink(missing_ok=True)
    return sums


def describe(plan: Plan, sums: ReferenceSums) -> list[str]:
    """Lines of the summary at the end."""
    lines = [*sums.notes]
    lines += [
        f"{sums.images} images, {sums.dim} dimensions, features "
        f"{plan.extractor.fingerprint}: {escaped(plan.config.out)}"
    ]
    if sums.skipped:
        names = ", ".join(sums.skipped_first)
        more = ", ..." if sums.skipped > len(sums.skipped_first) else ""
        lines.append(f"left out {sums.skipped} images that could not be read: {names}{more}")
    if sums.images <= sums.dim:
        lines.append(
            f"note: {sums.images} images give no full covariance in {sums.dim} dimensions; every "
            "FID against them is too high. More images help, or features of fewer dimensions"
        )
    return lines


def announce(plan: Plan) -> list[str]:
    """Lines printed before the computation: images and classes."""
    lines = list(plan.source.remarks)
    conditions = plan.conditions
    if conditions.classes is not None:
        lines.append(described(conditions.classes, conditions.num_classes, conditions.class_names))
    return lines


def run(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    example = ReferenceConfig(images="", out=Path())
    prog = command_of("rewards.reference")
    arguments = answer_help(arguments, prog, ABOUT, COMMON, example)
    config = tyro.cli(ReferenceConfig, args=arguments, prog=prog)
    status = REFUSED  # until everything is loaded and checked
    try:
        config = replace(config, out=output_path(config.out, "--out"))
        config.check()
        with signal_handler(interrupt), locked_file(config.out, f"--out {config.out}"):
            plan = prepare(config)
            for line in announce(plan):
                print(line)
            status = FAILED
            sums = build(plan)
    except (TesseraError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return status
    except KeyboardInterrupt:
        print("stopped; the same command resumes", file=sys.stderr)
        return INTERRUPTED
    print("\n".join(describe(plan, sums)))
    return 0
