"""Small files in the formats of the benchmarks, with prompts of our own."""

from __future__ import annotations

import json
from pathlib import Path

GENEVAL = [
    {"tag": "single_object", "include": [{"class": "cup", "count": 1}], "prompt": "a cup"},
    {"tag": "counting", "include": [{"class": "dog", "count": 2}],
     "exclude": [{"class": "dog", "count": 3}], "prompt": "two dogs"},
    {"tag": "color_attr", "include": [{"class": "cup", "count": 1, "color": "red"}],
     "prompt": "a red cup"},
]  # fmt: skip
PARTI = (
    "Prompt\tCategory\tChallenge\tNote\n"
    "stone\tAbstract\tBasic\t\n"
    '"H E L L O" in thick letters\tIllustrations\tWriting & Symbols\tA "quoted" note\n'
    "three dogs, a cat and 1/2 an apple\tAnimals\tQuantity\t\n"
)
DRAWBENCH = 'Prompts,Category\nA red car.,Colors\n"A red car, and a blue dog.",Conflicting\n'


def geneval(folder: Path) -> Path:
    path = folder / "evaluation_metadata.jsonl"
    path.write_text("".join(f"{json.dumps(each)}\n" for each in GENEVAL))
    return path


def dpg(folder: Path) -> Path:
    place = folder / "prompts"
    place.mkdir()
    for name, text in {"0": "A barn.\n", "whoops12": "A \u00fcber long text\nof two lines.",
                       "COCOval2014000000000285": "A bear."}.items():  # fmt: skip
        (place / f"{name}.txt").write_text(text, encoding="utf-8")
    return place


def compbench(folder: Path) -> Path:
    place = folder / "dataset"
    place.mkdir()
    (place / "color_val.txt").write_bytes(b"a green bench\r\nA red hat. And a dog")
    (place / "color_train.txt").write_text("not read\n")
    (place / "complex_val.txt").write_bytes(b"The red hat was on top.\r\nBig, bad\r\n")
    return place


def hpsv2(folder: Path) -> Path:
    place = folder / "benchmark"
    place.mkdir()
    for style in ("anime", "concept-art", "paintings", "photo", "drawbench"):
        (place / f"{style}.json").write_text(json.dumps([f"{style} of a/b", f"{style} two"]))
    return place


def partiprompts(folder: Path) -> Path:
    path = folder / "PartiPrompts.tsv"
    path.write_text(PARTI)
    return path


def drawbench(folder: Path) -> Path:
    path = folder / "DrawBench.csv"
    path.write_text(DRAWBENCH)
    return path


MAKERS = {"geneval": geneval, "dpg": dpg, "t2i-compbench": compbench, "hpsv2": hpsv2,
          "partiprompts": partiprompts, "drawbench": drawbench}  # fmt: skip
