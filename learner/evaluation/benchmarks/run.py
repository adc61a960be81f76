"""A benchmark in an evaluation: its prompts as conditions, its images, figures by category."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from actors.text.encoder import DEFAULT_ENCODER
from cluster.errors import ConfigError, did_you_mean
from cluster.io.files import replacing, writing
from cluster.io.strict_json import dumps
from learner.config import RunConfig
from learner.evaluation.benchmarks.images import BenchmarkImages
from learner.evaluation.benchmarks.layouts import COLUMNS
from learner.evaluation.benchmarks.prompts import Prompt
from learner.evaluation.benchmarks.table import BENCHMARKS, Benchmark, Written
from learner.evaluation.held_out import GROUP
from rewards.metrics.evaluation import Figure, MetricSettings, evaluate
from rewards.metrics.samples import RealImages, Samples

PROMPTS, NEXT = "prompts", "next.txt"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    """A text-to-image benchmark."""

    benchmark: str = ""
    """Text-to-image benchmark: geneval, dpg, t2i-compbench, hpsv2, partiprompts or drawbench. Its
    prompts are sampled, and the images written where its scripts look for them
    (learner/benchmarks.md)."""
    prompts: str = ""
    """The benchmark's own file or folder of prompts."""
    images_per_prompt: int = 0
    """Images of each prompt of a benchmark. 0: as many as it asks for."""


