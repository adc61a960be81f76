"""Names of figures of several feature spaces."""

from __future__ import annotations

import pytest

from rewards.metrics.figures import better, ordered, prefixes, split_figure


@pytest.mark.parametrize(
    ("figure", "parts", "direction"),
    [
        ("fid", ("", "fid"), "lower"),
        ("second/fid", ("second/", "fid"), "lower"),
        ("clip/recall", ("clip/", "recall"), "higher"),
        ("entropy", ("", "entropy"), ""),
        ("clip", ("", "clip"), "higher"),
        (
            "aesthetic, a/b",
            ("", "aesthetic, a/b"),
            "higher",
        ),  # of a part of a benchmark
    ],
)
def test_a_figure_has_a_space_and_a_direction(
    figure: str, parts: tuple[str, str], direction: str
) -> None:
    assert split_figure(figure) == parts
    assert better(figure) == direction


def test_figures_of_spaces_come_first_then_scores() -> None:
    names = ["images", "aesthetic", "clip/fid", "clip", "second/recall", "fid", "second/fid"]
    assert ordered(names) == [
        "fid", "second/fid", "second/recall", "clip/fid", "clip", "aesthetic", "images"
    ]  # fmt: skip
    assert prefixes(names) == ["", "second/", "clip/"]
