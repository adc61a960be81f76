"""An evaluation from start to end: real images, samples of every row, figures, results."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.control.control_actor import Progress
from cluster.errors import ConfigError
from cluster.fleet import Fleet
from cluster.io.locks import is_lock
from cluster.io.run_layout import CAPTIONS, DISCOVERY_FILE
from cluster.messages import SampleRequest
from cluster.program.console import progress_bar
from learner.config import RunConfig
from learner.evaluation.benchmarks.run import NEXT, PROMPTS, BenchmarkRun
from learner.evaluation.benchmarks.table import BENCHMARKS
from learner.evaluation.held_out import real_images, requests_of
from learner.evaluation.kept.identity import identity_of
from learner.evaluation.kept.images import ImageSink, NpzSink, PngSink, Written, write_images
from learner.evaluation.kept.real import REAL, read_real, real_identity, write_real
from learner.evaluation.kept.samples import SAMPLES, KeptSamples, check_begun
from learner.evaluation.results import CSV, JSON, MARKDOWN, Results, write_results
from learner.evaluation.rows import Row
from learner.evaluation.sampling import Advance, GivenImages, sample_missing, score_missing
from learner.evaluation.targets import Target
from rewards.metrics.evaluation import Figure, MetricSettings, evaluate
from rewards.metrics.samples import RealImages

logger = logging.getLogger(__name__)

LOG = "evaluate.log"
IMAGES = "images"
OURS = (SAMPLES, REAL, IMAGES, JSON, MARKDOWN, CSV, LOG, CAPTIONS, DISCOVERY_FILE, PROMPTS, NEXT,
        *BENCHMARKS)  # fmt: skip
OpenFleet = Callable[[RunConfig, bool], AbstractContextManager[Fleet]]
"""Opens a fleet; the flag says whether it samples, or scores given images alone."""


@dataclass(frozen=True)
class Outputs:
    """Images that are written beside the figures."""

    npz: bool = False
    png: bool = False


@dataclass(frozen=True)
class Work:
    """What a row needs."""

    row: Row
    config: RunConfig
    """Of the row's policy."""
    identity: Mapping[str, Any]
    requests: Sequence[SampleRequest]
    """None of given images."""
    kept: KeptSamples

    @property
    def fleet(self) -> tuple[RunConfig, bool]:
        """What its fleet is opened with: rows that differ in it do not share one."""
        return self.config, self.row.spec is not None


