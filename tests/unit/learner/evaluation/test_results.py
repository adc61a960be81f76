"""Tables of results, and comparisons in numbers and words."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from cluster.errors import ConfigError
from learner.evaluation.comparison import (
    Comparison,
    Line,
    Side,
    compare_sides,
    compared,
    find_side,
    holm,
    settings_of,
    verdict,
)
from learner.evaluation.kept.real import write_real
from learner.evaluation.kept.samples import KeptSamples, write_json
from learner.evaluation.results import (
    Results,
    best_of,
    comma_separated,
    figures_of,
    heading,
    markdown,
    number,
    tables,
)
from rewards.metrics.evaluation import Difference, Figure, MetricSettings
from rewards.metrics.samples import RealImages, Samples

NAN = math.nan


def figure(value: float, low: float = NAN, high: float = NAN) -> Figure:
    return Figure(value, low, high)


ROWS = {
    "base": {"images": figure(9), "clip": figure(0.2), "fid": figure(5.0, 4.5, 5.5),
             "aesthetic": figure(3.0), "entropy": figure(2.0)},
    "tuned": {"images": figure(9), "clip": figure(0.2), "fid": figure(3.21, 3, 3.5),
              "second/fid": figure(1.0), "entropy": figure(1.0)},
}  # fmt: skip
RESULTS = Results(ROWS, {name: {} for name in ROWS}, {"command": "evaluate", "seed": 0})


def test_figures_are_in_a_fixed_order() -> None:
    assert figures_of(ROWS) == ["fid", "second/fid", "clip", "entropy", "aesthetic", "images"]


def test_the_best_is_known_by_the_figures_direction() -> None:
    assert best_of(ROWS, "fid") == {"tuned"}
    assert best_of(ROWS, "clip") == {"base", "tuned"}
    assert best_of(ROWS, "entropy") == set()  # neither direction is better
    assert best_of(ROWS, "second/fid") == set()  # one row alone has it
    assert best_of({"a": {"fid": figure(NAN)}, "b": {"fid": figure(1)}}, "fid") == set()


@pytest.mark.parametrize(
    ("value", "text"),
    [(3.2104, "3.210"), (0.012345, "0.01235"), (12345.6, "12346"), (-8.447, "-8.447"), (0, "0"),
     (1e-9, "0.00000000"), (1000.0, "1000"), (NAN, "nan"), (9.99999, "10.000")],
)  # fmt: skip
def test_numbers_have_four_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_markdown_and_csv_have_every_figure() -> None:
    text = markdown(RESULTS)
    assert "| FID ↓ | 5 [4.500, 5.500] | **3.210 [3, 3.500]** |" in text
    assert "| FID (2nd space) ↓ | - | 1 |" in text
    lines = comma_separated(RESULTS).splitlines()
    assert "tuned,fid,3.21,3,3.5,lower" in lines
    assert "base,aesthetic,3.0,,,higher" in lines
    assert len(lines) == 1 + 10


def test_tables_are_split_on_narrow_consoles() -> None:
    assert [len(table.columns) for table in tables(RESULTS, 80)] == [3]
    assert [len(table.columns) for table in tables(RESULTS, 60)] == [2, 2]
    console = Console(width=80)
    with console.capture() as captured:
        console.print(*tables(RESULTS, 80))
    assert "3.210 [3, 3.500]*" in captured.get()


def test_headings_say_space_and_direction() -> None:
    assert heading("second/recall") == "recall (2nd space) ↑"
    assert heading("inception_score", arrow=False) == "Inception Score"


def test_p_values_are_corrected_as_holm_does() -> None:
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005, "e": NAN})
    assert math.isnan(found.pop("e"))
    # Holm 1979: sorted p times 4, 3, 2, 1, made monotone
    assert found == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}


def line(value: float, p: float) -> Line:
    return Line(figure(1), figure(1 + value), Difference(value, NAN, NAN, p, True), p)


def test_verdicts_say_who_is_better_in_what() -> None:
    lines = {"fid": line(-0.5, 0.0004), "clip": line(-0.25, 0.02), "recall": line(0.1, 0.3),
             "entropy": line(-1.0, 0.001), "second/fid": line(1, NAN)}  # fmt: skip
    assert verdict(Comparison("base", "tuned", lines)) == (
        "base is better in CLIP score (by 0.250, p = 0.020). tuned is better in FID (by 0.500, "
        "p < 0.001). No significant difference in recall. Not tested: FID (2nd space)."
    )
    nothing = Comparison("base", "tuned", {"recall": line(0.1, 0.3)})
    assert verdict(nothing) == "No figure tells base and tuned apart."


def samples(shift: float) -> Samples:
    """The second set differs from the first by the same in each image."""
    noise = np.random.default_rng(0).normal(size=200)
    scores = {"clip": (noise + shift).astype(np.float32)}
    return Samples({}, scores, classes=np.arange(200) % 10)


def test_pairs_show_differences_smaller_than_the_spread() -> None:
    found = compared(("a", "b"), [samples(0), samples(0.01)], RealImages(), MetricSettings())
    clip = found.lines["clip"]
    assert clip.significant
    assert clip.difference.value == pytest.approx(0.01, rel=1e-3)
    assert clip.first.high - clip.first.low > 0.2


def side(out: Path, images: int = 40, neighbours: int = 3, real: str = "a.npz") -> Side:
    """An evaluation of given images in a directory, of one row."""
    features = np.random.default_rng(0).normal(size=(images, 2)).astype(np.float32)
    kept = KeptSamples.begin(out / "samples" / "x", "x", {"images": {"digest": str(out)}}, [images])
    kept.write(0, {"features/features": features})
    write_real(out, {"images": real, "sha256": real}, RealImages({"features": features + 1}))
    write_json(
        out / "results.json",
        {"neighbours": neighbours, "splits": 10, "seed": 0, "real images": real},
    )
    return find_side(str(out), None)


def test_rows_are_compared_as_they_were_evaluated(tmp_path: Path) -> None:
    first, second = side(tmp_path / "a"), side(tmp_path / "b")
    assert settings_of(first, second).neighbours == 3
    assert {"fid", "coverage"} <= compare_sides(first, second, 1000).lines.keys()
    other = side(tmp_path / "c", neighbours=7)
    with pytest.raises(ConfigError, match=r"cannot be compared: neighbours: 3, not 7"):
        compare_sides(first, other, 1000)
    (tmp_path / "b" / "results.json").unlink()
    with pytest.raises(ConfigError, match=r"b/results.json: no such file"):
        compare_sides(first, second, 1000)


def test_rows_of_other_real_images_are_not_compared(tmp_path: Path) -> None:
    first, other = side(tmp_path / "a"), side(tmp_path / "b", real="other.npz")
    with pytest.raises(ConfigError, match=r"real images: 'a.npz', not 'other.npz'; sha256: "):
        compare_sides(first, other, 1000)
    moved = side(tmp_path / "c")
    write_real(moved.folder, {"images": "moved/a.npz", "sha256": "a.npz"}, RealImages())
    assert compare_sides(first, moved, 1000).lines.keys() >= {"fid"}
    (first.folder / "real" / "manifest.json").unlink()
    for pair in ((first, moved), (moved, first)):
        with pytest.raises(ConfigError, match=r"a/real: the real images of x are gone"):
            compare_sides(*pair, 1000)


def test_rows_of_other_numbers_of_images_are_not_compared(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has 40 images and .* 30: FID, recall, coverage"):
        compare_sides(side(tmp_path / "a"), side(tmp_path / "b", images=30), 1000)


def test_rows_are_named_by_directory_or_by_name(tmp_path: Path) -> None:
    for row in ("base", "tuned"):
        kept = KeptSamples.begin(tmp_path / "samples" / row, row, {"seed": 0}, [2])
        kept.write(0, {"scores/clip": np.zeros(2, np.float32)})
    with pytest.raises(ConfigError, match=r"which of its 2 rows is meant\?\n.*samples/base\n"):
        find_side(str(tmp_path), None)
    assert find_side(str(tmp_path / "samples" / "tuned"), None).name == "tuned"
    assert find_side("base", tmp_path).name == "base"
    with pytest.raises(ConfigError, match=r"or the name of a row .*there are\n  base\n  tuned"):
        find_side("other", tmp_path)
