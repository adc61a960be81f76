"""Kept samples: features, scores and tokens of a row's images, in parts on disk.

    DIR/samples/ROW/manifest.json        what they are of (`learner.evaluation.kept.identity`)
    DIR/samples/ROW/part_000000.npz      the first images, about 1,000; then the next ones

A part appears when it is complete, so that a command that was killed continues with the next one.
Its arrays, of n images: `features/SPACE` (n, D) float32, `scores/SCORER` (n,) float32, and where
the images were sampled `tokens` (n, T) int32, `entropies` (n,) float64 (mean over tokens, nats);
they have classes, `classes` (n,) int64. Sampled images also have `conditions` (n,) int64, the place
of each one's condition among all; given ones `places` (n,) int64, their place in the file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cluster.errors import ConfigError, DataError
from cluster.io.checksum import DAMAGED_ARRAYS
from cluster.io.files import AGAIN, replacing, writing
from cluster.io.strict_json import MALFORMED, dumps
from learner.evaluation.kept.identity import differences
from rewards.metrics.samples import Samples

PART = 1000
"""Images of a part, at least, but for the last one. Samples that are there keep theirs."""
FORMAT = 1
MANIFEST = "manifest.json"
SAMPLES = "samples"
FEATURES, SCORES = "features/", "scores/"
TOKENS, ENTROPIES = "tokens", "entropies"
CLASSES, CONDITIONS, PLACES = "classes", "conditions", "places"
CONTINUE = "give the same command again"
Arrays = Mapping[str, np.ndarray]


def parts_of(sizes: Sequence[int], least: int) -> list[range]:
    """Which requests each part holds.

    Args:
        sizes: images of each request.
        least: images of a part, but for the last one.
    """
    parts, first, images = list[range](), 0, 0
    for number, size in enumerate(sizes):
        images += size
        if images >= least or number == len(sizes) - 1:
            parts.append(range(first, number + 1))
            first, images = number + 1, 0
    return parts


class KeptSamples:
    """The samples of a row on disk.

    Args:
        folder: of the row.
        sizes: images of each request, in order.
        part: least images of a part.
    """

    def __init__(self, folder: Path, sizes: Sequence[int], part: int) -> None:
        self.folder, self.parts = folder, parts_of(sizes, part)
        self._images = [sum(sizes[number] for number in part) for part in self.parts]

    @classmethod
    def begin(
        cls, folder: Path, name: str, identity: Mapping[str, Any], sizes: Sequence[int]
    ) -> KeptSamples:
        """New samples, or those that an earlier command kept.

        Args:
            name: of the row, for tables.

        Raises:
            ConfigError: the directory holds samples of something else; says what differs.
        """
        if check_begun(folder, identity, sizes):
            return cls(folder, sizes, read_manifest(folder)["part"])
        write_json(folder / MANIFEST, manifest(name, identity, sizes))
        return cls(folder, sizes, PART)

    @classmethod
    def open(cls, folder: Path) -> KeptSamples:
        """Samples that are there.

        Raises:
            ConfigError: no samples are there, or not all yet.
            DataError: the manifest is damaged.
        """
        found = read_manifest(folder)
        kept = cls(folder, found["requests"], found["part"])
        if missing := kept.missing():
            left = sum(kept._images[number] for number in missing)
            raise ConfigError(
                f"{folder}: {left} of {len(kept)} images are not sampled yet: give the command "
                "that began them again"
            )
        return kept

    def __len__(self) -> int:
        """Images in all."""
        return sum(self._images)

    def file(self, number: int) -> Path:
        return self.folder / f"part_{number:06d}.npz"

    def missing(self) -> list[int]:
        """Numbers of the parts that are not there."""
        return [number for number in range(len(self.parts)) if not self.file(number).is_file()]

    @property
    def done(self) -> int:
        """Images that are there."""
        gone = set(self.missing())
        return sum(images for number, images in enumerate(self._images) if number not in gone)

    def write(self, number: int, arrays: Arrays) -> None:
        """Write a part.

        Raises:
            StorageError: no space left.
        """
        path = self.file(number)
        kept = f"The {self.done} images before it are kept"
        with (
            writing(path, kept=kept, then=CONTINUE),
            replacing(path, durable=True) as partial,
            partial.open("wb") as file,
        ):
            np.savez(file, **arrays)  # type: ignore[arg-type]

    def read(self, wanted: Callable[[str], bool] = lambda name: name != TOKENS) -> Samples:
        """All images, without tokens; sampled ones in the order of `mixed`, given ones in theirs.

        Args:
            wanted: which arrays, by name; others are left on disk.

        Raises:
            DataError: a part is damaged.
        """
        arrays = self.arrays(wanted)
        return Samples(
            features=_under(arrays, FEATURES),
            scores=_under(arrays, SCORES),
            entropies=arrays.get(ENTROPIES),
            classes=arrays.get(CLASSES),
            conditions=arrays.get(CONDITIONS),
        )

    def arrays(self, wanted: Callable[[str], bool]) -> dict[str, np.ndarray]:
        """Arrays of all images in the order of `read`, each allocated once; read part by part.

        Raises:
            DataError: a part is damaged.
        """
        places = self._places()
        whole: dict[str, np.ndarray] = {}
        first = 0
        for number, images in enumerate(self._images):
            found = self._read(number, wanted)
            if number == 0:
                whole = {
                    name: np.empty((len(self), *values.shape[1:]), values.dtype)
                    for name, values in found.items()
                }
            elif _kinds(found) != _kinds(whole):
                raise _damaged(
                    self.file(number),
                    f"expected arrays as in {self.file(0).name}, {_kinds(whole)}, "
                    f"found {_kinds(found)}",
                )
            for name, values in found.items():
                whole[name][places[first : first + images]] = values
            first += images
        return whole

    def tokens(self) -> Iterator[np.ndarray]:
        """Tokens (n, T) int32 of each part, in order.

        Raises:
            DataError: a part is damaged, or its images were given, not sampled.
        """
        for number in range(len(self.parts)):
            found = self._read(number, lambda name: name == TOKENS)
            if TOKENS not in found:
                raise DataError(f"{self.file(number)}: no tokens: its images were not sampled")
            yield found[TOKENS]

    def _places(self) -> np.ndarray:
        """(N,) the place of each image among those that are read.

        Raises:
            DataError: a part is damaged.
        """
        numbers, names = range(len(self.parts)), (CONDITIONS, PLACES)
        found = [self._read(number, lambda name: name in names) for number in numbers]
        if all(CONDITIONS in arrays for arrays in found):
            return mixed(len(self))
        if not all(PLACES in arrays for arrays in found):
            return np.arange(len(self))
        places = np.concatenate([arrays[PLACES] for arrays in found])
        if sorted(places) != [*range(len(self))]:
            raise _damaged(self.folder, "the places of its images are not each one's own")
        return places

    def _read(self, number: int, wanted: Callable[[str], bool]) -> dict[str, np.ndarray]:
        path, images = self.file(number), self._images[number]
        try:
            with np.load(path, allow_pickle=False) as file:
                found = {name: file[name] for name in file.files if wanted(name)}
        except DAMAGED_ARRAYS as error:
            raise _damaged(path, str(error)) from error
        for name, values in found.items():
            if values.shape[:1] != (images,):
                raise _damaged(path, f"{name}: expected {images} rows, found {values.shape[:1]}")
        return found


def mixed(images: int) -> np.ndarray:
    """(N,) places of images in a fixed random order.

    Evaluators score ranges of images (Inception Score). Ranges with equal shares of every class, as
    images that alternate between them have, score higher than those of random classes that
    published figures are of: 400 in place of 370 for 1,000 classes and 5,000 images a range.
    """
    return np.random.default_rng(0).permutation(images)


def kept_images(folder: Path) -> int:
    """How many images a directory of samples holds; 0 if it is none."""
    if not (folder / MANIFEST).is_file():
        return 0
    found = read_manifest(folder)
    return KeptSamples(folder, found["requests"], found["part"]).done


def _damaged(path: Path, why: str) -> DataError:
    return DataError(f"{path}: damaged ({why}): remove it, and {CONTINUE}: it is sampled again")


def _kinds(arrays: Arrays) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> dtype and shape of an image's row."""
    return {name: (str(arrays[name].dtype), arrays[name].shape[1:]) for name in sorted(arrays)}


