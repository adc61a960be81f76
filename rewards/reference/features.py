"""Features of a batch of real images, for the sums of a reference."""

from __future__ import annotations

import numpy as np

from cluster.errors import DataError
from rewards.base import FeatureExtractor, by_size
from rewards.images.decoding import Loaded
from rewards.reference.sums import Part, mixed_sizes


def extract(loaded: list[Loaded], extractor: FeatureExtractor, start: int) -> Part:
    """Features of images start, start + 1, ...

    Raises:
        DataError: the extractor refuses an image, or its features are not finite.
    """
    size = _one_size(extractor, loaded)
    notes: dict[str, tuple[int, str]] = {}
    for image in loaded:
        for note in image.notes:
            count, first = notes.get(note, (0, image.name))
            notes[note] = count + 1, first
    unreadable = [(image.name, image.error) for image in loaded if image.pixels is None]
    kept = [index for index, image in enumerate(loaded) if image.pixels is not None]
    pixels = [image.pixels for image in loaded if image.pixels is not None]
    features = np.zeros((0, 0), np.float32)
    for places, batch in by_size(pixels):
        try:
            values = extractor(batch)
        except DataError as error:
            raise DataError(f"{loaded[kept[places[0]]].name}: {error}") from error
        if not len(features):
            features = np.empty((len(kept), values.shape[1]), np.float32)
        features[places] = values
    broken = np.flatnonzero(~np.isfinite(features).all(1))
    if broken.size:
        raise DataError(
            f"{loaded[kept[broken[0]]].name}: its features are not finite: do the network's weights"
            " fit?"
        )
    numbers = np.array(kept, np.int64) + start
    return Part(start, start + len(loaded), numbers, features, unreadable, notes, size)


def _one_size(extractor: FeatureExtractor, loaded: list[Loaded]) -> tuple[str, int, int] | None:
    """Name, height and width of the first image, if the extractor needs images of one size.

    Raises:
        DataError: another image has another size.
    """
    if not getattr(extractor, "one_size", False):
        return None
    sizes = [(x.name, *x.pixels.shape[:2]) for x in loaded if x.pixels is not None]
    for other in sizes:
        if other[1:] != sizes[0][1:]:
            raise DataError(mixed_sizes(sizes[0], other))
    return sizes[0] if sizes else None
