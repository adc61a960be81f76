"""Writes a policy's images in the layout of a benchmark."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from PIL import Image

from cluster.errors import DataError
from cluster.io.files import writing
from cluster.messages import SampleRequest
from learner.evaluation.benchmarks.layouts import Content, picture
from learner.evaluation.benchmarks.prompts import Prompt
from learner.evaluation.benchmarks.table import Benchmark

WRITERS = 8  # threads: a PNG takes longer to compress than a GPU takes to sample its image


class BenchmarkImages:
    """Images of the prompts of a benchmark, in its layout.

    A prompt's files appear one by one, each complete. They are written in another folder of the
    same file system first, since the benchmark's scripts read whatever is in theirs, and since a
    prompt may take all of a file name's 255 bytes. JPEG files are as Pillow writes them by default,
    which is what HPSv2's example does.
    """

    def __init__(
        self, folder: Path, partial: Path, benchmark: Benchmark, prompts: Sequence[Prompt],
        count: int,
    ) -> None:  # fmt: skip
        """Prepare to write.

        Args:
            folder: of the layout.
            partial: folder of this writer alone for unfinished files, outside of `folder`.
            count: images of each prompt.

        Raises:
            DataError: the layout holds another number of images.
        """
        if benchmark.counts and count not in benchmark.counts:
            several = " or ".join(map(str, benchmark.counts))
            raise DataError(f"{benchmark.title} takes {several} images of each prompt, not {count}")
        self._folder, self._partial = folder, partial
        self._contents = [dict(benchmark.layout(prompt, count)) for prompt in prompts]
        self._grids = any(len(each) > 1 for at in self._contents[:1] for each in at.values()
                          if not isinstance(each, str))  # fmt: skip
        self._count = count

    def __enter__(self) -> Self:
        self._pool = ThreadPoolExecutor(min(WRITERS, os.cpu_count() or 1))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown()
        shutil.rmtree(self._partial, ignore_errors=True)

    @property
    def all_complete(self) -> bool:
        """Whether nothing is left to write."""
        return all(map(self.complete, range(len(self._contents))))

    def complete(self, index: int) -> bool:
        """Whether all files of a prompt, by its position among the prompts, are there."""
        return all((self._folder / name).is_file() for name in self._contents[index])

    def write(self, index: int, request: SampleRequest, images: np.ndarray) -> None:
        """Write the files of a prompt.

        Args:
            index: position among the prompts.
            images: (K, H, W, 3) uint8.

        Raises:
            DataError: another number of images, or a grid of images that are not square.
            StorageError: a file cannot be written.
        """
        _, height, width, _ = images.shape
        if len(images) != self._count:
            raise DataError(f"prompt {index}: expected {self._count} images, found {len(images)}")
        if self._grids and height != width:
            raise DataError(
                f"grids are cut into squares, but images have {width} x {height} pixels"
            )
        contents = self._contents[index]
        partials = [self._partial / f"{index}_{number}" for number in range(len(contents))]
        list(self._pool.map(self._file, contents.items(), partials, itertools.repeat(images)))

    def _file(self, item: tuple[str, Content], partial: Path, images: np.ndarray) -> None:
        name, content = item
        path = self._folder / name
        with writing(path):
            for folder in (path.parent, partial.parent):
                folder.mkdir(parents=True, exist_ok=True)
            if isinstance(content, str):
                partial.write_text(content, encoding="utf-8")
            else:
                kind = Image.registered_extensions()[path.suffix]
                Image.fromarray(picture(images, content)).save(partial, kind, compress_level=1)
            os.replace(partial, path)