def _under(arrays: Arrays, prefix: str) -> dict[str, np.ndarray]:
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def manifest(name: str, identity: Mapping[str, Any], sizes: Sequence[int]) -> dict[str, Any]:
    found = {"format": FORMAT, "name": name, "part": PART, "identity": identity}
    return found | {"requests": list(sizes)}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a row: its name, identity, and images of each request.

    Raises:
        ConfigError: there is none.
        DataError: it is damaged, or of another version.
    """
    path = folder / MANIFEST
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise ValueError(f"format {found['format']}, expected {FORMAT}")
        if not (isinstance(found["name"], str) and isinstance(found["identity"], dict)):
            raise ValueError("name and identity are expected")
        if not all(type(size) is int and size > 0 for size in (found["part"], *found["requests"])):
            raise ValueError("part and requests must be numbers of images")
    except OSError as error:
        raise ConfigError(f"{folder}: no kept samples here ({error})") from error
    except MALFORMED as error:
        raise DataError(
            f"{path}: not a readable manifest ({error}): remove {folder}, and its images are "
            "sampled again"
        ) from error
    return dict(found)


def check_begun(folder: Path, identity: Mapping[str, Any], sizes: Sequence[int]) -> bool:
    """Compare the samples in a directory, if there are any, with what is wanted.

    Returns:
        Whether there are.

    Raises:
        ConfigError: says what differs.
        DataError: the manifest is damaged.
    """
    if not (folder / MANIFEST).is_file():
        return False
    there = read_manifest(folder)
    found = differences(there["identity"], identity)
    if not found and there["requests"] != list(sizes):
        found = ["images of each request: those of another version"]
    if found:
        raise ConfigError(
            f"{folder} holds samples of something else ({'; '.join(found)}): name another --out, "
            "or remove that directory to sample again"
        )
    return True


def write_json(path: Path, value: Any) -> None:
    """Raises StorageError: it cannot be written."""
    with writing(path, then=AGAIN), replacing(path, durable=True) as partial:
        partial.write_text(dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
