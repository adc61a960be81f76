"""The page as text: what is damaged, hostile, missing or very long."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from cluster.io.starts import END, HOW, START, append_event
from learner.reports import page as page_module
from learner.reports.charts import Chart
from learner.reports.extremes import Decoding
from learner.reports.page import LARGEST, embedded, library, render
from learner.reports.reading import command_to_repeat, differing, read_run, state_of, times_of
from learner.run import parse
from learner.runs.run_dir import RunDirectory
from tests.small_run import small_config
from tests.unit.learner.reports.made_run import made_run, metrics, write_gallery


def rendered(*runs: RunDirectory) -> str:
    return render(list(runs), Decoding(60.0))


def test_a_run_that_has_just_started_says_what_is_missing(tmp_path: Path) -> None:
    run = RunDirectory.create(str(tmp_path / "run"), small_config())
    page = rendered(run)
    for line in ("Nothing was learned yet", "--evaluation.num-images above 0",
                 "--output.gallery-every", "rewards appear after the first iteration",
                 "trace.json has the spans", "Token entropy: it appears after",
                 "Nearest real images appear", "--output.rollouts", "run.log has no warning",
                 "starts.jsonl, which this run does not have"):  # fmt: skip
        assert line in page, line
    assert "incomplete" in page


def test_damaged_files_are_notes(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", 9)
    lines = run.metrics.read_bytes().splitlines()
    run.metrics.write_bytes(b"\n".join([*lines[:4], b"\xff{", b"[1]", *lines[4:], b'{"itera']))
    run.evaluation.write_text("{")
    run.trace.write_text("nothing\nat all\n")
    (run.gallery / "tuned.png").write_bytes(b"no image")
    (run.gallery / "base.json").write_text('{"cell": 3}')
    for file in run.rollouts.iterdir():
        file.write_bytes(b"PAR1")
    run.config.write_text(run.config.read_text() + "edited: true\n")
    data = read_run(run)
    assert len(data.metrics) == 9
    page = rendered(run)
    for line in ("metrics.jsonl: 2 damaged lines", "evaluation.json is damaged",
                 "gallery/tuned.png is damaged", "gallery/base.json is damaged",
                 "trace.json: 2 damaged events", "none of the newest files of rollouts",
                 "config.yaml: "):  # fmt: skip
        assert line in page, line


def test_what_users_write_is_text(tmp_path: Path) -> None:
    made_run(tmp_path / "run", 6)
    named = tmp_path / os.fsdecode(b"<script>\xff")
    (tmp_path / "run").rename(named)
    run = RunDirectory(named)
    rows = [metrics(1) | {"reward/</script><b>": 0.5, "policy/entropy": None}, metrics(2)]
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run.path / "starts.jsonl").write_text('{"event": "start", "command": "x <script>"}\n[]\n{')
    page = rendered(run)
    assert "<b>broke</b>" not in page
    assert "x &lt;script&gt;" in page
    assert len(re.findall("<script", page)) == 4  # theme, data, library, program
    data = page.split('id="data">')[1].split("</script>")[0]
    assert set("<>&").isdisjoint(data)
    assert json.loads(data)["figures"].keys() >= {"curve-reward-</script><b>"}
    page.encode("utf-8")


def test_data_cannot_end_its_element() -> None:
    assert json.loads(embedded({"</script>": float("nan")})) == {"</script>": None}
    assert "<" not in embedded("</script><!--")


def test_nothing_is_requested(tmp_path: Path) -> None:
    page = rendered(made_run(tmp_path / "run", 6)).replace(library(), "")
    assert "default-src 'none'" in page
    assert re.findall(r"https?://", page) == []
    assert re.findall(r"<(?:link|img|script)[^>]*(?:src|href)=\"(?!data:)", page) == []


def test_a_long_run_of_large_galleries_stays_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np
    from PIL import Image

    run = made_run(tmp_path / "run", 6)
    run.metrics.write_text("".join(json.dumps(metrics(at)) + "\n" for at in range(1, 4001)))
    noise = np.random.default_rng(0).integers(0, 255, (400, 400, 3), np.uint8)
    for at in range(1, 13):
        Image.fromarray(noise).save(run.gallery / f"step_{at:06d}.png")
    monkeypatch.setattr(page_module, "LARGEST", 4_200_000)
    page = rendered(run)
    assert len(page.encode()) <= 4_200_000
    assert "Each point is the mean of 8 iterations" in page
    shown = json.loads(page.split('id="data">')[1].split("</script>")[0])
    curve = shown["figures"]["curve-token-entropy"]["data"][0]
    assert len(curve["x"]) == len(curve["y"]) == 500
    first = np.mean([metrics(at)["policy/entropy"] for at in range(1, 9)])
    assert curve["y"][0] == pytest.approx(first, rel=1e-4)
    steps = [sheet["step"] for sheet in shown["galleries"][0]["sheets"]]
    assert steps[0] == 0
    assert steps[-1] == 12
    assert len(page.encode()) <= LARGEST


def test_what_to_do_next(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", 6)
    content = {"figure": "fid", "value": 8.5, "step": 4, "checkpoint": "checkpoints/step_000004"}
    run.best.write_text(json.dumps(content))
    page = rendered(run)
    assert "checkpoints/step_000004: fid 8.50" in page
    assert "--resume" not in page
    append_event(run.path, START, {})
    append_event(run.path, END, {HOW: "stopped"})
    run.best.write_text("{}")
    page = rendered(run)
    assert f"--resume --run-dir {run.path}" in page
    assert "best.json is damaged" in page


@pytest.mark.parametrize(
    ("events", "owner", "state"),
    [
        ([], "", "finished"),  # of an earlier version: by its records
        ([(START, {})], "", "killed"),
        ([(START, {})], "process 7", "running"),
        ([(START, {}), (END, {HOW: "finished"})], "", "finished"),
        ([(START, {}), (END, {HOW: "stopped"})], "", "stopped"),
        ([(START, {}), (END, {HOW: "failed", "detail": "no GPU"})], "", "failed"),
        ([(START, {}), (END, {HOW: "stopped"}), (START, {"resumed": True})], "", "killed"),
    ],
)
def test_how_a_run_is(tmp_path: Path, events: list, owner: str, state: str) -> None:
    run = made_run(tmp_path / "run", 6)
    for event, content in events:
        append_event(run.path, event, content)
    found, sentence = state_of(read_run(run), owner)
    assert found == state
    assert sentence.startswith("6 of 6 iterations done")
    assert ("no GPU" in sentence) == (state == "failed")


def test_times_are_added_over_resumes(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", 6)
    first, seconds = times_of(read_run(run))
    assert first is None
    assert seconds == pytest.approx(sum(metrics(at)["time/iteration"] for at in range(1, 7)))
    times = [("start", "00:00:00"), ("end", "00:10:00"), ("start", "05:00:00"), ("end", "05:01:00")]
    lines = [{"event": e, "time": f"2026-11-29T{t}+00:00"} for e, t in times]
    (run.path / "starts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, seconds = times_of(read_run(run))
    assert first is not None
    assert (first.hour, seconds) == (0, 660.0)


def test_early_versions_counted_from_zero(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", 6)
    rows = [metrics(at) | {"iteration": at - 1} for at in range(1, 7)]
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_run(run).iterations == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("start", "command"),
    [
        ({"command": "python -m learner.run --seed 7"}, "python -m learner.run --seed 7"),
        ({"command": "p --run-dir 'a b' --seed 7 --auto-resume"}, "p --seed 7"),
        ({"command": "p --run_dir=x --seed 7"}, "p --seed 7"),
        ({"command": "p --resume"}, None),
        ({"command": "p --seed 7", "resumed": True}, None),
        ({"command": "p 'cut"}, None),
    ],
)
def test_the_command_that_repeats_a_run(
    tmp_path: Path, start: dict[str, object], command: str | None
) -> None:
    run = made_run(tmp_path / "run", 6, seed=7)
    append_event(run.path, START, start)
    again = f"python -m learner.run --preset {run.config}"
    assert command_to_repeat(read_run(run)) == (command or again)
    if command is None:
        assert parse(["--preset", str(run.config)])[1] == run.read_config()


def test_odd_data_costs_its_part_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made_run(tmp_path / "run", 6)
    hardware = {"gpus": 3, "hosts": 4, "cluster_cpus": None}
    times = ["2026-11-29T00:00:00", "2026-11-29T00:10:00+00:00"]
    append_event(run.path, START, {"hardware": hardware, "time": times[0]})
    append_event(run.path, END, {HOW: "finished", "time": times[1]})
    run.config.write_text(run.config.read_text() + "seed: 2026-99-99\n")
    monkeypatch.setattr(page_module.extremes, "section", lambda *_: {}["no such key"])
    page = rendered(run)
    assert "hardware: cannot be shown (TypeError" in page
    assert "config.yaml cannot be read as YAML" in page
    assert "best and worst images: cannot be shown (KeyError" in page
    assert "took 0:10:00" in page
    run.config.unlink()
    assert "problems with the run" in rendered(run)


def test_a_tuned_gallery_is_of_its_own_iteration(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", 6)
    run.metrics.write_text("".join(json.dumps(metrics(at)) + "\n" for at in range(1, 10)))
    write_gallery(run.gallery / "nearest.png", 6)
    data = json.loads(rendered(run).split('id="data">')[1].split("</script>")[0])
    sheets = [(sheet["step"], sheet["title"]) for sheet in data["galleries"][0]["sheets"]]
    assert sheets[-2:] == [(6, "tuned policy, after 6 iterations"), (-1, "after 6 iterations")]


def test_many_runs_share_what_the_text_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [made_run(tmp_path / f"run{at}", 6) for at in range(8)]
    whole = rendered(*runs)
    sheets = json.loads(whole.split('id="data">')[1].split("</script>")[0])["galleries"]
    assert [len(gallery["sheets"]) for gallery in sheets] == [3] * 8
    monkeypatch.setattr(page_module, "LARGEST", len(library()) + 60_000)
    assert rendered(*runs).count("no room for galleries on this page") == 8


def test_charts_of_names_that_look_alike_are_apart() -> None:
    plots = page_module.Plots({})
    chart = Chart("a", "A", "", "", [])
    assert plots.card("reward-\ud800", chart)["key"] != plots.card("reward-\ud800", chart)["key"]


def test_differences_of_configurations() -> None:
    found = differing({"a": {"x": 1, "y": {"z": [1]}}, "b": {"x": 1, "y": {"z": [2]}, "w": {}}})
    assert found == {"y.z": {"a": [1], "b": [2]}, "w": {"a": None, "b": {}}}
