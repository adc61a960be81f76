"""Every bench that needs no Ray starts, with its smallest options, and prints its figures."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.bench_runs import ALONE, ON_RAY, SMALLEST, all_benches, python_path_without, run_bench


def test_every_bench_is_started_by_a_test() -> None:
    assert all_benches() == {*SMALLEST, *ON_RAY, *ALONE}


@pytest.mark.parametrize("name", SMALLEST)
def test_it_starts_and_prints_figures(
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    if name == "hpsv2" and importlib.util.find_spec("hpsv2") is None:
        pytest.skip("the hpsv2 package is not installed")
    if name == "gpu":  # a borrowed machine lacks these
        without = python_path_without(tmp_path, "ray", "transformers", "matplotlib", "tensorboard")
        monkeypatch.setenv("PYTHONPATH", without)
    figures = run_bench(name, SMALLEST[name], monkeypatch, capsys)
    assert all(float(value) == float(value) for value in figures.values())
