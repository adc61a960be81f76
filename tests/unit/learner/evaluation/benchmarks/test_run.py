"""A benchmark's options, configuration, figures by category, and what comes next."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from actors.text.captions import read_captions
from actors.text.encoder import DEFAULT_ENCODER
from cluster.errors import ConfigError
from learner.config import RunConfig
from learner.evaluation.benchmarks.prompts import Prompt
from learner.evaluation.benchmarks.run import BenchmarkOptions, BenchmarkRun
from learner.evaluation.benchmarks.table import BENCHMARKS
from rewards.metrics.evaluation import MetricSettings
from rewards.metrics.samples import Samples
from tests.unit.learner.evaluation.benchmarks.files import MAKERS
from tests.unit.learner.evaluation.benchmarks.test_layouts import images_of, request


def made(name: str, folder: Path, count: int = 0) -> BenchmarkRun:
    options = BenchmarkOptions(
        benchmark=name, prompts=str(MAKERS[name](folder)), images_per_prompt=count
    )
    found = BenchmarkRun.of(options)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": "x"}, "--prompts is of --benchmark: say which"),
        ({"images_per_prompt": 2}, "--images-per-prompt is of --benchmark"),
        ({"benchmark": "gen-eval", "prompts": "x"}, "did you mean 'geneval'"),
        ({"benchmark": "geneval"}, "--benchmark geneval needs --prompts"),
        ({"benchmark": "geneval", "prompts": "x", "images_per_prompt": -1}, "1 to 50, found -1"),
        ({"benchmark": "geneval", "prompts": "x", "images_per_prompt": 51}, "1 to 50, found 51"),
        ({"benchmark": "dpg", "prompts": "x", "images_per_prompt": 2}, "takes 1 or 4, found 2"),
    ],
)
def test_impossible_options(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BenchmarkRun.of(BenchmarkOptions(**options))


def test_without_a_benchmark_there_is_none() -> None:
    assert BenchmarkRun.of(BenchmarkOptions()) is None


@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_prompts_become_the_captions_of_a_configuration(name: str, tmp_path: Path) -> None:
    run = made(name, tmp_path)
    file = run.texts_file(tmp_path / "out")
    run.write_texts(file)
    config = run.configured(RunConfig(), file)
    assert read_captions(Path(config.conditions.captions)) == run.texts
    assert config.conditions.encoder == DEFAULT_ENCODER
    assert config.evaluation.images == ""
    assert config.evaluation.num_images == len(run.prompts) * BENCHMARKS[name].images
    assert json.loads(file.read_text()) == run.texts  # what HPSv2's module reads of DrawBench


def test_a_configuration_can_be_checked_before_there_are_results(tmp_path: Path) -> None:
    run, out = made("geneval", tmp_path), tmp_path / "out"
    with run.written(run.configured(RunConfig(), run.texts_file(out))) as config:
        assert [each.text for each in config.conditions.conditions()] == run.texts
    assert not out.exists()


def test_figures_by_category(tmp_path: Path) -> None:
    prompts = [
        Prompt("a", 0, tags=(("category", "x"), ("challenge", "u"))),
        Prompt("b", 1, tags=(("category", "y"), ("challenge", "u"))),
        Prompt("c", 2, tags=(("category", "x"), ("challenge", "v"))),
    ]
    run = BenchmarkRun("partiprompts", BENCHMARKS["partiprompts"], tmp_path, prompts, 2)
    scores = {"clip": np.array([1, 10, 100, 2, 20, 200], np.float32)}
    samples = Samples(features={}, scores=scores, conditions=np.array([0, 1, 2, 0, 1, 2]))
    found = run.figures(samples, MetricSettings(bootstrap=200))
    assert {name: figure.value for name, figure in found.items()} == {
        "clip, category: x": 303 / 4,
        "clip, category: y": 15,
        "clip, challenge: u": 33 / 4,
        "clip, challenge: v": 150,
    }
    inside = found["clip, category: x"]
    assert 1 <= inside.low < inside.value < inside.high <= 200


@pytest.mark.parametrize(
    ("name", "count", "commands"),
    [("geneval", 0, 4), ("dpg", 0, 2), ("dpg", 1, 2), ("t2i-compbench", 0, 10), ("hpsv2", 0, 2),
     ("drawbench", 0, 1), ("partiprompts", 0, 0)],
)  # fmt: skip
def test_what_comes_next_for_two_rows(
    name: str, count: int, commands: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paths are absolute, since the commands run in another directory; a command that takes all
    rows is there once."""
    monkeypatch.chdir(tmp_path)
    run, out = made(name, tmp_path, count), Path("out")
    for row in ("base", "tuned"):
        with run.images(out, row) as writer:
            for index, prompt in enumerate(run.prompts):
                sent = request(index, prompt, run.count)
                writer.write(index, sent, images_of(index, run.count))
        assert run.images(out, row).all_complete
    run.write_next(out, ["base", "tuned"])
    about, *found = (out / "next.txt").read_text().splitlines()
    assert about.startswith(f"# {BENCHMARKS[name].title}")
    assert len(found) == commands
    for command in found:
        assert str(tmp_path / "out" / name) in command or "summary_scores" in command
    if name == "dpg":
        assert (
            found[0]
            == f"PIC_NUM={run.count} bash dpg_bench/dist_eval.sh {out.resolve()}/dpg/base 8"
        )
