"""Curves of the report."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from learner import report


@pytest.mark.parametrize("further", [0, 1, 2])
def test_every_panel_is_drawn(further: int, monkeypatch: pytest.MonkeyPatch) -> None:
    added = {f"further {number}": {"rate": "loss/lr"} for number in range(further)}
    monkeypatch.setattr(report, "PANELS", {**report.PANELS, **added})
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **options: drawn.append(self))
    report.curves([{"iteration": 1, "loss/lr": 0.1}, {"iteration": 2, "loss/lr": 0.2}])
    axes = drawn[0].axes
    assert [each.get_title() for each in axes] == list(report.PANELS)
    assert all(each.lines for each in axes[4:])
