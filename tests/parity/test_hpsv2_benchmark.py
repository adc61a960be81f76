"""The hpsv2 package's own benchmark on images that we wrote in its layout, with random weights.

Needs the package with all of its requirements, of which the scorers need few.
"""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cluster.messages import Condition, SampleRequest, SamplingSpec
from learner.evaluation.benchmarks.images import BenchmarkImages
from learner.evaluation.benchmarks.prompts import STYLES, Prompt
from learner.evaluation.benchmarks.table import BENCHMARKS
from rewards.scorers.hpsv2 import HpsConfig, HpsReward
from rewards.scorers.hpsv2_package import import_hpsv2
from tests.parity import text_image
from tests.parity.text_image import TINY

REQUIRED = ("hpsv2", "einops", "pandas", "braceexpand", "webdataset")
pytestmark = [
    pytest.mark.skipif(
        not all(map(importlib.util.find_spec, REQUIRED)),
        reason=f"not installed together: {', '.join(REQUIRED)}",
    ),
    pytest.mark.filterwarnings("ignore"),  # the package's
]
PROMPTS = ("a red car in the snow", "Two cats and/or 3 dogs", "a barn")
BOUND = 6e-3  # the package prints two digits


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hpsv2")
    text_image.register_tiny(folder)
    text_image.make_checkpoint(TINY, folder / "tiny.pt")
    text_image.prepare_package(TINY, folder, folder / "root")
    return folder / "tiny.pt"


def run_package(
    mode: str, images: Path, prompts: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its `evaluate`, with the small architecture in ViT-H-14's place."""
    package = import_hpsv2("hpsv2.evaluation")
    monkeypatch.setattr(package, "model_name", TINY)
    monkeypatch.setattr(package, "model_dict", {})
    monkeypatch.setattr(package, "device", "cpu")
    monkeypatch.setattr(package, "root_path", str(checkpoint.parent))
    package.evaluate(mode, str(images), str(prompts), str(checkpoint))


def write(name: str, prompts: list[Prompt], folder: Path) -> Path:
    images = folder / "images" / "tuned"
    made = text_image.pictures(len(prompts), 256, 256)
    benchmark = BENCHMARKS[name]
    with BenchmarkImages(images, folder / "partial", benchmark, prompts, 1) as writer:
        for at, prompt in enumerate(prompts):
            sent = SampleRequest(
                stream="evaluate",
                iteration=0,
                group=at,
                condition=Condition(text=prompt.text),
                num_rollouts=1,
                seed=0,
                spec=SamplingSpec(),
            )
            writer.write(at, sent, made[at : at + 1])
    return images


def our_scores(name: str, images: Path, prompts: list[Prompt], checkpoint: Path) -> np.ndarray:
    """100 times our scores of the files, prompt by prompt."""
    files = [images / path for each in prompts for path in BENCHMARKS[name].layout(each, 1)]
    scorer = HpsReward(HpsConfig(model=TINY, pretrained=str(checkpoint)))
    pixels = np.stack([np.asarray(Image.open(file)) for file in files])
    return 100 * scorer(pixels, [Condition(text=each.text) for each in prompts])


def test_styles(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every image is found, and the printed means are those of our scores of the same files."""
    source = tmp_path / "prompts"
    source.mkdir()
    for style in STYLES:
        texts = [f"{style}: {prompt}" for prompt in PROMPTS]
        (source / f"{style}.json").write_text(json.dumps(texts))
    prompts = BENCHMARKS["hpsv2"].read(source)
    images = write("hpsv2", prompts, tmp_path)
    run_package("benchmark", images, source, checkpoint, monkeypatch)
    printed = capsys.readouterr().out
    assert "missing image" not in printed
    found = {name: float(mean) for name, mean in re.findall(r"tuned (\S+) +(-?[\d.]+)", printed)}
    ours = our_scores("hpsv2", images, prompts, checkpoint)
    styles = np.array([prompt.part for prompt in prompts])
    expected = {style: ours[styles == style].mean() for style in STYLES}
    assert found == pytest.approx(expected | {"Average": ours.mean()}, abs=BOUND)
    assert np.ptp(list(expected.values())) > 10 * BOUND


def test_drawbench(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As above; it reads the prompts from the list that we write, drawbench.json."""
    texts = tmp_path / "drawbench.json"
    texts.write_text(json.dumps(PROMPTS))
    prompts = BENCHMARKS["drawbench"].read(texts)
    images = write("drawbench", prompts, tmp_path)
    run_package("drawbench", images.parent, tmp_path, checkpoint, monkeypatch)
    printed = capsys.readouterr().out
    assert "missing image" not in printed
    (mean,) = re.findall(r"tuned\s+(-?[\d.]+)", printed)
    ours = our_scores("drawbench", images, prompts, checkpoint)
    assert float(mean) == pytest.approx(ours.mean(), abs=1e-2)
