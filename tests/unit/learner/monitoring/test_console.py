from __future__ import annotations

from learner.monitoring.console import fit


def test_figures_that_do_not_fit_are_left_out() -> None:
    parts = ["clip 0.5", "hps 0.7", "FID 2"]
    assert fit(parts, 80) == "clip 0.5  hps 0.7  FID 2"
    assert fit(parts, 17) == "clip 0.5  hps 0.7"
    assert fit(parts, 16) == "clip 0.5"
    assert fit(parts, 3) == ""
