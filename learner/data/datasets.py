"""Real images: a named set such as "digits:train", a published reference, or a path."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from cluster.errors import DataError
from cluster.io.paths import expand_user
from cluster.model_files.file_kinds import described
from cluster.model_files.tensors import locate
from cluster.program.streams import printable
from learner.data.named_sets import is_named, read_named
from rewards.base import Images
from rewards.images.decoding import ImageSource, Loaded
from rewards.images.sources import SampleImages, open_source
from rewards.reference.fetch import PUBLISHED

CAPTIONED = "digits:"
AT_ONCE = 1024  # images
MOST_BYTES = 1 << 26  # of the images of a batch: photographs in full size are many


def load_images(source: str) -> np.ndarray:
    """Real images (N, H, W, 3) uint8.

    Raises:
        ConfigError: a named set whose package is not installed.
        DataError: no such set, or a file without uint8 images.
    """
    if is_named(source):
        return read_named(source)[0]
    return np.concatenate([*iterate_images(source, AT_ONCE)])


def iterate_images(source: str, batch: int) -> Iterator[np.ndarray]:
    """The images of `load_images` in batches (B, H, W, 3), read lazily.

    Raises:
        ConfigError, DataError: as `load_images`.
    """
    if is_named(source):
        images = load_images(source)
        yield from (images[at : at + batch] for at in range(0, len(images), batch))
        return
    samples = _samples(source)
    for at in range(0, len(samples), batch):
        read = samples.read(at, at + batch)
        yield np.stack([image.pixels for image in read if image.pixels is not None])


@dataclass(frozen=True)
class ImageSet:
    """Real images of any sizes, read where they are needed."""

    name: str
    images: ImageSource | np.ndarray
    """A source, or (N, H, W, 3) uint8."""

    def __len__(self) -> int:
        return len(self.images)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the first image, pixels."""
        height, width = next(self._each()).shape[:2]
        return height, width

    def image(self, index: int) -> np.ndarray:
        """One image (H, W, 3) uint8; the others are not read.

        Raises:
            DataError: it cannot be read.
        """
        if isinstance(self.images, np.ndarray):
            return self.images[index]
        return _pixels(next(iter(self.images.read(index, index + 1))))

    def batches(self, batch: int) -> Iterator[Images]:
        """The images in order, at most `batch` at a time: an array, or a list of several sizes.

        Raises:
            DataError: names an image that cannot be read.
        """
        if isinstance(self.images, np.ndarray):
            yield from (self.images[at : at + batch] for at in range(0, len(self), batch))
            return
        held, size = list[np.ndarray](), 0
        for image in self._each():
            if held and (len(held) == batch or size + image.nbytes > MOST_BYTES):
                yield together(held)
                held, size = [], 0
            held.append(image)
            size += image.nbytes
        if held:
            yield together(held)

    def _each(self) -> Iterator[np.ndarray]:
        if isinstance(self.images, np.ndarray):
            yield from self.images
            return
        for loaded in self.images.read(0, len(self.images)):
            yield _pixels(loaded)


def open_images(source: str) -> ImageSet:
    """Real images by the name of a set or of a published reference, or a path: a folder, Parquet
    files, an .npz or .npy file.

    Raises:
        ConfigError: a named set whose package is not installed.
        CheckpointError, DataError: no such set, or no images in it.
    """
    if is_named(source):
        return ImageSet(source, load_images(source))
    if source in PUBLISHED:  # its digest was compared when it was fetched
        return ImageSet(source, SampleImages(locate(str(PUBLISHED[source].place()))))
    return ImageSet(source, open_source(source))


def _pixels(loaded: Loaded) -> np.ndarray:
    if loaded.pixels is None:
        raise DataError(
            f"{loaded.name}: cannot be read ({loaded.error}): replace it, or move it away"
        )
    return loaded.pixels


def together(images: list[np.ndarray]) -> Images:
    """Images (H, W, 3) as one array, or as they are where their sizes differ."""
    return np.stack(images) if len({image.shape for image in images}) == 1 else images


def load_labels(source: str) -> np.ndarray:
    """Classes (N,) int64 of the images of `load_images`.

    Raises:
        ConfigError: a named set whose package is not installed.
        DataError: no such set, or a file that has none.
    """
    if is_named(source):
        return read_named(source)[1]
    return _samples(source).classes().indices


def has_captions(source: str) -> bool:
    """Whether `image_captions` has captions of images."""
    return source.startswith(CAPTIONED)


def image_captions(source: str) -> list[str]:
    """The captions of the images of `load_images`, measured from them.

    Raises:
        DataError: no such set, or images without captions: those of the digits alone have some.
    """
    if not has_captions(source):
        raise DataError(f"{printable(source)}: images without captions; {CAPTIONED}train has some")
    from learner.data.digit_captions import captions_of, ink_of, training_cuts

    images, labels = read_named(source)
    return captions_of(training_cuts().attributes(ink_of(images), labels))


def has_labels(images: ImageSet) -> bool:
    """Whether `load_labels` has classes of images, sound or not."""
    if isinstance(images.images, SampleImages):
        return images.images.has_classes
    return is_named(images.name)


def _samples(source: str) -> SampleImages:
    """Raises DataError for a folder, or another kind of file."""
    expected = "expected an .npz file of samples, arr_0 (N, H, W, 3) uint8 and, for classes, arr_1"
    if expand_user(source).is_dir():
        raise DataError(f"{printable(source)}: {expected}, found a folder: write its images as one")
    found = open_source(str(locate(source)))
    if not isinstance(found, SampleImages):
        raise DataError(f"{printable(source)}: {expected}, found {described(locate(source))}")
    return found
