"""Colours of the page: readable on their background, and different for every kind of colour
blindness."""

from __future__ import annotations

import importlib.resources
import re

import numpy as np
import pytest

from learner.reports.charts import COLOURS

STYLE = importlib.resources.files("learner").joinpath("templates", "report.css").read_text()
BLOCKS = re.findall(r"\{\s*(--bg:[^}]*)\}", STYLE)
# Machado, Oliveira, Fernandes 2009, severity 1: linear RGB as seen with no red, green or blue cones
BLINDNESS = {
    "none": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                   [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                     [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
                   [0.004733, 0.691367, 0.303900]],
}  # fmt: skip
# Björn Ottosson's OKLab
TO_LMS = np.array([[0.4122214708, 0.5363325363, 0.0514459929],
                   [0.2119034982, 0.6806995451, 0.1073969566],
                   [0.0883024619, 0.2817188376, 0.6299787005]])  # fmt: skip
TO_LAB = np.array([[0.2104542553, 0.7936177850, -0.0040720468],
                   [1.9779984951, -2.4285922050, 0.4505937099],
                   [0.0259040371, 0.7827717662, -0.8086757660]])  # fmt: skip
LUMINANCE = np.array([0.2126, 0.7152, 0.0722])


def themes() -> dict[str, dict[str, np.ndarray]]:
    found = [dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6})", block)) for block in BLOCKS]
    assert len(found) == 3
    assert found[1] == found[2]  # dark, by preference and by choice
    return {
        name: {key: linear(value) for key, value in theme.items()}
        for name, theme in zip(("light", "dark"), found)
    }


def linear(colour: str) -> np.ndarray:
    part = np.array([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    return np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)


def contrast(one: np.ndarray, other: np.ndarray) -> float:
    """WCAG 2's ratio."""
    low, high = sorted((float(one @ LUMINANCE), float(other @ LUMINANCE)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_texts_and_lines_are_readable(theme: str) -> None:
    colours = themes()[theme]
    for text in ("ink", "muted", "accent", "good", "bad"):
        for ground in ("bg", "panel"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    for text, ground in (("good", "good-bg"), ("bad", "bad-bg"), ("watch", "watch-bg")):
        assert contrast(colours[text], colours[ground]) >= 4.5
    for series in range(1, COLOURS + 1):
        assert contrast(colours[f"c{series}"], colours["panel"]) >= 3, series


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("kind", BLINDNESS)
def test_series_differ_for_everyone(theme: str, kind: str) -> None:
    colours = [themes()[theme][f"c{series}"] for series in range(1, COLOURS + 1)]
    seen = [np.clip(np.asarray(BLINDNESS[kind]) @ colour, 0, 1) for colour in colours]
    labs = [TO_LAB @ np.cbrt(TO_LMS @ colour) for colour in seen]
    apart = [np.linalg.norm(one - other) for at, one in enumerate(labs) for other in labs[:at]]
    assert min(apart) >= 0.12
