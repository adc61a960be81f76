"""README's first claim by its own command: the default run as it is, and the table at its end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from learner.run import main
from learner.runs.records import TUNED


@pytest.mark.timeout(1200)
def test_tuned_without_guidance_is_better_than_the_base_with_it(tmp_path: Path) -> None:
    """By margins that other last bits do not close; rounding moves accuracy by about .01."""
    one_thread = ["--sampler.num-threads", "1", "--learner.num-threads", "1"]  # of a busy machine
    assert main(["--inline", *one_thread, "--run-dir", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "evaluation.json").read_text())
    tuned, guided, base = rows[TUNED], rows["base, CFG 2"], rows["base"]
    assert tuned["fid"] < 0.7 * guided["fid"]
    assert tuned["density"] > guided["density"] + 0.05
    for figure in ("accuracy", "coverage", "recall"):
        assert tuned[figure] > guided[figure] - 0.03, figure
    assert tuned["accuracy"] > base["accuracy"] + 0.1
