"""Which classes and captions contact sheets show, and what they say when it is not all."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cluster.errors import ConfigError
from cluster.messages import GroupScores, SampleRequest
from learner.checkpoints.resume import check_resume
from learner.config import RunConfig, load_preset, merge, to_dict, validate
from learner.monitoring import gallery
from learner.monitoring.gallery import (
    contact_sheet,
    gallery_rows,
    gallery_sheet,
    label,
    labelled,
    sample_gallery,
    save_gallery,
    shown_note,
)
from learner.preflight import preflight


def config_of(**changes: Any) -> RunConfig:
    return validate(merge(to_dict(load_preset("miniature")), changes), "test")


def of_classes(count: int, **output: Any) -> RunConfig:
    names = [f"name {index}" for index in range(count)]
    return config_of(conditions={"names": names, "template": "{}"}, output=output)


class Painter:
    """A fleet that paints each condition in a grey of its own."""

    def __init__(self) -> None:
        self.asked: list[SampleRequest] = []

    def sample_images(self, requests: list[SampleRequest]) -> list[np.ndarray]:
        self.asked = requests
        shape = (requests[0].num_rollouts, 8, 8, 3)
        return [np.full(shape, 10 * at, np.uint8) for at in range(len(requests))]

    def score_images(
        self, batches: Iterable[tuple[SampleRequest, np.ndarray]]
    ) -> Iterator[GroupScores]:
        """The grey as the reward; the last image of each row cannot be scored."""
        for request, images in batches:
            grey = images.mean((1, 2, 3), dtype=np.float32)
            grey[-1] = np.nan
            errors = (*[None] * (len(images) - 1), "cannot be scored")
            yield GroupScores(
                key=request.key, scores={"clip": grey, "hps": -grey}, features={}, errors=errors
            )


def test_up_to_sixteen_all_are_shown_without_a_word() -> None:
    for count in (1, 10, 16):
        rows = gallery_rows(of_classes(count))
        assert [number for number, _ in rows] == list(range(count))
        assert shown_note(of_classes(count)) == ""


@pytest.mark.parametrize("count", [17, 20, 31, 33, 1000])
def test_of_more_sixteen_are_spread_over_all(count: int) -> None:
    config = of_classes(count)
    numbers = [number for number, _ in gallery_rows(config)]
    assert len(set(numbers)) == 16
    assert numbers == sorted(numbers)
    assert numbers[0] == 0
    assert numbers[-1] >= count * 15 // 16
    assert shown_note(config) == f"16 of {count} classes"


def test_any_class_can_be_named() -> None:
    config = of_classes(1000, gallery_rows=(999, 207))
    assert [(number, c.text) for number, c in gallery_rows(config)] == [
        (999, "name 999"),
        (207, "name 207"),
    ]
    assert shown_note(config) == "2 of 1000 classes"


def test_classes_that_are_not_asked_for_are_refused() -> None:
    conditions = {"classes": [3, 7]}
    assert [n for n, _ in gallery_rows(config_of(conditions=conditions))] == [3, 7]
    wrong = config_of(conditions=conditions, output={"gallery_rows": (3, 4, 12)})
    with pytest.raises(ConfigError, match=r"from 3 to 7, found 4, 12"):
        gallery_rows(wrong)
    assert any(problem.startswith("output.gallery_rows") for problem in preflight(wrong).problems)


def test_captions_are_numbered_as_in_their_file(tmp_path: Path) -> None:
    file = tmp_path / "captions.txt"
    file.write_text("".join(f"caption {index}\n" for index in range(50)))
    config = config_of(conditions={"captions": str(file)})
    assert len(gallery_rows(config)) == 16
    assert shown_note(config) == "16 of 50 captions"
    named = config_of(conditions={"captions": str(file)}, output={"gallery_rows": (49,)})
    assert [c.text for _, c in gallery_rows(named)] == ["caption 49"]


def test_a_sheet_of_all_is_the_images_alone() -> None:
    painter, config = Painter(), config_of()
    sheet = gallery_sheet(config, sample_gallery(config, painter)).pixels  # type: ignore[arg-type]
    assert [request.group for request in painter.asked] == list(range(10))
    plain = contact_sheet(painter.sample_images(painter.asked)).pixels
    assert np.array_equal(sheet, plain)


def test_a_sheet_of_some_says_so_and_names_its_rows() -> None:
    painter, config = Painter(), of_classes(1000)
    sheet = gallery_sheet(config, sample_gallery(config, painter)).pixels  # type: ignore[arg-type]
    alone = contact_sheet(painter.sample_images(painter.asked))
    plain = alone.pixels
    height, width, _ = plain.shape
    assert sheet.shape == (height + gallery.TITLE, width + gallery.LABEL, 3)
    assert np.array_equal(sheet[gallery.TITLE :, gallery.LABEL :], plain)
    assert (sheet[: gallery.TITLE] < 128).any()  # the title
    labels = sheet[gallery.TITLE :, : gallery.LABEL]
    for row in np.array_split(labels, 16):
        assert (row < 128).any()
    blank = labelled(alone, "", [""] * 16).pixels
    assert (blank[:, : gallery.LABEL] == 255).all()


@pytest.mark.parametrize(("classes", "columns"), [(1000, 12), (10, 64)])
def test_the_file_beside_a_sheet_finds_every_image(
    tmp_path: Path, classes: int, columns: int
) -> None:
    """Also of a sheet that is downscaled: 64 columns are 2178 pixels wide."""
    config = of_classes(classes, gallery_columns=columns)
    shown = sample_gallery(config, Painter())  # type: ignore[arg-type]
    file = tmp_path / "step_000050.png"
    save_gallery(shown, gallery_sheet(config, shown), 50, file)
    about, pixels = json.loads(file.with_suffix(".json").read_text()), np.asarray(Image.open(file))
    assert (about["step"], about["columns"]) == (50, columns)
    assert [row["number"] for row in about["rows"]] == [
        number for number, _ in gallery_rows(config)
    ]
    assert about["rows"][1]["text"] == gallery_rows(config)[1][1].text
    width, height = about["cell"]
    for row, column in ((0, 0), (3, 5), (len(about["rows"]) - 1, columns - 1)):
        middle = about["left"] + (column + 0.5) * width, about["top"] + (row + 0.5) * height
        assert pixels[int(middle[1]), int(middle[0]), 0] == 10 * row
    assert about["left"] + columns * width <= pixels.shape[1]
    for name, sign in (("clip", 1), ("hps", -1)):
        expected = [[*[sign * 10.0 * row] * (columns - 1), None] for row in range(len(shown.rows))]
        assert about["scores"][name] == expected


def test_labels_are_short() -> None:
    ((number, condition),) = gallery_rows(of_classes(1))
    assert label(number, condition) == "0 name 0"
    long = config_of(conditions={"names": ["x" * 100], "template": "{}"})
    assert len(label(*gallery_rows(long)[0])) <= gallery.LETTERS


def test_galleries_may_be_changed_on_resume() -> None:
    check_resume(config_of(), config_of(output={"gallery_rows": (1,)}))
