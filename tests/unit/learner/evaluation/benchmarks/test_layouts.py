"""Images in each layout, read back by a plain restatement of what the benchmark's script does."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cluster.errors import DataError, StorageError
from cluster.messages import Condition, SampleRequest, SamplingSpec
from learner.evaluation.benchmarks.images import BenchmarkImages
from learner.evaluation.benchmarks.prompts import CATEGORIES, LONGEST_NAME, Prompt
from learner.evaluation.benchmarks.table import BENCHMARKS, Written
from tests.unit.learner.evaluation.benchmarks.files import GENEVAL, MAKERS

SIDE = 8


def request(index: int, prompt: Prompt, count: int) -> SampleRequest:
    return SampleRequest(
        stream="evaluate",
        iteration=0,
        group=index,
        condition=Condition(text=prompt.text),
        num_rollouts=count,
        seed=0,
        spec=SamplingSpec(),
    )


def colour(index: int, k: int) -> tuple[int, int, int]:
    """Of image k of a prompt: recognisable in a JPEG file too."""
    return 20 * index, 20 * k, 128


def images_of(index: int, count: int, side: int = SIDE) -> np.ndarray:
    found = [np.full((side, side, 3), colour(index, k), np.uint8) for k in range(count)]
    return np.stack(found)


class Made:
    """A benchmark's images in a folder."""

    def __init__(self, name: str, folder: Path, count: int = 0) -> None:
        benchmark = BENCHMARKS[name]
        self.source = MAKERS[name](folder)
        self.prompts, self.count = benchmark.read(self.source), count or benchmark.images
        self.root = folder / "images" / "base"
        self.writer = BenchmarkImages(
            self.root, folder / "partial", benchmark, self.prompts, self.count
        )
        with self.writer:
            for index, prompt in reversed(list(enumerate(self.prompts))):  # any order
                sent = request(index, prompt, self.count)
                self.writer.write(index, sent, images_of(index, self.count))

    def number(self, prompt: str) -> int:
        return [each.text for each in self.prompts].index(prompt)


def pixel(path: Path | str, box: tuple[int, int, int, int] | None = None) -> tuple[int, ...]:
    """The one colour of an image, or of a part of it; JPEG rounds it by little."""
    image = Image.open(path).convert("RGB")
    pixels = np.asarray(image.crop(box) if box else image).reshape(-1, 3).astype(int)
    assert np.ptp(pixels, axis=0).max() <= 6
    return tuple(pixels.mean(0).round().astype(int))


