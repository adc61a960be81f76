from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from cluster.errors import CheckpointError
from cluster.messages import WeightSnapshot
from cluster.weights import ALIGNMENT, load_weights, pack_weights, unpack_weights


def state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "matrix": torch.randn(7, 5, generator=generator),
        "half": torch.randn(3, generator=generator).bfloat16(),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "counts": torch.arange(9),
        "transposed": torch.randn(4, 6, generator=generator).T,
        "flags": torch.tensor([True, False]),
    }


def test_round_trip_is_bitwise() -> None:
    tensors = state()
    back = unpack_weights(pack_weights(tensors, version=3))
    assert list(back) == list(tensors)
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)


def test_every_tensor_is_aligned() -> None:
    import msgpack

    manifest = msgpack.unpackb(msgpack.unpackb(pack_weights(state(), 0).manifest)["body"])
    assert all(entry["at"] % ALIGNMENT == 0 for entry in manifest["tensors"])


def read_only(snapshot: WeightSnapshot) -> WeightSnapshot:
    """As it comes out of an object store's shared memory."""
    buffer = snapshot.buffer.copy()
    buffer.flags.writeable = False
    return dataclasses.replace(snapshot, buffer=buffer)


def test_an_in_place_update_never_reaches_the_shared_copy(recwarn) -> None:
    torch.manual_seed(0)
    source, receiver = nn.Linear(4, 3), nn.Linear(4, 3)
    snapshot = read_only(pack_weights(source.state_dict(), 1))
    before = snapshot.buffer.copy()
    load_weights(receiver, snapshot)
    with torch.no_grad():
        receiver.weight.add_(1)
    assert np.array_equal(snapshot.buffer, before)
    assert torch.equal(receiver.weight, source.weight + 1)
    assert not recwarn.list  # torch warns about read-only memory; the console must stay clean


def test_damage_is_refused_before_anything_is_touched() -> None:
    module = nn.Linear(4, 3)
    before = module.weight.clone()
    snapshot = pack_weights(nn.Linear(4, 3).state_dict(), 2)
    snapshot.buffer[5] ^= 1
    with pytest.raises(CheckpointError, match="snapshot 2 is damaged"):
        load_weights(module, snapshot)
    assert torch.equal(module.weight, before)


def test_a_short_buffer_is_refused() -> None:
    snapshot = pack_weights(state(), 2)
    short = dataclasses.replace(snapshot, buffer=snapshot.buffer[:-64])
    with pytest.raises(CheckpointError, match="manifest speaks of version 2"):
        unpack_weights(short)


def test_another_architecture_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"missing \['bias'\]"):
        load_weights(nn.Linear(4, 3), pack_weights(nn.Linear(4, 3, bias=False).state_dict(), 0))
    with pytest.raises(CheckpointError, match=r"'weight' has shape \(3, 5\), expected \(3, 4\)"):
        load_weights(nn.Linear(4, 3), pack_weights(nn.Linear(5, 3).state_dict(), 0))


def test_a_dtype_that_cannot_travel_is_named() -> None:
    with pytest.raises(CheckpointError, match="'z' has dtype complex64"):
        pack_weights({"z": torch.zeros(2, dtype=torch.complex64)}, 0)
