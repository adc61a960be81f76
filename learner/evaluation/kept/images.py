"""Where the images of an evaluation go: an .npz file, PNG files, layouts of benchmarks.

Images are not kept while they are sampled. They are decoded from the kept tokens afterwards, which
can also be done later, without sampling anything again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np
import torch
from PIL import Image

from actors.captions import resolve_device
from actors.checkpoints.loading import load_decoder
from actors.sample_files import NpzWriter
from cluster.errors import DataError
from cluster.io.files import replacing, writing
from cluster.io.strict_json import dumps
from cluster.messages import SampleRequest
from cluster.program.precision import start_computing
from learner.config import RunConfig
from learner.evaluation.kept.samples import CONTINUE, KeptSamples, mixed, read_manifest
from learner.evaluation.sampling import condition_numbers
from learner.rollouts.images import token_grid

WRITERS = 8  # threads: a PNG takes longer to compress than a GPU takes to decode its image
AT_ONCE = 256  # images copied at a time


class ImageSink(Protocol):
    """Takes the images of all requests of an evaluation, one request at a time, in order."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def write(self, index: int, request: SampleRequest, images: np.ndarray) -> None:
        """Write the images of a request.

        Args:
            index: place of the request among all, from 0.
            images: (K, H, W, 3) uint8.

        Raises:
            StorageError: no space left.
        """
        ...


class NpzSink:
    """An .npz file for the ADM evaluator: `arr_0` (N, H, W, 3) uint8 and, of classes, `arr_1` (N,).

    In a fixed random order: that evaluator computes Inception Scores of ranges of 5,000 images.
    Images wait in a file beside it, as large, until all are there.
    """

    def __init__(self, path: Path, requests: Sequence[SampleRequest]) -> None:
        self._path = path
        self._waiting = path.with_name(f".{path.stem}.waiting.npy")
        sizes = [request.num_rollouts for request in requests]
        self._firsts = np.cumsum([0, *sizes])
        conditions = np.repeat(condition_numbers(requests), sizes)
        self._places = mixed(len(conditions))
        classes = [request.condition.class_index for request in requests]
        self._labels: np.ndarray | None = None
        if None not in classes:
            self._labels = np.empty(len(conditions), np.int64)
            self._labels[self._places] = np.repeat(np.asarray(classes, np.int64), sizes)
        self._array: np.memmap | None = None

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        return self

    def write(self, index: int, request: SampleRequest, images: np.ndarray) -> None:
        with writing(self._path, then=CONTINUE):
            if self._array is None:
                shape = (len(self._places), *images.shape[1:])
                self._array = np.lib.format.open_memmap(
                    self._waiting, mode="w+", dtype=np.uint8, shape=shape
                )
                reserve(self._waiting)
            first = self._firsts[index]
            self._array[self._places[first : first + len(images)]] = images

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None and self._array is not None:
                self._finish(self._array)
        finally:
            self._array = None
            self._waiting.unlink(missing_ok=True)

    def _finish(self, images: np.memmap) -> None:
        labels = None if self._labels is None else self._labels.tolist()
        with (
            writing(self._path, then=CONTINUE),
            NpzWriter(self._path, len(images), labels) as writer,
        ):
            for at in range(0, len(images), AT_ONCE):
                writer.write(images[at : at + AT_ONCE])


@dataclass(frozen=True)
class Written:
    """Images of a row on disk, and the samples that they are of."""

    place: Path
    """File or folder."""
    mark: Path
    """File with `digest`, there once all images are."""
    digest: str
    """Of the samples' identity."""

    @classmethod
    def of(cls, place: Path, mark: Path, kept: KeptSamples) -> Written:
        identity = read_manifest(kept.folder)["identity"]
        text = dumps(identity, sort_keys=True)
        return cls(place, mark, hashlib.sha256(text.encode()).hexdigest())

    @property
    def current(self) -> bool:
        """Whether images were written of these samples."""
        marked = self.mark.is_file() and self.place.exists()
        return marked and self.mark.read_text(encoding="utf-8").strip() == self.digest

    def begin(self) -> None:
        """Remove images of other samples.

        Raises:
            StorageError: they cannot be removed.
        """
        with writing(self.place, then=CONTINUE):
            if not self.current and self.place.is_dir():
                shutil.rmtree(self.place)
            elif not self.current:
                self.place.unlink(missing_ok=True)
            self.mark.unlink(missing_ok=True)

    def end(self) -> None:
        """Raises StorageError: the mark cannot be written."""
        with writing(self.mark, then=CONTINUE), replacing(self.mark) as partial:
            partial.write_text(f"{self.digest}\n", encoding="utf-8")


def reserve(path: Path) -> None:
    """Give a file its space on the disk: a full one ends a process that writes to a mapping.

    Raises:
        OSError: no space left.
    """
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


class PngSink:
    """PNG files: `000017_class0207.png` is image 17 of an evaluation, of class 207; of captions
    `000017.png`."""

    def __init__(self, folder: Path, requests: Sequence[SampleRequest]) -> None:
        self._folder = folder
        self._firsts = np.cumsum([0, *(request.num_rollouts for request in requests)])

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._pool = ThreadPoolExecutor(min(WRITERS, os.cpu_count() or 1))
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def write(self, index: int, request: SampleRequest, images: np.ndarray) -> None:
        condition, first = request.condition.class_index, int(self._firsts[index])
        label = "" if condition is None else f"_class{condition:04d}"
        names = [f"{first + offset:06d}{label}.png" for offset in range(len(images))]
        with writing(self._folder, then=CONTINUE):
            list(self._pool.map(_save, images, [self._folder / name for name in names]))


def _save(image: np.ndarray, path: Path) -> None:
    Image.fromarray(image).save(path, compress_level=1)


def write_images(
    config: RunConfig,
    kept: KeptSamples,
    requests: Sequence[SampleRequest],
    sinks: Sequence[ImageSink],
    advance: Callable[[int], None],
    device: str = "auto",
) -> None:
    """Decode the images of kept samples, request by request, into sinks that are entered.

    On a CPU they are the scored images bit for bit; a GPU rounds as its kernels do.

    Raises:
        DataError: a part is damaged, or the tokens are of another policy.
    """
    for index, images in enumerate(decoded(config, kept, requests, device)):
        for sink in sinks:
            sink.write(index, requests[index], images)
        advance(len(images))


@torch.inference_mode()
def decoded(
    config: RunConfig, kept: KeptSamples, requests: Sequence[SampleRequest], device: str
) -> Iterator[np.ndarray]:
    """Images (K, H, W, 3) uint8 of each request."""
    device = resolve_device(device)
    start_computing()
    grid = token_grid(config)
    dtype = getattr(torch, config.sampler.image_dtype)
    decoder = load_decoder(config.tokenizer, device=device, dtype=dtype)
    for numbers, tokens in zip(kept.parts, kept.tokens(), strict=True):
        if tokens.shape[1] != grid.size:
            raise DataError(
                f"{kept.folder}: tokens of shape {tokens.shape}, expected (N, {grid.size}): are "
                "they of another policy?"
            )
        codes = torch.from_numpy(tokens[:, grid].astype(np.int64))
        first = 0
        for number in numbers:
            size = requests[number].num_rollouts
            part = codes[first : first + size].to(device)
            yield decoder.pixels(part, requests[number].image_size).cpu().numpy()
            first += size
