"""Snapshots in pieces are the same snapshots."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cluster.errors import CheckpointError
from cluster.messages import WeightSnapshot
from cluster.snapshots.pieces import BLOCK, Pieces, cut
from cluster.weights import checksum, load_weights, pack_weights, unpack_weights


class Mixed(nn.Module):
    """Tensors of several dtypes, shorter and longer than a piece, one not contiguous, one empty."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.short = nn.Parameter(torch.randn(3, generator=draw))
        self.long = nn.Parameter(torch.randn(5, 40_000, generator=draw))
        self.turned = nn.Parameter(torch.randn(300, 200, generator=draw).T)
        self.register_buffer("halved", torch.randn(90_001, generator=draw).bfloat16())
        self.register_buffer("empty", torch.zeros(0, 4))
        self.register_buffer("flags", torch.rand(70_003, generator=draw) > 0.5)


def in_pieces(snapshot: WeightSnapshot, count: int) -> WeightSnapshot:
    return given(snapshot, cut(snapshot.buffer, count))


def given(snapshot: WeightSnapshot, pieces: list[np.ndarray]) -> WeightSnapshot:
    content: Any = Pieces()
    for piece in pieces:
        read_only = piece.copy()
        read_only.flags.writeable = False
        content.add(read_only)
    return dataclasses.replace(snapshot, buffer=content)


@pytest.mark.parametrize("nbytes", [64, BLOCK - 64, BLOCK, BLOCK + 64, 5 * BLOCK, 7 * BLOCK + 8])
@pytest.mark.parametrize("count", [1, 2, 3, 64])
def test_the_checksum_of_pieces_is_that_of_the_whole(nbytes: int, count: int) -> None:
    buffer = np.random.default_rng(0).integers(0, 256, nbytes, dtype=np.uint8)
    pieces, parts = Pieces(), cut(buffer, count)
    for part in parts:
        pieces.add(part)
    assert len(parts) == count
    assert pieces.nbytes == nbytes
    assert pieces.checksum() == checksum(torch.from_numpy(buffer))
    assert pieces.on(torch.device("cpu")).equal(torch.from_numpy(buffer))


@pytest.mark.parametrize("count", [1, 2, 3, 10, 64])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_weights_in_pieces_are_loaded_bit_for_bit(count: int, dtype: torch.dtype | None) -> None:
    snapshot = pack_weights(Mixed(1).state_dict(), 1, dtype)
    whole, parted = Mixed(2), Mixed(3)
    load_weights(whole, snapshot)
    load_weights(parted, in_pieces(snapshot, count))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parted.state_dict()[name]), name
    if dtype is None:
        for name, value in unpack_weights(in_pieces(snapshot, count)).items():
            assert torch.equal(value, whole.state_dict()[name])


@pytest.mark.parametrize("fault", ["flipped", "missing", "exchanged", "twice", "none"])
def test_damaged_pieces_are_refused_and_change_nothing(fault: str) -> None:
    snapshot = pack_weights(Mixed(1).state_dict(), 1)
    pieces = [piece.copy() for piece in cut(snapshot.buffer, 5)]
    if fault == "flipped":
        pieces[3][17] ^= 1
    elif fault == "missing":
        del pieces[2]
    elif fault == "exchanged":
        pieces[0], pieces[1] = pieces[1], pieces[0]
    elif fault == "twice":
        pieces[1] = pieces[0]
    else:
        pieces = []
    module = Mixed(2)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"damaged|manifest speaks of"):
        load_weights(module, given(snapshot, pieces))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
