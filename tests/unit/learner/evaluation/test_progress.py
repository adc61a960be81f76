"""What an evaluation tells other commands while it runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cluster.control.control_actor import Progress
from cluster.fleet import InlineFleet
from learner.evaluate import main

OPTIONS = ["--preset", "miniature", "--inline", "--bootstrap", "2", "--evaluation.neighbours", "2"]


def test_an_evaluation_says_how_many_images_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for index, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3))):
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index:02d}.png")
    told: list[Progress] = []
    monkeypatch.setattr(InlineFleet, "report_progress", lambda fleet, said: told.append(said))
    out = tmp_path / "out"
    assert main([str(folder), *OPTIONS, "--num-images", "12", "--out", str(out)]) == 0
    assert [(said.unit, said.done, said.iterations) for said in told] == [
        ("image", 0, 12),
        ("image", 12, 12),
    ]
    assert told[-1].directory == str(out)
    assert told[-1].metrics["time/images_per_s"] == pytest.approx(1 / told[-1].seconds)
    assert told[-1].eta_s == 0
