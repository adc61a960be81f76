"""Galleries within their bytes, sidecars, best and worst rollouts, the timeline."""

from __future__ import annotations

import base64
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cluster.spans import Span
from learner.monitoring.timeline import Trace
from learner.reports import extremes, timeline
from learner.reports.images import (
    LEAST_SHEET,
    Sheet,
    encode,
    encode_single,
    encoded_sheets,
    gallery_sheets,
)
from learner.reports.reading import read_run
from learner.rollouts.parquet import write_rollouts
from tests.unit.learner.reports.made_run import made_run, rollouts


def opened(source: str) -> Image.Image:
    kind, _, data = source.partition(";base64,")
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert kind == f"data:image/{image.format.lower()}"
    return image


def size(source: str) -> int:
    return len(base64.b64decode(source.partition(",")[2]))


def test_pixel_art_stays_lossless_and_photographs_fit() -> None:
    rng = np.random.default_rng(0)
    art = np.kron(rng.integers(0, 255, (8, 8, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
    assert (np.asarray(opened(encode(Image.fromarray(art), 1e6, art=True))) == art).all()
    noise = Image.fromarray(rng.integers(0, 255, (512, 512, 3), np.uint8))
    for limit in (60_000, 15_000):
        assert size(encode(noise, limit, art=False)) <= limit
    small = rng.integers(0, 255, (8, 8, 3), np.uint8)
    assert (np.asarray(opened(encode_single(small, 10))) == small).all()
    assert max(opened(encode_single(np.asarray(noise), 20_000)).size) <= 192


def test_galleries_are_in_order_and_thinned_evenly(tmp_path: Path) -> None:
    image = Image.fromarray(np.zeros((40, 40, 3), np.uint8))
    steps = [f"step_{step:06d}" for step in range(10, 100, 10)]
    for name in ("base", "tuned", "before_after", "nearest", *steps):
        image.save(tmp_path / f"{name}.png")
    sheets = gallery_sheets(tmp_path, 100, [])
    assert [sheet.step for sheet in sheets] == [0, *range(10, 101, 10)]
    few = encoded_sheets(sheets, 4 * LEAST_SHEET * 4 / 3, [])
    assert [sheet["step"] for sheet in few] == [0, 30, 70, 100]


@pytest.mark.parametrize(
    "text", ["[]", '{"columns": 2, "cell": [0, 4], "left": 0, "top": 0, "rows": []}', "{", "\xff"]
)
def test_a_damaged_sidecar_is_a_note(tmp_path: Path, text: str) -> None:
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "base.png")
    (tmp_path / "base.json").write_text(text, encoding="latin1")
    problems: list[str] = []
    (sheet,) = gallery_sheets(tmp_path, 1, problems)
    assert sheet.cells == {}
    assert len(problems) == 1


def test_sidecars_are_cut_to_their_cells(tmp_path: Path) -> None:
    path = tmp_path / "base.png"
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(path)
    content = {"columns": 2, "cell": [4, 4], "left": 0, "top": 0,
               "rows": [{"number": 3, "text": None}],
               "scores": {"clip": [[0.1, None, 7], [9]]}}  # fmt: skip
    path.with_suffix(".json").write_text(json.dumps(content))
    (sheet,) = gallery_sheets(tmp_path, 1, [])
    assert sheet.cells["rows"] == ["3"]
    assert sheet.cells["scores"] == {"clip": [[0.1, None]]}
    assert isinstance(sheet, Sheet)


def test_best_and_worst_of_the_last_iterations(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", 20)
    for number in range(1, 21):
        write_rollouts(run.rollouts / f"iteration_{number:06d}.parquet", rollouts(number))
    data = read_run(run)
    found = extremes.find_extremes(data)
    assert found is not None
    assert found.iterations == (17, 20)
    rows = [row for number in range(17, 21) for row in rollouts(number).to_pylist()]
    values = sorted(row["reward_clip"] for row in rows if math.isfinite(row["reward_clip"]))
    best = [pick.scores["clip"] for pick in found.best["clip"]]
    assert best == values[::-1][: extremes.EACH]
    assert [pick.scores["clip"] for pick in found.worst["clip"]] == values[: extremes.EACH]
    keys = found.in_order()
    assert len(keys) == len(set(keys))
    images = extremes.decoded(data, keys, extremes.Decoding(600.0))
    assert list(images) == keys
    assert {image.shape for image in images.values()} == {(8, 8, 3)}


def test_decoding_stops_when_the_next_chunk_would_be_late(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(extremes.time, "monotonic", lambda: clock[0])

    def decode(tokens: np.ndarray) -> np.ndarray:
        clock[0] += 4.0 * len(tokens)
        return np.zeros((len(tokens), 2, 2, 3), np.uint8)

    tokens = [[at] for at in range(40)]
    assert len(extremes.within(decode, tokens, 2.0)) == 1  # one image, whatever it takes
    clock[0] = 0.0
    assert len(extremes.within(decode, tokens, 30.0)) == 7
    assert clock[0] <= 30.0


def test_rollouts_that_were_not_kept(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", 6)
    for file in run.rollouts.iterdir():
        file.unlink()
    assert extremes.section(read_run(run), extremes.AT_END, 1e6) == (
        None, "rollouts are recorded with --output.rollouts, which this run had off"
    )  # fmt: skip


def test_the_timeline_of_a_whole_run(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", 5)
    trace = timeline.read_trace(run.trace, [], 1 << 20)
    figure = timeline.busy_map(trace)
    assert figure is not None
    heat = figure["data"][0]
    shares = dict(zip(heat["y"], (np.mean(row) for row in heat["z"])))
    # of the time after the first iteration's end; two samplers, of which one decodes meanwhile
    assert shares["sampler × 2"] == pytest.approx((50 + 20) / 2, abs=1)
    assert shares["learner × 1"] == pytest.approx(30, abs=1)
    assert shares["driver × 1"] == 0
    bars, count = timeline.last_iterations(trace)
    assert count == 3
    names = {each["name"]: each for each in bars["data"]}
    assert names["sample"]["base"] == [0, 0, 1, 1, 2, 2]
    assert names["wait groups"]["marker"]["color"] == "var(--wait)"
    chart = timeline.idle_chart(trace, [1, 2, 3, 4, 5])
    assert chart is not None
    assert {line.name for line in chart.lines} == {"sampler", "reward-server", "learner"}


def test_the_timeline_of_a_resumed_run_has_no_gap_and_nothing_twice(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    trace = Trace(path, resume=False)
    began = [(1, 1000.0), (2, 1001.0), (3, 1002.0), (3, 90000.0), (4, 90001.0)]
    for number, start in began:  # iteration 3 is repeated a day later
        trace.add([Span("learner", "learn", start, start + 1 / number)])
        mark = {"name": "idle share", "ph": "C", "ts": round((start + 1) * 1e6), "pid": 1}
        trace._write(mark | {"iteration": number, "args": {"learner": 1 - 1 / number}})
    trace.close()
    found = timeline.read_trace(path, [], 1 << 20)
    starts = [999_000_000, 89_990_000_000]
    chart = timeline.idle_chart(found, [1.0, 2.0, 3.0, 4.0])
    assert chart is not None
    assert [line.x for line in chart.lines] == [[1, 2, 3, 4]]
    figure = timeline.busy_map(found, starts)
    assert figure is not None
    heat = figure["data"][0]
    assert max(heat["x"]) * 60 == pytest.approx(4, abs=0.05)  # seconds; of 3 and 2 iterations
    busy = 100 * (1 / 2 + 1 / 3 + 1 / 3 + 1 / 4) / 4
    assert np.mean(heat["z"]) == pytest.approx(busy, abs=1)
    bars, count = timeline.last_iterations(found, starts)
    assert count == 2
    assert bars["data"][0]["base"] == [0, 1]


def test_a_stop_decodes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extremes, "RolloutDecoder", lambda *_: 1 / 0)
    data = read_run(made_run(tmp_path / "run", 6))
    found, why = extremes.section(data, extremes.AT_STOP, 1e6)
    assert found is None
    assert "learner.report" in why


def test_a_long_trace_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    trace = Trace(path, resume=False)
    for at in range(3000):
        trace.add([Span(f"sampler-{at % 7}", "sample", 1000 + at, 1000.5 + at)])
        if at % 1000 == 999:
            mark = {"name": "idle share", "ph": "C", "ts": round((1001 + at) * 1e6), "pid": 1}
            trace._write(mark | {"args": {"sampler": 0.5}})
    trace.close()
    found = timeline.read_trace(path, [], 1 << 20)
    bars, count = timeline.last_iterations(found)
    assert count == 1
    assert sum(len(each["x"]) for each in bars["data"]) <= timeline.MOST_SPANS
    end = timeline.read_trace(path, [], path.stat().st_size // 4)
    assert end.cut
    assert len(end.idle) == 1
    assert set(end.rows) == {f"sampler-{at}" for at in range(7)}


def test_a_gpu_that_is_full_costs_the_images_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(extremes, "RolloutDecoder", fail)
    data = read_run(made_run(tmp_path / "run", 6))
    assert extremes.section(data, extremes.AT_END, 1e6) == (None, "CUDA out of memory")
