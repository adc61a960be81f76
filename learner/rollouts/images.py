"""Stored rollouts read back: their rows, and their images from the tokens alone.

Shapes: N rollouts, T tokens, H and W pixels.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from actors.captions import resolve_device
from actors.checkpoints.loading import load_decoder, weightless_policy
from actors.checkpoints.sources import planned_policy
from cluster.errors import DataError
from cluster.io.run_layout import iteration_of
from cluster.program.precision import start_computing
from learner.config import RunConfig
from learner.rollouts.parquet import read_file
from learner.runs.run_dir import RunDirectory

logger = logging.getLogger(__name__)


def decode_images(config: RunConfig, tokens: np.ndarray, device: str = "auto") -> np.ndarray:
    """As `RolloutDecoder.images`, once."""
    return RolloutDecoder(config, device).images(tokens)


class RolloutDecoder:
    """A run's tokenizer, loaded once; no weights of a policy are read. On a CPU its images are the
    sampler's bit for bit, where the run's were made on one.

    Args:
        device: "auto" is a GPU if there is one.

    Raises:
        CheckpointError: the tokenizer is not there, or not readable.
        ConfigError: no such device.
    """

    def __init__(self, config: RunConfig, device: str = "auto") -> None:
        self._device = resolve_device(device)
        start_computing()
        self._places = token_grid(config)
        dtype = getattr(torch, config.sampler.image_dtype)
        self._decoder = load_decoder(config.tokenizer, device=self._device, dtype=dtype)
        self._size = config.rollouts_per_group
        """A sampler decodes as many at once: equal rounding."""

    @torch.inference_mode()
    def images(self, tokens: np.ndarray) -> np.ndarray:
        """Tokens (N, T) of rollouts -> images (N, H, W, 3) uint8.

        Raises:
            DataError: tokens that are none of this policy.
        """
        places, codes = self._places, self._decoder.config.codebook_size
        if tokens.ndim != 2 or tokens.shape[1] != places.size:
            raise DataError(
                f"tokens of shape {tokens.shape}, expected (N, {places.size}): are they of another "
                "run?"
            )
        if tokens.size and not (tokens.min() >= 0 and tokens.max() < codes):
            raise DataError(
                f"tokens from {tokens.min()} to {tokens.max()}, expected 0 to {codes - 1}: are "
                "they of another run?"
            )
        grids = torch.from_numpy(tokens[:, places].astype(np.int64)).split(self._size)
        pixels = [self._decoder.pixels(grid.to(self._device)).cpu() for grid in grids]
        return torch.cat(pixels).numpy()


def token_grid(config: RunConfig) -> np.ndarray:
    """(h, w) int64: which of a rollout's T tokens is at each place of the image.

    Raises:
        CheckpointError: the policy's architecture is not known without its file, which is not
            there.
    """
    policy = weightless_policy(planned_policy(config.policy.source()))
    return policy.codes(torch.arange(policy.num_tokens).unsqueeze(0))[0].numpy()


def read_rollouts(
    run: RunDirectory,
    iterations: Collection[int] | None = None,
    columns: Sequence[str] | None = None,
) -> pa.Table:
    """Rows of a run's rollouts, in the order of iterations, groups and rollouts; also of a run that
    is active. Files that cannot be read are left out, with a warning that names them.

    Args:
        iterations: by their numbers in the records; None: all.
        columns: None: all. Those that a file lacks are missing in its rows.

    Raises:
        DataError: no rollouts are there, or none of them can be read.
    """
    tables = list(read_files(run, iterations, columns))
    return pa.concat_tables(tables, promote_options="default")


def read_files(
    run: RunDirectory,
    iterations: Collection[int] | None = None,
    columns: Sequence[str] | None = None,
) -> Iterator[pa.Table]:
    """As `read_rollouts`, one iteration after the other, so that not all of them are in memory."""
    files = rollout_files(run)
    chosen = {n: f for n, f in files.items() if iterations is None or n in iterations}
    if not chosen:
        raise DataError(_nothing_kept(run, files, iterations))
    damaged = 0
    for file in chosen.values():
        try:
            table = read_file(file, columns)
        except DataError as error:
            damaged += 1
            logger.warning(f"note: left out: {error}")
            continue
        yield table
    if damaged == len(chosen):
        raise DataError(f"none of the {damaged} files of rollouts in {run.rollouts} is whole")


def rollout_files(run: RunDirectory) -> dict[int, Path]:
    """Number of an iteration in the records -> its file, in order."""
    there = run.rollouts.iterdir() if run.rollouts.is_dir() else ()
    found = {number: file for file in there if (number := iteration_of(file.name)) is not None}
    return dict(sorted(found.items()))


def _nothing_kept(
    run: RunDirectory, files: Collection[int], iterations: Collection[int] | None
) -> str:
    if files and iterations is not None:
        asked = ", ".join(map(str, sorted(iterations)[:3]))
        return (
            f"{run.path} keeps rollouts of {len(files)} iterations, {min(files)} to {max(files)}, "
            f"but none that were asked for ({asked}{', ...' if len(iterations) > 3 else ''})"
        )
    return (
        f"{run.path} keeps no rollouts: {run.rollouts} has no iteration_*.parquet. A run writes "
        "one an iteration, unless --output.rollouts is off"
    )
