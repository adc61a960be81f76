"""The benchmarks: their files of prompts, numbers of images, layouts, and what comes next.

Commands and names are those of the repositories at the commits that `learner/benchmarks.md` names.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from learner.evaluation.benchmarks import layouts
from learner.evaluation.benchmarks.layouts import Layout
from learner.evaluation.benchmarks.prompts import (
    Prompt,
    read_compbench,
    read_dpg,
    read_drawbench,
    read_geneval,
    read_hpsv2,
    read_parti,
)


@dataclass(frozen=True)
class Written:
    """What a benchmark's commands need to know of the images."""

    images: Path
    """Folder of a policy's images, in the benchmark's layout; beside it are those of others."""
    texts: Path
    """JSON list of the prompts."""
    size: int
    """Side of an image, pixels."""
    count: int
    """Images of each prompt."""
    parts: Sequence[str]
    """The prompts' parts, in order; none where there are no parts."""


@dataclass(frozen=True)
class Benchmark:
    """A benchmark of text-to-image policies."""

    title: str
    read: Callable[[Path], list[Prompt]]
    layout: Layout
    images: int
    """Images of each prompt, by default."""
    commands: Callable[[Written], list[str]]
    """Shell commands that come next; none where people are the judges."""
    counts: tuple[int, ...] = ()
    """Numbers of images that the layout can hold; empty: any."""
    repository: str = ""
    """Where the commands run."""


def _geneval(made: Written) -> list[str]:
    results = shlex.quote(f"geneval-{made.images.name}.jsonl")
    return [
        f"python evaluation/evaluate_images.py {_quoted(made.images)} --outfile {results} "
        "--model-path OBJECT_DETECTOR_FOLDER",
        f"python evaluation/summary_scores.py {results}",
    ]


def _dpg(made: Written) -> list[str]:
    return [f"PIC_NUM={made.count} bash dpg_bench/dist_eval.sh {_quoted(made.images)} {made.size}"]


_BLIP = "(cd BLIPvqa_eval && python BLIP_vqa.py --out_dir={})"
_CLIP = "python CLIPScore_eval/CLIP_similarity.py --outpath={}"
_OBJECTS = "(cd UniDet_eval && python {}.py --outpath={{}}{})"
_COMPBENCH = {
    **dict.fromkeys(("color", "shape", "texture"), (_BLIP,)),
    "spatial": (_OBJECTS.format("2D_spatial_eval", ""),),
    "3d_spatial": (_OBJECTS.format("3D_spatial_eval", ""),),
    "numeracy": (_OBJECTS.format("numeracy_eval", ""),),
    "non_spatial": (_CLIP,),
    "complex": (
        _BLIP,
        _OBJECTS.format("2D_spatial_eval", " --complex True"),
        f"{_CLIP} --complex True",
        "(cd 3_in_1_eval && python 3_in_1.py --outpath={})",
    ),
}
"""Commands of each category. Its folder must have no slash at the end: 3D_spatial_eval.py takes the
part after the last slash as a folder's name, and would look for depth maps in another place than it
writes them."""


def _compbench(made: Written) -> list[str]:
    return [
        command.format(_quoted(made.images / part))
        for part in made.parts
        for command in _COMPBENCH[part]
    ]


def _hpsv2(made: Written) -> list[str]:
    code = f'import hpsv2; hpsv2.evaluate("{made.images}", hps_version="v2.1")'
    return [f"python -c {shlex.quote(code)}"]


def _drawbench(made: Written) -> list[str]:
    return [
        f"python -m hpsv2.evaluation --data-type drawbench --data-path {_quoted(made.texts.parent)}"
        f" --image-path {_quoted(made.images.parent)} --checkpoint HPS_v2.1_compressed.pt"
    ]


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _without_script(made: Written) -> list[str]:
    del made
    return []


BENCHMARKS = {
    "geneval": Benchmark(
        title="GenEval",
        read=read_geneval,
        layout=layouts.geneval,
        images=4,
        commands=_geneval,
        repository="djghosh13/geneval",
    ),
    "dpg": Benchmark(
        title="DPG-Bench",
        read=read_dpg,
        layout=layouts.dpg,
        images=4,
        counts=(1, 4),
        commands=_dpg,
        repository="TencentQQGYLab/ELLA",
    ),
    "t2i-compbench": Benchmark(
        title="T2I-CompBench",
        read=read_compbench,
        layout=layouts.compbench,
        images=10,
        commands=_compbench,
        repository="Karine-Huang/T2I-CompBench",
    ),
    "hpsv2": Benchmark(
        title="HPSv2's benchmark",
        read=read_hpsv2,
        layout=layouts.numbered("jpg"),
        images=1,
        commands=_hpsv2,
        repository="tgxs002/HPSv2",
    ),
    "partiprompts": Benchmark(
        title="PartiPrompts",
        read=read_parti,
        layout=layouts.numbered("png"),
        images=1,
        commands=_without_script,
        repository="google-research/parti",
    ),
    "drawbench": Benchmark(
        title="DrawBench",
        read=read_drawbench,
        layout=layouts.numbered("jpg"),
        images=1,
        commands=_drawbench,
        repository="tgxs002/HPSv2",
    ),
}
