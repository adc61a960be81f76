"""TensorBoard's event files in the run directory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import FileWriter
from torch.utils.tensorboard.summary import histogram, image, scalar

from cluster.io.files import writing
from learner.loggers.logger import EVALUATION, Newest, Values

PREFIXES = (EVALUATION, "exam")
"""Of evaluations; "exam", the old one, is written until version 0.3."""
FLUSH_S = 10  # seconds: what a kill may take from the curves
BINS = 30
"""Of a histogram: as many as TensorBoard draws. torch's own choice, 20 times as many, would cost
more than all else that is written, since checksums of event files are computed in Python."""


class TensorBoard:
    """Event files in a folder; all values of a step are one event, which costs a third of one event
    each."""

    run_id = ""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: FileWriter | None = None

    def begin(self, next_step: int) -> Newest | None:
        with writing(self._folder):
            resumed = any(self._folder.iterdir())
            self._writer = FileWriter(str(self._folder), flush_secs=FLUSH_S)
        if not resumed:
            return {}
        # hides what earlier files have from this step on, as SummaryWriter's purge_step does
        start = SessionLog(status=SessionLog.START)
        self._writer.add_event(Event(step=next_step, file_version="brain.Event:2"))
        self._writer.add_event(Event(step=next_step, session_log=start))
        return None

    def scalars(self, values: Values, step: int) -> None:
        self._write((scalar(name, value) for name, value in values.items()), step)

    def evaluation(self, figures: Values, step: int) -> None:
        named = ((f"{p}/{name}", value) for p in PREFIXES for name, value in figures.items())
        self._write((scalar(name, value) for name, value in named), step)

    def histograms(self, values: Mapping[str, np.ndarray], step: int) -> None:
        self._write((histogram(name, array, BINS) for name, array in values.items()), step)

    def images(self, name: str, image_HWC: np.ndarray, step: int) -> None:
        self._write([image(name, image_HWC, dataformats="HWC")], step)

    def finish(self, table: Mapping[str, Values], files: Sequence[Path]) -> None:
        """The run directory has both beside the event files."""

    def close(self, *, failed: bool) -> None:
        if self._writer is not None:
            self._writer.close()

    def _write(self, parts: Iterable[Summary], step: int) -> None:
        assert self._writer is not None
        values = [value for part in parts for value in part.value]
        self._writer.add_summary(Summary(value=values), step)
