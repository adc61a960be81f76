"""`learner.evaluate --benchmark` on a small text-to-image policy with random weights, inline."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cluster.messages import Condition
from cluster.model_files.torchvision_ops import ensure_torchvision
from cluster.program.console import REFUSED
from learner.config import dump
from learner.evaluate import main
from rewards.config import JudgeConfig
from rewards.scorers.clip import ClipReward
from tests.reduced import random_run
from tests.unit.learner.evaluation.benchmarks.files import GENEVAL, geneval
from tests.unit.learner.evaluation.benchmarks.test_layouts import as_geneval

WIDTH = 16  # of the small policy's captions


def encoder(folder: Path) -> Path:
    """A small T5 with a tokenizer of whole words, of GenEval's prompts here."""
    ensure_torchvision()
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = sorted({word for each in GENEVAL for word in str(each["prompt"]).split()})
    vocabulary = {word: at for at, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=len(vocabulary), d_model=WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2
    )
    transformers.T5EncoderModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a preset of the small policy, its encoder, and a file of GenEval."""
    folder = tmp_path_factory.mktemp("benchmark")
    networks = "package://learner.miniature/networks"
    judge = {
        "hps": {"enabled": True, "model": f"{networks}/preference", "pretrained": ""},
        "classifier": {"checkpoint": ""},
    }
    config = random_run("llamagen-t2i", folder, changes={"judge": judge})
    (folder / "small.yaml").write_text(dump(config))
    encoder(folder / "t5")
    geneval(folder)
    return folder


def evaluate(place: Path, out: Path, *options: str, prompts: Path | None = None) -> int:
    source = prompts or place / "evaluation_metadata.jsonl"
    return main(
        [
            *("--preset", str(place / "small.yaml"), "--inline", "--out", str(out)),
            *("--benchmark", "geneval", "--prompts", str(source), "--bootstrap", "50"),
            *("--conditions.encoder", str(place / "t5"), "--cfg-scales", "1", "4"),
            *("--sampler.num-gpus", "0", "--reward.num-gpus", "0"),
            *("--sampler.dtype", "float32", "--sampler.image-dtype", "float32", *options),
        ]
    )


def test_given_images_are_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images.npz"
    np.savez(images, arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    asked = ("--benchmark", "geneval", "--prompts", str(place / "evaluation_metadata.jsonl"))
    assert main([str(images), "--preset", str(place / "small.yaml"), *asked]) == REFUSED
    assert "--benchmark geneval samples policies, and" in capsys.readouterr().err


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_geneval(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Images are where its script looks, are those that were scored, and there again after they
    were lost; figures by tag; the same command again samples nothing."""
    out = tmp_path / "out"
    assert evaluate(place, out) == 0
    for row in ("base", "base-cfg-4"):
        found = list(as_geneval(out / "geneval" / row))
        assert len(found) == 4 * len(GENEVAL)
        assert {metadata["prompt"] for metadata, _ in found} == {g["prompt"] for g in GENEVAL}
    written = contents(out / "geneval")
    assert len({data for name, data in written.items() if name.endswith("png")}) == 2 * 12

    results = json.loads((out / "results.json").read_text())["rows"]
    assert [*results] == ["base", "base, CFG 4"]
    for row in results.values():
        figures = {name: each["value"] for name, each in row["figures"].items()}
        assert figures["images"] == 12
        for scorer in ("clip", "hps"):
            tags = [figures[f"{scorer}, tag: {each['tag']}"] for each in GENEVAL]
            assert np.mean(tags) == pytest.approx(figures[scorer], abs=1e-6)  # as many of each
            assert np.ptp(tags) > 0
    rescored = CLIP().mean_of(out / "geneval" / "base", "a red cup")
    assert rescored == pytest.approx(
        results["base"]["figures"]["clip, tag: color_attr"]["value"], abs=1e-5
    )
    assert "clip, tag: counting" in (out / "results.csv").read_text()
    following = (out / "next.txt").read_text()
    assert f"evaluate_images.py {out.resolve()}/geneval/base-cfg-4 --outfile" in following
    assert following.splitlines()[1] in capsys.readouterr().out

    before = (out / "results.json").read_text(), contents(out / "samples")
    (out / "geneval" / "base" / "00001" / "samples" / "0002.png").unlink()
    assert evaluate(place, out) == 0
    assert ((out / "results.json").read_text(), contents(out / "samples")) == before
    assert contents(out / "geneval") == written
    assert "sampling" not in capsys.readouterr().out

    shutil.rmtree(out / "samples" / "base")  # other samples, whose images are written again
    assert evaluate(place, out, "--cfg-scales", "1", "--seed", "7") == 0
    after = contents(out / "geneval")
    assert after.keys() == written.keys()
    changed = {name for name in after if after[name] != written[name]}
    assert changed == {name for name in after if name.startswith("base/") and name.endswith("png")}


