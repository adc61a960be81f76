"""Charts as data: gaps, bands, labels, thinning; which panels are drawn; table, verdict, signs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from cluster.io.strict_json import dumps
from learner.reports import summary
from learner.reports.charts import Chart, Level, Line, shown_text, spread, thinned
from learner.reports.panels import PANELS, evaluation_charts, topics
from learner.reports.reading import RunData, read_run
from learner.runs.run_dir import RunDirectory
from rewards.metrics.figures import BETTER
from tests.unit.learner.reports.made_run import FIGURES, made_run

NAN = math.nan


def test_gaps_bands_and_labels() -> None:
    line = Line("a <b>", [1, 2, 3], [0.5, NAN, 0.25], 2, [0, 0, 0], [1, 1, 1])
    figure = Chart("k", "t", "", "", [line], [Level("base", 0.25)]).figure()
    low, high, mean = figure["data"]
    assert low["y"] == [0, 0, 0]
    assert high["fillcolor"] == "var(--c2, .16)"
    assert mean["y"] == [0.5, None, 0.25]
    assert mean["line"]["color"] == "var(--c2)"
    labels = figure["layout"]["annotations"]
    assert {label["text"] for label in labels} == {"a &lt;b&gt;", "base"}
    assert abs(labels[0]["yshift"] - labels[1]["yshift"]) == pytest.approx(13, abs=0.1)
    assert shown_text("&<>") == "&amp;&lt;&gt;"


def test_labels_are_moved_apart_only_where_they_overlap() -> None:
    moved = spread([0, 1, 100])
    assert moved == pytest.approx([-6, 6, 0], abs=1e-3)
    assert spread([0, 50]) == [0, 0]


def test_long_lines_are_averaged_and_keep_their_gaps() -> None:
    y = np.arange(10.0)
    y[4:6] = NAN
    found = thinned(Line("a", list(range(10)), y.tolist(), low=y.tolist(), high=y.tolist()), 5)
    assert found.x == [0.5, 2.5, 4.5, 6.5, 8.5]
    assert found.y[:2] == [0.5, 2.5]
    assert math.isnan(found.y[2])
    assert found.low == pytest.approx(found.y, nan_ok=True)


@pytest.fixture
def data(tmp_path: Path) -> RunData:
    return read_run(made_run(tmp_path / "run", 30))


def test_every_metric_of_a_panel_is_drawn_or_said(data: RunData) -> None:
    found = {topic.name: topic for topic in topics([data])}
    drawn = {chart.title for topic in found.values() for chart in topic.charts}
    said = "\n".join(line for topic in found.values() for line in topic.constant + topic.missing)
    measured = {key for row in data.metrics for key in row}
    for panel in PANELS:
        if panel.missing or measured & set(panel.lines.values()):
            assert panel.title in drawn or panel.title in said, panel.title
    assert {"clip", "hps", "loo_fid", "Do reward and judge agree?"} <= drawn
    assert "Flat groups: 0 in every iteration" in said


def test_every_space_of_the_rewards_has_charts(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", 6)
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    for number, row in enumerate(rows):
        added = {key.replace("fid/", "fid/clip/"): 2.0 + number * value
                 for key, value in row.items() if key.startswith("fid/")}  # fmt: skip
        row |= added | {"reward/loo_fid/clip": 0.1 * number}
    run.metrics.write_text("".join(dumps(row) + "\n" for row in rows))
    charts = {chart.title: chart for topic in topics([read_run(run)]) for chart in topic.charts}
    assert "lower is better" in charts["FID in the reward's features: clip"].unit
    assert "By how much each image lowers FID" in charts["loo_fid/clip"].note
    assert [*charts][:2] == ["clip", "hps"]  # the distribution rewards come after them


def test_several_runs_share_a_chart(tmp_path: Path, data: RunData) -> None:
    other = read_run(made_run(tmp_path / "other", 12))
    charts = {chart.title: chart for topic in topics([data, other]) for chart in topic.charts}
    lines = charts["clip"].lines
    assert [(line.name, len(line.x), line.colour) for line in lines] == [
        ("run", 30, 1), ("other", 12, 2),
    ]  # fmt: skip
    assert all(line.low is None for line in lines)
    assert charts["clip"].figure()["layout"]["annotations"] == []


def test_the_table_marks_the_best_by_its_direction() -> None:
    rows = {"base": {"fid": 20.0, "recall": 0.5, "entropy": 2.0, "images": 9.0},
            "tuned": {"fid": 10.0, "recall": 0.4, "entropy": NAN}}  # fmt: skip
    shown = summary.columns([rows], BETTER)
    assert [(c.key, c.arrow) for c in shown] == [("fid", "↓"), ("recall", "↑"), ("entropy", "")]
    cells = summary.table_cells(rows, shown)
    assert [(c.text, c.best) for c in cells["base"]] == [
        ("20.00", False), ("0.500", True), ("2.00", False)
    ]  # fmt: skip
    assert [(c.text, c.best) for c in cells["tuned"]] == [
        ("10.00", True), ("0.400", False), ("–", False)
    ]  # fmt: skip
    same = summary.table_cells({"a": {"fid": 1.0}, "b": {"fid": 1.0}}, shown[:1])
    assert not any(cell.best for row in same.values() for cell in row)


def test_every_space_has_columns_and_charts_of_its_own(tmp_path: Path) -> None:
    rows = {name: FIGURES | {"clip/fid": 0.5, "clip/recall": 0.4} for name in ("base", "tuned")}
    shown = summary.columns([rows], BETTER)
    assert [(c.key, c.heading, c.arrow) for c in shown][-4:] == [
        ("second/fid", "FID (2nd)", "↓"), ("second/coverage", "coverage (2nd)", "↑"),
        ("clip/fid", "FID (clip)", "↓"), ("clip/recall", "recall (clip)", "↑"),
    ]  # fmt: skip
    run = made_run(tmp_path / "run", 6)
    run.write_evaluation(rows)
    main, others = evaluation_charts([read_run(run)], BETTER)
    assert "clip" in {chart.key.removeprefix("judge-") for chart in main}
    assert {name: [chart.key for chart in charts] for name, charts in others.items()} == {
        "the judge's second features": ["judge-second/fid", "judge-second/coverage"],
        "the judge's features 'clip'": ["judge-clip/fid", "judge-clip/recall"],
    }


def test_users_scorers_have_columns_too() -> None:
    (column,) = summary.columns([{"base": {"aesthetic": 1.0}}], BETTER)
    assert (column.heading, column.arrow) == ("aesthetic", "")  # better which way? not known


def test_the_verdict_is_the_judges(data: RunData) -> None:
    found = summary.verdict(data, BETTER)
    assert found.mark == "mixed"
    assert found.headline == "FID fell 47 % (25.00 → 13.35); mixed: recall lost 39 %"
    assert "learner.evaluate RUN has intervals" in found.details[0]
    assert any("Worse in recall" in line for line in found.details)
    assert any("better than the base policy's with CFG 2 (17.50)" in line for line in found.details)


def test_a_worse_policy_is_called_so(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", 6)
    run.write_evaluation({"base": FIGURES, "tuned": FIGURES | {"fid": 30.0}})
    found = summary.verdict(read_run(run), BETTER)
    assert (found.headline, found.mark) == ("FID rose 20 % (25.00 → 30.00)", "worse")


@pytest.mark.parametrize(
    ("changed", "mark", "said"),
    [
        ({"fid": 20.0}, "better", "FID fell 20 % (25.00 → 20.00)"),
        ({"fid": 24.999}, "same", "FID is about the same (25.00 → 25.00)"),
        ({"fid": 24.999, "coverage": 0.18}, "worse",
         "FID is about the same (25.00 → 25.00); coverage lost 60 %"),
        ({"fid": 20.0, "second/fid": 0.9}, "mixed",
         "FID fell 20 % (25.00 → 20.00); mixed: FID (2nd) is worse"),
        ({"fid": 20.0, "clip/fid": 0.9, "clip/recall": 0.1}, "mixed",
         "FID fell 20 % (25.00 → 20.00); mixed: recall (clip) lost 83 %, FID (clip) is worse"),
        ({"fid": 30.0, "second/fid": 0.4}, "mixed",
         "FID rose 20 % (25.00 → 30.00); mixed: FID (2nd) is better"),
    ],
)  # fmt: skip
def test_a_verdict_only_where_nothing_speaks_against_it(
    tmp_path: Path, changed: dict[str, float], mark: str, said: str
) -> None:
    run = made_run(tmp_path / "run", 6)
    base = FIGURES | {"clip/fid": 0.8, "clip/recall": 0.6}
    run.write_evaluation({"base": base, "tuned": base | changed})
    found = summary.verdict(read_run(run), BETTER)
    assert (found.headline, found.mark) == (said, mark)


@pytest.mark.parametrize("evaluated", [True, False])
def test_without_the_last_evaluation(tmp_path: Path, evaluated: bool) -> None:
    run: RunDirectory = made_run(tmp_path / "run", 30)
    run.write_evaluation({"base": FIGURES} if evaluated else {})
    if not evaluated:
        run.evaluations.unlink()
    found = summary.verdict(read_run(run), BETTER)
    if evaluated:
        assert "the policy after 30 iterations" in found.details[0]
    else:
        assert found.headline.startswith("Mean reward clip 0.4")
        assert "first 10 against last 10 iterations" in found.details[1]
        assert {change.heading: change.mark for change in found.changes}["loo_fid"] == ""
        assert found.mark == ""


def test_signs_of_collapse(data: RunData) -> None:
    found = {sign.name: sign.state for sign in summary.indicators(data)}
    assert found == {
        "token entropy": "ok", "coverage": "ok", "recall": "watch", "coverage (2nd)": "ok",
        "flat groups": "ok",
    }  # fmt: skip


def test_no_signs_without_a_base(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", 3)
    run.metrics.write_text('{"iteration": 1, "policy/entropy": 1, "policy/base_entropy": 0}\n')
    assert "token entropy" not in {sign.name for sign in summary.indicators(read_run(run))}


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.12345, "0.123"), (7.5, "7.50"), (123.46, "123.5"), (12345.0, "12,345"), (NAN, "–"),
     (1e-7, "1.0e-07"), (0.0, "0.000"), (-0.5, "-0.500")],
)  # fmt: skip
def test_figures(value: float, text: str) -> None:
    assert summary.figure_text(value) == text
