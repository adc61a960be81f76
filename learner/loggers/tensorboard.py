"""TensorBoard's event files in the run directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from cluster.io.files import writing
from learner.loggers.logger import EVALUATION, Newest, Values

OLD_EVALUATION = "exam"
"""The earlier prefix of evaluations; written beside the other until version 0.3."""
FLUSH_S = 10  # seconds: what a kill may take from the curves
BINS = 30
"""Of a histogram: as many as TensorBoard draws. Its own choice, 20 times as many, costs the most of
all that is written, since it sums files up in Python."""


class TensorBoard:
    """Event files in a folder."""

    run_id = ""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: SummaryWriter | None = None

    def begin(self, next_step: int) -> Newest | None:
        with writing(self._folder):
            resumed = any(self._folder.iterdir())
            purge = next_step if resumed else None  # what was written from this step on is hidden
            self._writer = SummaryWriter(str(self._folder), purge_step=purge, flush_secs=FLUSH_S)
        return None if resumed else {}

    def scalars(self, values: Values, step: int) -> None:
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def evaluation(self, figures: Values, step: int) -> None:
        for prefix in (EVALUATION, OLD_EVALUATION):
            self.scalars({f"{prefix}/{name}": value for name, value in figures.items()}, step)

    def histograms(self, values: Mapping[str, np.ndarray], step: int) -> None:
        for name, array in values.items():
            self._events.add_histogram(name, array, step, bins=BINS)

    def images(self, name: str, image: np.ndarray, step: int) -> None:
        self._events.add_image(name, image, step, dataformats="HWC")

    def finish(self, table: Mapping[str, Values], files: Sequence[Path]) -> None:
        """The event files have both already, or beside them."""

    def close(self, *, failed: bool) -> None:
        if self._writer is not None:
            self._writer.close()

    @property
    def _events(self) -> SummaryWriter:
        assert self._writer is not None
        return self._writer
