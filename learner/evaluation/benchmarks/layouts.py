"""Where the benchmarks' scripts look for a prompt's images, and what they read beside them.

A layout maps (prompt, number of images K) to relative paths, each with what its file holds: the
numbers of the images, several of them as a grid of two columns, row by row; or a text. Paths are
below the folder that the script is given, in which nothing else may be: most scripts read all of
it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from learner.evaluation.benchmarks.prompts import Prompt

Content = tuple[int, ...] | str
Layout = Callable[[Prompt, int], Mapping[str, Content]]
COLUMNS = 2  # of a grid


def geneval(prompt: Prompt, count: int) -> dict[str, Content]:
    """00000/samples/0000.png and 00000/metadata.jsonl: folders of digits, one for each line."""
    folder = f"{prompt.number:05d}"
    images = {f"{folder}/samples/{k:04d}.png": (k,) for k in range(count)}
    return {f"{folder}/metadata.jsonl": f"{prompt.record}\n", **images}


def dpg(prompt: Prompt, count: int) -> dict[str, Content]:
    """ID.png: an image, or four as a grid, which the script cuts by its argument resolution."""
    return {f"{prompt.name}.png": tuple(range(count))}


def compbench(prompt: Prompt, count: int) -> dict[str, Content]:
    """CATEGORY/samples/PROMPT_000000.png: the number counts a category's images."""
    first = prompt.number * count
    return {f"{prompt.part}/samples/{prompt.text}_{first + k:06d}.png": (k,) for k in range(count)}


def numbered(ending: str) -> Layout:
    """A layout of one image for each prompt, PART/00000.jpg; further ones are 00000_1.jpg and so
    on, which HPSv2's script does not read.

    Args:
        ending: png or jpg.
    """

    def layout(prompt: Prompt, count: int) -> dict[str, Content]:
        stem = f"{prompt.part}/{prompt.number:05d}" if prompt.part else f"{prompt.number:05d}"
        further = {f"{stem}_{k}.{ending}": (k,) for k in range(1, count)}
        return {f"{stem}.{ending}": (0,), **further}

    return layout


def picture(images: np.ndarray, numbers: tuple[int, ...]) -> np.ndarray:
    """One image (H, W, 3) of a prompt's images (K, H, W, 3), or a grid of two columns."""
    if len(numbers) == 1:
        return np.asarray(images[numbers[0]])
    rows = [numbers[at : at + COLUMNS] for at in range(0, len(numbers), COLUMNS)]
    return np.concatenate([np.concatenate([images[k] for k in row], axis=1) for row in rows])