class CLIP:
    """The judge's CLIP, on files."""

    def __init__(self) -> None:
        self.scorer = ClipReward(JudgeConfig().clip)

    def mean_of(self, folder: Path, prompt: str) -> float:
        paths = [path for metadata, path in as_geneval(folder) if metadata["prompt"] == prompt]
        pixels = np.stack([np.asarray(Image.open(path)) for path in sorted(paths)])
        return float(self.scorer(pixels, [Condition(text=prompt)] * len(paths)).mean())


def test_samples_of_other_prompts_are_not_taken(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, other = tmp_path / "out", tmp_path / "other.jsonl"
    assert evaluate(place, out) == 0
    lines = (place / "evaluation_metadata.jsonl").read_text().splitlines()
    other.write_text("\n".join(lines[::-1]))
    before = contents(out)
    assert evaluate(place, out, prompts=other) == REFUSED
    assert "holds other prompts than" in capsys.readouterr().err
    assert evaluate(place, out, "--seed", "7") == REFUSED
    assert "holds samples of something else (seed: 0, not 7)" in capsys.readouterr().err
    assert contents(out) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": ["--preset", "miniature"]}, "expected a policy of captions, found one of cla"),
        ({"prompt": "cup " * 130}, "1 of 3 are not read as written; the first is number 1: the te"),
        ({"prompt": ""}, "line 1: expected text, found ''"),
        ({"options": ["--num-images", "8"]}, "--num-images.* --images-per-prompt"),
        ({"options": ["--images-per-prompt", "60"]}, "--images-per-prompt: expected 1 to 50"),
    ],
)
def test_refusals(
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    message: str,
) -> None:
    """Before anything starts: status 2, and no directory of results."""
    prompts = tmp_path / "evaluation_metadata.jsonl"
    first, *rest = GENEVAL
    made = [first | {"prompt": change.get("prompt", first["prompt"])}, *rest]
    prompts.write_text("\n".join(map(json.dumps, made)))
    out = tmp_path / "out"
    assert evaluate(place, out, *change.get("options", ()), prompts=prompts) == REFUSED
    told = capsys.readouterr().err
    assert re.search(message, told)
    assert str(out) not in told  # it is not looked for there
    assert not out.exists()


def test_a_dry_run_of_a_preset_for_gpus_says_what_is_missing_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TESSERA_WEIGHTS", str(tmp_path / "weights"))
    out, prompts = tmp_path / "out", geneval(tmp_path)
    line = ["--preset", "llamagen-t2i", "--benchmark", "geneval", "--prompts", str(prompts)]
    assert main([*line, "--out", str(out), "--dry-run"]) == REFUSED
    shown = capsys.readouterr()
    assert "minutes of sampling on" in shown.out
    assert "llamagen-t2i-xl-stage1-256" in shown.err
    assert "Inception Score" not in shown.err  # a benchmark has none
    assert not out.exists()
