"""Benches with their smallest options, as tests start them: in this process, as `python -m` does.

What they set for the whole process is undone after them.
"""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

from rewards.scorers.isolation import Isolation

RESULT = re.compile(r"^RESULT (\w+)\.(\w+)=(\S+)(?: expected=\S+)?$", re.MULTILINE)
SMALLEST = {
    "checkpoint": "--parameters 200000 --mib-per-s 1000",
    "commits": "--dim 64 --counts 4 16 --iterations 4 --seed-images 300 --window 900 --plain 1",
    "decode": "--size tiny --batch 1 --grid 2 --repeats 1 --cfg-scales 1 2",
    "dispatch": "--waiting 32 --workers 4",
    "evaluation": "--images 60 --real 50 --dim 8 --spatial 6 --logits 5 --classes 6 --bootstrap 20",
    "gpu": "--device cpu --tiny",
    "hpsv2": "--small --images 1 --rounds 1 --calls 1 --size 32",
    "iteration": "--iterations 1 --groups 1 --rollouts 2",
    "loo_fid": "--dim 16 --count 4 --history 32 --timed 1 --repeats 1 --checked 1",
    "reward_noise": "--smallest",
    "simulation": "--samplers 2 --together 2 --groups 4",
}
ON_RAY = {
    "broadcast": "--megabytes 8 --samplers 1 --rounds 1",
    "driver": "--groups 2 8 --samplers 1 --servers 1",
    "pipeline": "--only driver",
    "reward_server": "--servers 1 --groups 2 --seconds-per-image 0.001",
}
ALONE = {
    "main_job": "--num-samplers 1 --iterations 1 --evaluation.num-images 0",
    "links": "--megabytes 8 --samplers 1 --gigabits 1 --rounds 1 --ways pieces",
    "planner": "--only samplers --counts 1 --iterations 4",
}
"""Start whole runs, or clusters."""


def run_bench(
    name: str, options: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> dict[str, str]:
    """Run one; returns its figures."""
    monkeypatch.setattr(sys, "argv", [f"tests/bench/{name}.py", *options.split()])
    monkeypatch.delitem(sys.modules, f"tests.bench.{name}", raising=False)
    capsys.readouterr()
    with Isolation()(0):
        runpy.run_module(f"tests.bench.{name}", run_name="__main__", alter_sys=True)
    found = RESULT.findall(capsys.readouterr().out)
    assert found, "no RESULT line"
    assert {bench for bench, _, _ in found} == {name}
    return {figure: value for _, figure, value in found}


WITHOUT = """
from importlib.machinery import PathFinder

found = PathFinder.find_spec


def find_spec(cls, name, path=None, target=None):
    return None if name.partition(".")[0] in {names} else found(name, path, target)


PathFinder.find_spec = classmethod(find_spec)
"""


def python_path_without(folder: Path, *packages: str) -> str:
    """A PYTHONPATH under which Python finds none of the packages.

    Args:
        folder: for the file that sees to it.
    """
    (folder / "sitecustomize.py").write_text(WITHOUT.format(names=packages))
    return str(folder)


def all_benches() -> set[str]:
    folder = Path(__file__).parent / "bench"
    folders = {file.parent.name for file in folder.glob("*/__main__.py")}
    return {file.stem for file in folder.glob("*.py")} - {"__init__", "measuring"} | folders
