"""A benchmark's options, configuration, figures by category, and what comes next."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from actors.models.llamagen import LlamaGenConfig
from actors.text.captions import read_captions
from actors.text.encoder import DEFAULT_ENCODER
from cluster.errors import ConfigError
from learner.config import RunConfig
from learner.evaluation.benchmarks.prompts import Prompt
from learner.evaluation.benchmarks.run import BenchmarkOptions, BenchmarkRun
from learner.evaluation.benchmarks.table import BENCHMARKS
from rewards.metrics.evaluation import MetricSettings
from tests.unit.learner.evaluation.benchmarks.files import MAKERS


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


def test_a_policy_of_classes_is_refused(tmp_path: Path) -> None:
    run = made("geneval", tmp_path)
    small = {"dim": 32, "num_layers": 1, "num_heads": 2, "grid": 2, "vocab_size": 8}
    run.check_policy(LlamaGenConfig(**small, caption_dim=16, caption_tokens=8), "base")
    with pytest.raises(ConfigError, match=r"expected a policy of captions.* 'base' takes classes"):
        run.check_policy(LlamaGenConfig(**small, num_classes=10), "base")


def test_figures_by_category(tmp_path: Path) -> None:
    prompts = [
        Prompt("a", 0, tags=(("category", "x"), ("challenge", "u"))),
        Prompt("b", 1, tags=(("category", "y"), ("challenge", "u"))),
        Prompt("c", 2, tags=(("category", "x"), ("challenge", "v"))),
    ]
    run = BenchmarkRun("partiprompts", BENCHMARKS["partiprompts"], tmp_path, prompts, 2)
    scores = {"clip": np.array([1, 2, 10, 20, 100, 200], np.float32)}
    found = run.figures(scores, MetricSettings(bootstrap=200))
    assert {name: figure.value for name, figure in found.items()} == {
        "clip, category: x": 303 / 4,
        "clip, category: y": 15,
        "clip, challenge: u": 33 / 4,
        "clip, challenge: v": 150,
    }
    inside = found["clip, category: x"]
    assert 1 <= inside.low < inside.value < inside.high <= 200


def test_commands_of_several_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths are absolute, since the commands run in another directory; one that takes all rows is
    named once."""
    monkeypatch.chdir(tmp_path)
    for name, count in {"hpsv2": 2, "drawbench": 1, "partiprompts": 0}.items():
        place = tmp_path / name
        place.mkdir()
        found = made(name, place).commands(Path("out"), ["base", "tuned"], 256)
        assert len(found) == count
        assert all(str(tmp_path / "out" / name) in command for command in found)
