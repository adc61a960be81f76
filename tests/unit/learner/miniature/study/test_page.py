"""The page of results: made from the CSV files alone, and the committed one is what they make."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from cluster.errors import DataError
from learner.miniature import page
from learner.miniature.page import (
    MAIN_PAGE,
    PAGE,
    RESULTS,
    TEXT,
    functions,
    read,
    render,
    with_results,
)
from learner.miniature.study.claims import CLAIMS, Claim
from learner.miniature.study.names import BASE, BEST, BOTH
from learner.miniature.study.parts import PARTS
from learner.miniature.study.results import Results, write_csv
from learner.miniature.study.statistics import Mean, mean
from learner.miniature.study.tables import View, interval, number, probability, table, verdict
from rewards.metrics.figures import OF_A_SPACE, better

METRICS = (*(f"{s}{n}" for s in ("", "second/", "clip/") for n in OF_A_SPACE),
           "accuracy", "clip", "entropy")  # fmt: skip


def results(part: str, shift: float = 0.1) -> Results:
    """Every policy of a part with noise around 1; tuned policies better by `shift`."""
    rng, it = np.random.default_rng(0), PARTS[part]
    figures = {}
    for seed in it.seeds:
        for policy in (*it.base, *(p for arm in it.arms for p in arm.policies)):
            gain = 0.0 if policy in it.base else shift
            found = {
                name: 1 + 0.01 * rng.normal() + (-gain if better(name) == "lower" else gain)
                for name in METRICS
            }
            figures[seed, policy] = {**found, "images": 1000.0}
    return Results(part, it.seeds, figures)


@pytest.fixture
def view() -> View:
    return View(PARTS["llamagen"], results("llamagen"))


def test_the_committed_page_is_what_the_results_make() -> None:
    assert (RESULTS / PAGE).read_text(encoding="utf-8") == render(read(RESULTS)), (
        "make it again: python -m learner.miniature.page"
    )
    for name in read(RESULTS):
        assert (RESULTS / f"{name}.png").stat().st_size < 300_000


def test_the_main_page_has_the_same_results() -> None:
    text = MAIN_PAGE.read_text(encoding="utf-8")
    assert text == with_results(text, read(RESULTS)), "make it: python -m learner.miniature.page"


def test_parts_that_were_not_run_are_said_to_be(tmp_path: Path) -> None:
    write_csv(results("llamagen"), tmp_path / "llamagen.csv")
    assert page.main(["--results", str(tmp_path)]) == 0
    text = (tmp_path / PAGE).read_text()
    sections = {name: text.split(f"\n## {name}\n")[1].split("\n## ")[0] for name in PARTS}
    assert [name for name, each in sections.items() if "Not run" not in each] == ["llamagen"]
    assert sorted(f.suffix for f in tmp_path.iterdir()) == [".csv", ".md", ".png"]
    assert (tmp_path / "llamagen.png").read_bytes()[1:4] == b"PNG"
    assert page.main(["--results", str(tmp_path / "none")]) == 2
    assert not (tmp_path / "none").exists()


def test_every_part_and_every_claim_is_shown(tmp_path: Path) -> None:
    for name in PARTS:
        write_csv(results(name), tmp_path / f"{name}.csv")
    text = render(read(tmp_path))
    assert "Not run" not in text
    for name, claims in CLAIMS.items():
        section = text.split(f"\n## {name}\n")[1].split("\n## ")[0]
        there = {BEST, *PARTS[name].base, *(p for arm in PARTS[name].arms for p in arm.policies)}
        shown = [claim for claim in claims if {claim.policy, claim.other} <= there]
        assert len(shown) >= 2
        for claim in claims:
            assert (claim.says in section) == (claim in shown), claim.says
    for part in PARTS.values():
        for arm in part.arms:
            assert re.search(rf"^\| {re.escape(arm.name)} \|", text, re.MULTILINE), arm.name


def test_a_table_has_means_and_intervals(view: View) -> None:
    lines = table(view, ("fid", "accuracy")).splitlines()
    assert lines[0] == "| policy | FID ↓ | class accuracy ↑ |"
    found = mean(view.results.values(BOTH, "fid"))
    (line,) = [line for line in lines if line.startswith(f"| {BOTH} |")]
    assert line.split("|")[2].strip() == f"{number(found.value)}±{number(found.half)}"
    assert [line.split("|")[1].strip() for line in lines[2:6]] == list(view.part.base)


def test_captions_have_r_precision_for_accuracy(view: View) -> None:
    figures = {
        key: {("r_precision" if k == "accuracy" else k): v for k, v in each.items()}
        for key, each in view.results.figures.items()
    }
    captions = View(view.part, Results("llamagen", view.results.seeds, figures))
    assert "R-precision ↑" in table(captions, ("accuracy",))
    assert captions.compare(BOTH, BASE, "accuracy").better == 10


def test_the_base_at_its_best_is_the_best_of_each_seed(view: View) -> None:
    ways = ("base", "base, CFG 1.5", "base, CFG 2", "base, CFG 3")
    recalls, fids = ([view.values(way, metric) for way in ways] for metric in ("recall", "fid"))
    np.testing.assert_array_equal(view.values(BEST, "recall"), np.max(recalls, axis=0))
    np.testing.assert_array_equal(view.values(BEST, "fid"), np.min(fids, axis=0))


def test_comparisons_are_corrected_together(view: View) -> None:
    found = view.comparisons
    assert len(found) == 20 * 11
    smallest = min(found.values(), key=lambda each: each.p_value)
    assert smallest.p_holm == pytest.approx(min(1, smallest.p_value * len(found)))


def claim(policy: str, other: str, *metrics: str) -> Claim:
    return Claim(says="It is so", policy=policy, other=other, metrics=metrics)


def test_verdicts_follow_the_results(view: View) -> None:
    good = verdict(view, claim(BOTH, BEST, "fid", "recall"))
    assert good is not None
    assert good.holds
    assert f"Seeds of 10 in which {BOTH} is better than {BEST}: FID 10 (-" in good.text
    assert good.text.endswith("all of these at once: 10")
    bad = verdict(view, claim(BASE, BOTH, "fid", "recall"))
    assert bad is not None
    assert not bad.holds
    assert verdict(view, claim("none", BASE, "fid")) is None


def test_nine_of_ten_seeds_are_enough(view: View) -> None:
    figures = {key: dict(each) for key, each in view.results.figures.items()}
    for seed, holds in ((201, True), (202, False)):
        figures[seed, BOTH]["fid"] = 9.0
        found = verdict(
            View(view.part, Results("llamagen", view.results.seeds, figures)),
            claim(BOTH, BASE, "fid"),
        )
        assert found is not None
        assert found.holds == holds


def test_a_texts_numbers_are_computed(view: View) -> None:
    of = functions(view)
    assert of["better"](BOTH, BASE, "fid") == "10 of 10 seeds"
    assert of["jointly"](BASE, BOTH, "fid", "recall") == "0 of 10 seeds"
    assert re.fullmatch(r"\+\.(09|10|11)±\.01", of["difference"](BOTH, BASE, "recall"))
    assert of["p"](BOTH, BASE, "recall") == "p < .001"
    with pytest.raises(DataError, match="no 'fid' of 'nothing'"):
        of["value"]("nothing", "fid")


def test_texts_have_no_results_that_are_typed() -> None:
    for file in TEXT.glob("*.md"):
        plain = re.sub(r"\{[{%].*?[}%]\}", "", file.read_text(encoding="utf-8"))
        assert not re.findall(r"\d+ of \d+|\d?\.\d+ ?(?:±|to)", plain), file


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.051, ".05"), (-0.051, "-.05"), (2.606, "2.61"), (24.71, "24.7"), (-0.001, ".00"),
     (1.0, "1.00"), (float("nan"), "-")],
)  # fmt: skip
def test_numbers_are_those_of_the_other_pages(value: float, text: str) -> None:
    assert number(value) == text


def test_signs_and_intervals() -> None:
    assert interval(Mean(0.05, 0.02), sign=True) == "+.05±.02"
    assert interval(Mean(0.0, float("nan")), sign=True) == ".00"
    assert probability(0.0123) == "p = .012"
    assert probability(0.0004) == "p < .001"