def check_out(out: Path) -> None:
    """Refuse a directory that holds anything else than an evaluation.

    Raises:
        ConfigError: names what is there.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file: name a directory")
    there = sorted(out.iterdir()) if out.is_dir() else []
    ours = (*OURS, "comparison.json", "comparison.md")
    others = [file.name for file in there if file.name not in ours and not is_lock(file)]
    others = [name for name in others if not name.endswith(".partial")]
    if others:
        raise ConfigError(
            f"--out {out} holds something else ({', '.join(others[:3])}): name another directory"
        )


def check_count(source: str, images: int, neighbours: int) -> None:
    """Refuse given images that are too few for nearest neighbours.

    Raises:
        ConfigError: says how many there are.
    """
    if images <= neighbours:
        raise ConfigError(
            f"{source}: {images} images, expected more than {neighbours}, for {neighbours} nearest "
            "neighbours: name a larger set, or fewer --evaluation.neighbours"
        )


def config_of(config: RunConfig, target: Target, *, own_tokenizer: bool = True) -> RunConfig:
    """The configuration with the policy of a target.

    Args:
        own_tokenizer: and with its tokenizer, where it has one.
    """
    if target.policy is None:
        return config
    tokenizer = target.tokenizer if own_tokenizer else None
    return replace(config, policy=target.policy, tokenizer=tokenizer or config.tokenizer)


class Evaluation:
    """Rows that are sampled, kept in a directory, and measured.

    Args:
        config: with conditions, judge and sampler of all rows.
        configs: by name of the row, with its policy and tokenizer.
        out: directory, which this process owns.
        benchmark: whose prompts are sampled, if any.
    """

    def __init__(
        self,
        config: RunConfig,
        rows: Sequence[Row],
        configs: Mapping[str, RunConfig],
        out: Path,
        benchmark: BenchmarkRun | None = None,
    ) -> None:
        self._config, self._out, self._benchmark = config, out, benchmark
        self._identity = real_identity(config)
        self._real: RealImages | None = read_real(out, self._identity)
        planned = [self._plan(row, configs[row.name]) for row in rows]
        for row, identity, _, sizes in planned:  # all, before any is written
            check_begun(self._folder(row), identity, sizes)
        self.work = [
            Work(
                row,
                configs[row.name],
                identity,
                requests,
                KeptSamples.begin(self._folder(row), row.name, identity, sizes),
            )
            for row, identity, requests, sizes in planned
        ]

    def _folder(self, row: Row) -> Path:
        return self._out / SAMPLES / row.folder

    def _plan(
        self, row: Row, config: RunConfig
    ) -> tuple[Row, Mapping[str, Any], Sequence[SampleRequest], list[int]]:
        """A row's identity, requests, and images of each request."""
        identity = identity_of(config, row)
        if row.spec is None:
            given = GivenImages.open(row.target.images, captions=bool(config.conditions.captions))
            given.requests(config)  # refuses classes that the configuration does not have
            if config.evaluation.images:
                check_count(row.target.images, len(given.images), config.evaluation.neighbours)
            return row, identity, (), given.sizes()
        requests = list(requests_of(config, row.spec))
        return row, identity, requests, [request.num_rollouts for request in requests]

    @property
    def left(self) -> int:
        """Images that are not sampled yet."""
        return sum(len(work.kept) - work.kept.done for work in self.work)

    def sample(self, open_fleet: OpenFleet) -> None:
        """Sample and score what is missing, one fleet for rows of the same policy and tokenizer.

        Raises:
            StopRequestedError: a stop was requested; complete parts are kept.
        """
        waiting = [work for work in self.work if work.kept.missing()]
        if not waiting and self._real is None and self._config.evaluation.images:
            waiting = self.work[:1]  # its fleet has the judge
        while waiting:
            config, sampled = waiting[0].fleet
            together = [work for work in waiting if work.fleet == (config, sampled)]
            waiting = [work for work in waiting if work not in together]
            with open_fleet(config, sampled) as fleet:
                self._see_real(fleet)
                for work in together:
                    if work.kept.missing():
                        self._fill(fleet, work)

    def _see_real(self, fleet: Fleet) -> None:
        if self._real is not None or not self._config.evaluation.images:
            return
        logger.info(f"real images: {self._config.evaluation.images}")
        self._real = real_images(self._config, fleet)
        write_real(self._out, self._identity, self._real)

    def _fill(self, fleet: Fleet, work: Work) -> None:
        kept = work.kept
        done = f", {kept.done} are there" if kept.done else ""
        verb = "sampling" if work.row.spec else "scoring"
        logger.info(f"{verb} {work.row.name}: {len(kept)} images{done}")
        stage = f"{verb} {work.row.name}"
        with progress_bar(work.row.name, len(kept), IMAGES, first=kept.done) as bar:
            advance = self._reported(fleet, stage, bar)
            if work.row.spec is None:
                captions = bool(work.config.conditions.captions)
                given = GivenImages.open(work.row.target.images, captions=captions)
                score_missing(work.config, fleet, given, kept, advance)
            else:
                sample_missing(fleet, work.requests, kept, advance)

    def _reported(self, fleet: Fleet, stage: str, bar: Advance) -> Advance:
        """`bar`, and what `cluster.status` and Prometheus show."""
        began, here = time.monotonic(), 0
        total = sum(len(work.kept) for work in self.work)

        def advance(count: int) -> None:
            nonlocal here
            bar(count)
            here += count
            seconds = (time.monotonic() - began) / here if here else 0.0
            progress = Progress(
                stage=stage,
                directory=str(self._out),
                done=total - self.left,
                iterations=total,
                unit="image",
                seconds=seconds,
                metrics={"time/images_per_s": 1 / seconds} if seconds else {},
                free_bytes=shutil.disk_usage(self._out).free,
            )
            fleet.report_progress(progress)

        advance(0)
        return advance

    def write_images(self, outputs: Outputs) -> None:
        """Write the images that are asked for, of sampled rows; those of other samples are removed.

        Raises:
            StorageError: no space left.
        """
        for work in self.work:
            if work.row.spec is None:
                continue
            sinks = self._sinks(work, outputs)
            if not sinks:
                continue
            for written, _ in sinks:
                written.begin()
            task = f"images of {work.row.name}"
            with (
                ExitStack() as stack,
                progress_bar(task, len(work.kept), IMAGES) as advance,
            ):
                entered = [stack.enter_context(sink) for _, sink in sinks]
                write_images(work.config, work.kept, work.requests, entered, advance)
            for written, _ in sinks:
                written.end()

    def _sinks(self, work: Work, outputs: Outputs) -> list[tuple[Written, ImageSink]]:
        """What is asked for and not there, of these samples, yet."""
        name = work.row.folder
        images = self._out / IMAGES
        found = list[tuple[Written, ImageSink]]()

        def written(place: Path, kind: str) -> Written:
            return Written.of(place, images / f"{name}.{kind}.sha256", work.kept)

        npz, png = written(images / f"{name}.npz", "npz"), written(images / name, "png")
        if outputs.npz and not npz.current:
            found.append((npz, NpzSink(npz.place, work.requests)))
        there = len([*png.place.glob("*.png")]) == len(work.kept)
        if outputs.png and not (png.current and there):
            found.append((png, PngSink(png.place, work.requests)))
        if self._benchmark is not None:
            layout = written(self._benchmark.folder(self._out, name), self._benchmark.name)
            sink = self._benchmark.images(self._out, name)
            if not (layout.current and sink.all_complete):
                found.append((layout, sink))
        return found

    def results(self, settings: MetricSettings, about: Mapping[str, Any]) -> Results:
        """Figures of all rows, from the kept samples; written to the directory.

        Raises:
            DataError: a file is damaged, or there are too few images.
        """
        real = self._real or RealImages()
        figures = dict[str, Mapping[str, Figure]]()
        for work in self.work:
            figures[work.row.name] = self._figures(work, real, settings)
        identities = {work.row.name: work.identity for work in self.work}
        results = Results(figures, identities, about)
        write_results(self._out, results)
        return results

    def _figures(
        self, work: Work, real: RealImages, settings: MetricSettings
    ) -> Mapping[str, Figure]:
        """Figures of a row, whose samples (1.3 GB of 50,000 images) are in memory here alone."""
        logger.info(f"figures of {work.row.name}")
        samples = work.kept.read()
        found = evaluate(samples, real, settings)
        if self._benchmark is not None:
            found |= self._benchmark.figures(samples, settings)
        return found

    def write_next(self) -> None:
        """Write and log the benchmark's commands that come next, if there is a benchmark.

        Raises:
            StorageError: no space left.
        """
        if self._benchmark is not None:
            self._benchmark.write_next(self._out, [work.row.folder for work in self.work])