@dataclass(frozen=True)
class BenchmarkRun:
    """A benchmark with its prompts."""

    name: str
    benchmark: Benchmark
    source: Path
    prompts: Sequence[Prompt]
    count: int
    """Images of each prompt."""

    @classmethod
    def of(cls, options: BenchmarkOptions) -> BenchmarkRun | None:
        """None where no benchmark is asked for.

        Raises:
            ConfigError: no such benchmark, no file, or a number of images that it cannot have.
            DataError: the file is not the benchmark's.
        """
        name, count = options.benchmark, options.images_per_prompt
        if not name:
            if options.prompts or count:
                given = "--prompts" if options.prompts else "--images-per-prompt"
                raise ConfigError(f"{given} is of --benchmark: say which ({', '.join(BENCHMARKS)})")
            return None
        benchmark = BENCHMARKS.get(name)
        if benchmark is None:
            raise ConfigError(
                f"--benchmark {name!r}: {did_you_mean(name, list(BENCHMARKS))}there are "
                f"{', '.join(BENCHMARKS)}"
            )
        if not options.prompts:
            raise ConfigError(
                f"--benchmark {name} needs --prompts, its own file of prompts "
                "(learner/benchmarks.md says where it is)"
            )
        count = count or benchmark.images
        if not 1 <= count <= GROUP:
            raise ConfigError(f"--images-per-prompt: expected 1 to {GROUP}, found {count}")
        if benchmark.counts and count not in benchmark.counts:
            several = " or ".join(map(str, benchmark.counts))
            raise ConfigError(
                f"--images-per-prompt: {benchmark.title} takes {several}, found {count}"
            )
        source = Path(options.prompts)
        return cls(name, benchmark, source, benchmark.read(source), count)

    @property
    def texts(self) -> list[str]:
        return [prompt.text for prompt in self.prompts]

    @property
    def about(self) -> dict[str, str]:
        """For the results."""
        number = f"{len(self.prompts):,} prompts of {self.source}"
        return {"benchmark": f"{self.benchmark.title}, {number}, {self.count} images of each"}

    def texts_file(self, out: Path) -> Path:
        return out / PROMPTS / f"{self.name}.json"

    def write_texts(self, path: Path) -> None:
        """Write the prompts as a JSON list, which captions are read from, and HPSv2's DrawBench.

        Raises:
            ConfigError: the file is there, with other prompts.
            StorageError: it cannot be written.
        """
        text = dumps(self.texts, indent=1, ensure_ascii=False)
        if path.is_file():
            if path.read_text(encoding="utf-8") != text:
                raise ConfigError(
                    f"{path} holds other prompts than {self.source}: name another --out"
                )
            return
        with writing(path), replacing(path) as partial:
            partial.write_text(text, encoding="utf-8")

    def configured(self, config: RunConfig, captions: Path) -> RunConfig:
        """A configuration that samples the prompts, and compares with no real images.

        Args:
            captions: file of `write_texts`.
        """
        conditions = replace(
            config.conditions,
            captions=str(captions),
            column="",
            classes=(),
            encoder=config.conditions.encoder or DEFAULT_ENCODER,
        )
        images = self.count * len(self.prompts)
        evaluation = replace(config.evaluation, num_images=images, images="")
        return replace(config, conditions=conditions, evaluation=evaluation)

    @contextmanager
    def written(self, config: RunConfig) -> Iterator[RunConfig]:
        """The configuration of `configured` with its captions in a temporary file, to be checked
        before there is a directory of results."""
        with tempfile.TemporaryDirectory() as folder:
            captions = Path(folder) / "prompts.json"
            self.write_texts(captions)
            conditions = replace(config.conditions, captions=str(captions))
            yield replace(config, conditions=conditions)

    def folder(self, out: Path, row: str) -> Path:
        """Of a row's images."""
        return out / self.name / row

    def images(self, out: Path, row: str) -> BenchmarkImages:
        """A writer of a row's images.

        Args:
            row: name of the row's folder.
        """
        partial = out / f".{self.name}-{row}.partial"
        folder = self.folder(out, row)
        return BenchmarkImages(folder, partial, self.benchmark, self.prompts, self.count)

    def figures(self, samples: Samples, settings: MetricSettings) -> dict[str, Figure]:
        """Mean scores of each category, with intervals: "clip, category: Animals".

        Args:
            samples: whose conditions are places among the prompts.
        """
        assert samples.conditions is not None
        found: dict[str, Figure] = {}
        for tag, indices in self._members().items():
            rows = np.isin(samples.conditions, indices)
            some = {name: values[rows] for name, values in samples.scores.items()}
            means = evaluate(Samples(features={}, scores=some), RealImages(), settings)
            found |= {f"{name}, {tag}": means[name] for name in some}
        return found

    def _members(self) -> dict[str, list[int]]:
        members: dict[str, list[int]] = {}
        for index, prompt in enumerate(self.prompts):
            for kind, value in prompt.tags:
                members.setdefault(f"{kind}: {value}", []).append(index)
        return dict(sorted(members.items()))

    def write_next(self, out: Path, rows: Sequence[str]) -> None:
        """Write the commands that come next, and log them.

        Raises:
            StorageError: they cannot be written.
        """
        commands = self.commands(out, rows)
        if commands:
            about = f"# {self.benchmark.title}, in a checkout of {self.benchmark.repository}"
            text = "\n".join([about, *commands])
        else:
            text = f"# {self.benchmark.title}: people judge the images, there is no script"
        path = out / NEXT
        with writing(path), replacing(path) as partial:
            partial.write_text(f"{text}\n", encoding="utf-8")
        logger.info(f"what comes next ({path}):\n{text}")

    def commands(self, out: Path, rows: Sequence[str]) -> list[str]:
        """What comes next, for all rows, whose images are there."""
        parts = tuple(dict.fromkeys(prompt.part for prompt in self.prompts if prompt.part))
        place, found = out.resolve(), dict[str, None]()
        for row in rows:
            folder = self.folder(place, row)
            made = Written(folder, self.texts_file(place), self._side(folder), self.count, parts)
            found |= dict.fromkeys(self.benchmark.commands(made))
        return list(found)

    def _side(self, folder: Path) -> int:
        """Of an image, pixels."""
        layout = self.benchmark.layout(self.prompts[0], self.count)
        for name, content in layout.items():
            if not isinstance(content, str):
                with Image.open(folder / name) as image:
                    return image.width // min(len(content), COLUMNS)
        raise AssertionError("a layout without images")
