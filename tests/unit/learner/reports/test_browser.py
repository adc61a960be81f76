"""The page in headless Chromium, as a person opens it: from a file, light and dark, on a phone."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.io.starts import END, HOW, START, append_event
from learner.reports.extremes import Decoding
from learner.reports.page import LARGEST, render
from learner.runs.run_dir import RunDirectory
from tests.unit.learner.reports.made_run import COLUMNS, ROWS, made_run, write_gallery

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium: install the package chromium to open the report"
)
SECTIONS = ("result", "images", "curves", "evaluations", "diversity", "timeline", "log", "run")
LONGEST_WAIT_S = 20.0


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    run = made_run(tmp_path_factory.mktemp("report") / "run")
    write_gallery(run.gallery / "nearest.png", 60)
    start = {"command": "python -m learner.run --seed 7", "versions": {"python": "3.11"}}
    append_event(run.path, START, {**start, "hardware": {"host": "h", "gpus": []}, "fleet": {}})
    append_event(run.path, END, {HOW: "finished", "detail": ""})
    return run


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


class Opened:
    """A page, and everything that went wrong in it."""

    def __init__(self, browser: Any, file: Path, width: int = 1280, dark: bool = False) -> None:
        scheme = "dark" if dark else "light"
        size = {"width": width, "height": 850}
        self.page = browser.new_page(viewport=size, color_scheme=scheme)
        self.errors: list[str] = []
        self.page.on("console", lambda said: self.errors.append(f"{said.type}: {said.text}"))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", self._requested)
        self.page.goto(file.as_uri())
        self.page.locator("html[data-ready=true]").wait_for()

    def _requested(self, request: Any) -> None:
        if not request.url.startswith(("file:", "data:", "blob:")):
            self.errors.append(f"request: {request.url}")

    def draw(self, key: str) -> Any:
        """A chart, drawn because it is in view."""
        place = self.page.locator(f'[data-figure="{key}"]')
        place.scroll_into_view_if_needed()
        place.locator("svg.main-svg").first.wait_for()
        return place

    def draw_all(self) -> None:
        """Every chart, as for printing."""
        self.page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
        self.wait_for("[...document.querySelectorAll('.plot')].every(p => p.querySelector('svg'))")

    def wait_for(self, expression: str) -> None:
        """Asked from here: the page's policy forbids playwright's own wait_for_function."""
        end = time.monotonic() + LONGEST_WAIT_S
        while not self.page.evaluate(expression):
            assert time.monotonic() < end, expression
            time.sleep(0.02)

    def colour_of_paper(self) -> str:
        return self.page.evaluate("getComputedStyle(document.body).backgroundColor")

    def overflow(self) -> int:
        return self.page.evaluate("document.documentElement.scrollWidth - innerWidth")


@pytest.fixture(scope="module")
def file(run: RunDirectory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(render([run], Decoding(60.0)), encoding="utf-8")
    assert file.stat().st_size <= LARGEST
    return file


def test_every_section_is_there_and_every_chart_is_drawn(browser: Any, file: Path) -> None:
    opened = Opened(browser, file)
    page = opened.page
    for section in SECTIONS:
        assert page.locator(f"section#{section} h2").is_visible()
    assert page.locator("h1 .state").inner_text() == "finished"
    headline = page.locator(".headline").inner_text()
    assert headline == "FID fell 57 % (25.00 → 10.75); mixed: recall lost 48 %"
    assert page.locator("table.figures td.best").count() > 0
    assert page.locator(".command code").inner_text() == "python -m learner.run --seed 7"
    keys = page.evaluate("[...document.querySelectorAll('.plot')].map(p => p.dataset.figure)")
    for wanted in ("curve-reward-clip", "curve-fid-in-the-reward-s-features", "curve-agreement",
                   "curve-token-entropy", "curve-entropy-coefficient", "curve-mismatch-kl",
                   "curve-clip-share", "curve-staleness", "curve-kl-to-the-base-policy",
                   "curve-images", "evaluation-judge-fid", "timeline-map", "timeline-last",
                   "timeline-idle"):  # fmt: skip
        assert wanted in keys
    opened.draw_all()
    assert page.locator("#log .entry").all_inner_texts()[-1].endswith("error: it <b>broke</b>")
    assert opened.errors == []
    page.close()


def test_slider_hover_and_keyboard(browser: Any, file: Path) -> None:
    opened = Opened(browser, file)
    page = opened.page
    shown = page.locator("#gallery .sheet").nth(1)
    last = shown.locator("img").get_attribute("src")
    assert shown.locator("h4").inner_text() == "tuned policy"
    page.locator("#step").focus()
    page.keyboard.press("ArrowLeft")
    assert shown.locator("h4").inner_text() == "iteration 20"
    assert shown.locator("img").get_attribute("src") != last
    assert page.locator(".slider output").inner_text() == "20 of 60"
    cells = shown.locator(".cell")
    assert cells.count() == ROWS * COLUMNS
    cells.nth(COLUMNS + 2).hover()
    tip = page.locator("#tip")
    assert tip.inner_text().split("\n") == ["digit 1 <script>", "clip 0.140", "hps –"]
    page.mouse.move(0, 0)
    assert tip.is_hidden()
    cells.first.focus()
    page.keyboard.press("ArrowDown")
    assert tip.inner_text().split("\n")[1] == "clip 0.120"
    thumb = page.locator(".thumb").first
    thumb.click()  # as a tap does
    assert "iteration" in tip.inner_text()
    assert "<script>alert(1)</script>" in page.locator(".extremes").inner_html().replace(
        "&lt;", "<"
    ).replace("&gt;", ">")
    assert page.locator("#nearest .cell").count() == ROWS * COLUMNS
    assert opened.errors == []
    page.close()


def test_dark_mode_changes_page_and_charts(browser: Any, file: Path) -> None:
    opened = Opened(browser, file)
    page, place = opened.page, opened.draw("curve-reward-clip")
    lines = "document.querySelectorAll('[data-figure=curve-reward-clip] .js-line')"
    stroke = f"[...{lines}].pop().style.stroke"
    light = opened.colour_of_paper(), page.evaluate(stroke)
    page.locator("#theme").click()
    opened.wait_for(f"{stroke} !== '{light[1]}'")
    dark = opened.colour_of_paper(), page.evaluate(stroke)
    assert all(one != other for one, other in zip(light, dark))
    assert place.is_visible()
    page.close()
    preferred = Opened(browser, file, dark=True)  # another storage: nothing was chosen there
    assert preferred.colour_of_paper() == dark[0]
    assert opened.errors == preferred.errors == []
    preferred.page.close()


def test_a_phone_scrolls_down_only(browser: Any, file: Path) -> None:
    opened = Opened(browser, file, width=390)
    opened.draw_all()
    assert opened.overflow() <= 0
    assert opened.errors == []
    opened.page.close()


def test_runs_side_by_side(browser: Any, run: RunDirectory, tmp_path: Path) -> None:
    other = made_run(tmp_path / "other <i>", 40, seed=5)
    file = tmp_path / "comparison.html"
    file.write_text(render([run, other], Decoding(60.0)), encoding="utf-8")
    opened = Opened(browser, file, width=390)
    page = opened.page
    opened.draw("curve-reward-clip")
    assert page.locator(".settings tbody tr").first.locator("code").inner_text() == "iterations"
    assert page.locator("#gallery .sheet").count() == 2
    headings = page.locator("#gallery h4").all_inner_texts()
    assert headings == ["run: tuned policy", "other <i>: tuned policy"]
    names = "document.querySelector('[data-figure=curve-reward-clip]').data.map(t => t.name)"
    assert page.evaluate(names) == ["run", "other &lt;i&gt;"]
    assert opened.overflow() <= 0
    assert opened.errors == []
    page.close()