def close(found: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    return max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= 4


def as_geneval(root: Path) -> Iterator[tuple[dict, Path]]:
    """evaluate_images.py: folders of digits, their metadata, images whose names are digits."""
    for name in os.listdir(root):
        if not (root / name).is_dir() or not name.isdigit():
            continue
        with open(root / name / "metadata.jsonl") as file:
            metadata = json.load(file)
        for image in os.listdir(root / name / "samples"):
            if re.match(r"\d+\.png", image):
                yield metadata, root / name / "samples" / image


def test_geneval(tmp_path: Path) -> None:
    made = Made("geneval", tmp_path)
    found = list(as_geneval(made.root))
    assert len(found) == 4 * len(GENEVAL)
    seen = set()
    for metadata, path in found:
        index = made.number(metadata["prompt"])
        assert metadata == GENEVAL[index]
        assert pixel(path) == colour(index, int(path.stem))
        seen.add((index, path.stem))
    assert len(seen) == len(found)


def as_dpg(root: Path, resolution: int, pictures: int) -> Iterator[tuple[str, int, tuple]]:
    """compute_dpg_bench.py: id up to the first dot; quarters row by row."""
    r = resolution
    crops = [(0, 0, r, r), (r, 0, 2 * r, r), (0, r, r, 2 * r), (r, r, 2 * r, 2 * r)][:pictures]
    for name in os.listdir(root):
        for k, crop in enumerate(crops):
            yield os.path.basename(name).split(".")[0], k, pixel(root / name, crop)


@pytest.mark.parametrize("count", [1, 4])
def test_dpg(tmp_path: Path, count: int) -> None:
    made = Made("dpg", tmp_path, count)
    ids = [prompt.name for prompt in made.prompts]
    found = list(as_dpg(made.root, SIDE, count))
    assert {(name, k) for name, k, _ in found} == {(n, k) for n in ids for k in range(count)}
    for name, k, seen in found:
        assert seen == colour(ids.index(name), k)
    sizes = {Image.open(made.root / name).size for name in os.listdir(made.root)}
    assert sizes == {(SIDE, SIDE) if count == 1 else (2 * SIDE, 2 * SIDE)}


def as_compbench(folder: Path) -> Iterator[tuple[int, str, Path]]:
    """All of its scripts: every file of samples/, ordered by its number, prompt before the _."""
    names = os.listdir(folder / "samples")
    names.sort(key=lambda name: int(name.split("_")[-1].split(".")[0]))
    for name in names:
        assert int(name.split("_")[1].split(".")[0]) == int(name.split("_")[-1].split(".")[0])
        number = int(name.split(".png")[0].split("_")[1])  # numeracy_eval.py
        yield number, name.split("_")[0], folder / "samples" / name


def test_compbench(tmp_path: Path) -> None:
    made = Made("t2i-compbench", tmp_path)
    assert sorted(os.listdir(made.root)) == ["color", "complex"]
    for part in ("color", "complex"):
        prompts = [prompt for prompt in made.prompts if prompt.part == part]
        found = list(as_compbench(made.root / part))
        assert [number for number, _, _ in found] == list(range(10 * len(prompts)))
        for number, text, path in found:
            assert text == prompts[number // 10].text  # what 3_in_1.py relies on
            assert pixel(path) == colour(made.number(text), number % 10)


def as_hpsv2(prompts: list[str], folder: Path) -> Iterator[tuple[str, Path]]:
    """hpsv2's BenchmarkDataset: the image of prompt i is 0000i.jpg; others are not looked for."""
    for index, prompt in enumerate(prompts):
        path = folder / f"{index:05d}.jpg"
        assert path.is_file()
        yield prompt, path


def test_hpsv2(tmp_path: Path) -> None:
    made = Made("hpsv2", tmp_path)
    styles = os.listdir(made.root)  # evaluate_benchmark takes every name there as a style
    assert sorted(styles) == ["anime", "concept-art", "paintings", "photo"]
    for style in styles:
        listed = json.loads((made.source / f"{style}.json").read_text())
        for prompt, path in as_hpsv2(listed, made.root / style):
            assert close(pixel(path), colour(made.number(prompt), 0))
            assert Image.open(path).format == "JPEG"


@pytest.mark.parametrize("count", [1, 3])
def test_drawbench_as_hpsv2_reads_it(tmp_path: Path, count: int) -> None:
    made = Made("drawbench", tmp_path, count)
    for prompt, path in as_hpsv2([each.text for each in made.prompts], made.root):
        assert close(pixel(path), colour(made.number(prompt), 0))
    assert len(os.listdir(made.root)) == count * len(made.prompts)


def test_partiprompts(tmp_path: Path) -> None:
    made = Made("partiprompts", tmp_path, 2)
    with open(made.source) as file:
        table = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    for index, row in enumerate(table):
        assert made.prompts[index].text == row["Prompt"]
        assert pixel(made.root / f"{index:05d}.png") == colour(index, 0)
        assert pixel(made.root / f"{index:05d}_1.png") == colour(index, 1)


@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_prompts_are_complete_when_all_their_files_are(tmp_path: Path, name: str) -> None:
    made = Made(name, tmp_path)
    assert all(map(made.writer.complete, range(len(made.prompts))))
    assert not (tmp_path / "partial").exists()
    files = sorted(path for path in made.root.rglob("*") if path.is_file())
    files[-1].unlink()
    missing = [at for at in range(len(made.prompts)) if not made.writer.complete(at)]
    assert len(missing) == 1


def test_a_prompt_as_long_as_a_name_may_be_is_written(tmp_path: Path) -> None:
    prompts = [Prompt("\u00e9" * (LONGEST_NAME // 2), 0, part="color")]
    root = tmp_path / "images"
    with BenchmarkImages(
        root, tmp_path / "partial", BENCHMARKS["t2i-compbench"], prompts, 2
    ) as writer:
        writer.write(0, request(0, prompts[0], 2), images_of(0, 2))
    assert [text for _, text, _ in as_compbench(root / "color")] == [prompts[0].text] * 2


def test_wrong_images_are_refused(tmp_path: Path) -> None:
    prompts = [Prompt("x", 0, name="x")]
    with pytest.raises(DataError, match="DPG-Bench takes 1 or 4 images of each prompt, not 3"):
        BenchmarkImages(tmp_path / "i", tmp_path / "p", BENCHMARKS["dpg"], prompts, 3)
    with BenchmarkImages(tmp_path / "i", tmp_path / "p", BENCHMARKS["dpg"], prompts, 4) as writer:
        with pytest.raises(DataError, match="cut into squares, but images have 8 x 4 pixels"):
            writer.write(0, request(0, prompts[0], 4), images_of(0, 4)[:, :4])
        with pytest.raises(DataError, match="expected 4 images, found 2"):
            writer.write(0, request(0, prompts[0], 2), images_of(0, 2))
        (tmp_path / "i").write_text("")
        with pytest.raises(StorageError, match=r"x.png could not be written"):
            writer.write(0, request(0, prompts[0], 4), images_of(0, 4))
    assert not (tmp_path / "p").exists()


IMAGES = "/o/images/base-cfg-2"
COMMANDS = {
    "geneval": [
        f"python evaluation/evaluate_images.py {IMAGES} --outfile "
        "geneval-base-cfg-2.jsonl --model-path OBJECT_DETECTOR_FOLDER",
        "python evaluation/summary_scores.py geneval-base-cfg-2.jsonl",
    ],
    "dpg": [f"PIC_NUM=4 bash dpg_bench/dist_eval.sh {IMAGES} 256"],
    "t2i-compbench": [
        "(cd BLIPvqa_eval && python BLIP_vqa.py --out_dir=/o/images/base-cfg-2/color)",
        "(cd BLIPvqa_eval && python BLIP_vqa.py --out_dir=/o/images/base-cfg-2/complex)",
        "(cd UniDet_eval && python 2D_spatial_eval.py --outpath=/o/images/base-cfg-2/complex "
        "--complex True)",
        "python CLIPScore_eval/CLIP_similarity.py --outpath=/o/images/base-cfg-2/complex "
        "--complex True",
        "(cd 3_in_1_eval && python 3_in_1.py --outpath=/o/images/base-cfg-2/complex)",
    ],
    "hpsv2": [
        'python -c \'import hpsv2; hpsv2.evaluate("/o/images/base-cfg-2", hps_version="v2.1")\''
    ],
    "partiprompts": [],
    "drawbench": [
        "python -m hpsv2.evaluation --data-type drawbench --data-path /o/prompts "
        "--image-path /o/images --checkpoint HPS_v2.1_compressed.pt"
    ],
}


@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_what_comes_next(name: str) -> None:
    benchmark = BENCHMARKS[name]
    made = Written(
        images=Path("/o/images/base-cfg-2"),
        texts=Path(f"/o/prompts/{name}.json"),
        size=256,
        count=benchmark.images,
        parts=("color", "complex") if name == "t2i-compbench" else (),
    )
    assert benchmark.commands(made) == COMMANDS[name]


def test_every_category_of_compbench_has_a_command() -> None:
    made = Written(Path("/i"), Path("/t.json"), 256, 10, CATEGORIES)
    commands = "\n".join(BENCHMARKS["t2i-compbench"].commands(made))
    assert all(f"=/i/{category}" in commands for category in CATEGORIES)
