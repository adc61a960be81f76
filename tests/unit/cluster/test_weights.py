from __future__ import annotations

import copy
import dataclasses

import msgpack
import numpy as np
import pytest
import torch
from torch import nn

from cluster import weights
from cluster.errors import CheckpointError
from cluster.messages import WeightSnapshot
from cluster.snapshots.pieces import BLOCK, DTYPES
from cluster.weights import (
    ALIGNMENT,
    Packer,
    SnapshotName,
    checksum,
    load_weights,
    open_snapshot,
    pack_adapters,
    pack_weights,
    unpack_weights,
)
from tests.unit.helpers import TINY, tiny_policy

pytest.importorskip("hypothesis")  # a machine that is borrowed for its GPU may lack it
from hypothesis import given, settings
from hypothesis import strategies as st


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


shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@st.composite
def state_dicts(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Random bits of any dtype and shape: NaNs and infinities, too."""
    kinds = st.tuples(st.sampled_from(sorted(DTYPES)), shapes)
    found = {}
    for number, (name, shape) in enumerate(draw(st.lists(kinds, max_size=6))):
        dtype, count = DTYPES[name], int(np.prod(shape))
        raw = draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))
        bits = torch.tensor(list(raw), dtype=torch.uint8)
        if dtype is torch.bool:
            bits = bits % 2
        found[f"tensor {number}"] = bits.view(dtype).view(shape)
    return found


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@given(state_dicts(), st.integers(0, 2**40))
@settings(max_examples=60, deadline=None)
def test_any_state_dict_comes_back_bit_for_bit(state: dict, version: int) -> None:
    back = unpack_weights(pack_weights(state, version))
    assert list(back) == list(state)
    for name, tensor in state.items():
        assert (back[name].dtype, back[name].shape) == (tensor.dtype, tensor.shape)
        assert bits(back[name]) == bits(tensor)


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_any_flipped_bit_is_refused(data: st.DataObject) -> None:
    """Of the buffer or of the manifest, padding included."""
    snapshot = pack_weights(state(), 2)
    part = data.draw(st.sampled_from(["buffer", "manifest"]))
    raw = bytearray(getattr(snapshot, part))
    at = data.draw(st.integers(0, 8 * len(raw) - 1))
    raw[at // 8] ^= 1 << (at % 8)
    buffer = np.frombuffer(bytes(raw), np.uint8)
    damaged = dataclasses.replace(snapshot, **{part: buffer if part == "buffer" else bytes(raw)})
    with pytest.raises(CheckpointError, match=r"snapshot 2 (is damaged|has format)"):
        open_snapshot(damaged)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_any_truncation_is_refused(data: st.DataObject) -> None:
    snapshot = pack_weights(state(), 2)
    part = data.draw(st.sampled_from(["buffer", "manifest"]))
    whole = getattr(snapshot, part)
    short = whole[: data.draw(st.integers(0, len(whole) - 1))]
    with pytest.raises(CheckpointError, match=r"damaged|manifest speaks of"):
        open_snapshot(dataclasses.replace(snapshot, **{part: short}))


def test_the_checksum_is_that_of_its_definition() -> None:
    """Sums of little-endian words in blocks of 64 KiB and of the rest, hashed."""
    import hashlib

    raw = np.random.default_rng(0).integers(0, 256, 2 * BLOCK + 192, np.uint8)
    words = [int.from_bytes(raw[at : at + 8].tobytes(), "little") for at in range(0, len(raw), 8)]
    blocks = [words[:8192], words[8192:16384], words[16384:]]
    sums = b"".join((sum(block) % 2**64).to_bytes(8, "little") for block in blocks)
    expected = hashlib.blake2b(sums, digest_size=16).digest()
    assert checksum(torch.from_numpy(raw)) == expected
    swapped = np.concatenate([raw[BLOCK : 2 * BLOCK], raw[:BLOCK], raw[2 * BLOCK :]])
    assert checksum(torch.from_numpy(swapped)) != expected


def test_a_manifest_of_another_snapshot_is_refused() -> None:
    one, two = pack_weights(state(), 1), pack_weights(state(), 2)
    with pytest.raises(CheckpointError, match=r"snapshot 1: manifest speaks of version 2"):
        open_snapshot(dataclasses.replace(one, manifest=two.manifest))
    others = {name: tensor + 1 for name, tensor in state().items()}
    with pytest.raises(CheckpointError, match="checksum does not match"):
        open_snapshot(dataclasses.replace(two, buffer=pack_weights(others, 2).buffer))


def test_another_format_is_refused() -> None:
    snapshot = pack_weights(state(), 2)
    manifest = {**msgpack.unpackb(snapshot.manifest), "format": 1}
    with pytest.raises(CheckpointError, match="has format 1, expected 2: learner and samplers run"):
        open_snapshot(dataclasses.replace(snapshot, manifest=msgpack.packb(manifest)))


def test_bf16_on_the_wire_rounds_floats_alone() -> None:
    tensors = state()
    back = unpack_weights(pack_weights(tensors, 0, torch.bfloat16))
    assert back["matrix"].dtype == back["scalar"].dtype == torch.bfloat16
    assert torch.equal(back["matrix"], tensors["matrix"].bfloat16())
    assert torch.equal(back["counts"], tensors["counts"])


def test_a_buffer_is_used_again_only_when_nobody_holds_it() -> None:
    pack = Packer()
    first = pack(state(), 1)
    kept = first.buffer.copy()
    second = pack({name: tensor + 1 for name, tensor in state().items()}, 2)
    assert np.array_equal(first.buffer, kept)
    assert not np.shares_memory(first.buffer, second.buffer)
    place = second.buffer.ctypes.data
    part = first.buffer[8:16]  # a view of a view still holds it
    del first, second
    third = pack(state(), 3)
    assert third.buffer.ctypes.data == place
    assert not np.shares_memory(third.buffer, part)
    assert bits(unpack_weights(third)["matrix"]) == bits(state()["matrix"])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_gpu_packs_and_verifies_the_same_bytes(dtype: torch.dtype | None) -> None:
    """Packed there, copied to pinned memory that is used again, verified and written there."""
    torch.manual_seed(0)
    source = nn.Sequential(nn.Linear(300, 200), nn.Linear(200, 7, bias=False))
    tensors = dict(source.state_dict())
    there = {name: tensor.cuda() for name, tensor in tensors.items()}
    pack, sent = Packer(dtype), []
    for version in (1, 2):
        expected = Packer(dtype)(tensors, version)
        found = pack(there, version, send=sent.append)
        assert found.manifest == expected.manifest  # with the checksum
        assert np.array_equal(found.buffer, expected.buffer)
        assert sent[-1].buffer.is_cuda
        receiver, same = (nn.Sequential(*map(copy.deepcopy, source)) for _ in range(2))
        receiver.cuda()
        load_weights(receiver, read_only(found))
        load_weights(same, expected)
        assert all(
            torch.equal(a.cpu(), b) for a, b in zip(receiver.parameters(), same.parameters())
        )
        damaged = found.buffer.copy()
        damaged[5] ^= 1
        with pytest.raises(CheckpointError, match="is damaged"):
            load_weights(receiver, dataclasses.replace(found, buffer=damaged))
        del found
    assert len(pack._buffers) == 1
    assert torch.from_numpy(pack._buffers[0]).is_pinned()


def test_what_is_packed_on_a_device_is_copied_to_the_host_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The path of a GPU, with memory of this machine: sent before it is copied, into a buffer that
    is used again."""
    expected = Packer()(state(), 1)
    monkeypatch.setattr(weights, "device_of", lambda _: torch.device("cpu", 0))  # not the CPU's
    monkeypatch.setattr(weights, "_host_zeros", lambda nbytes, pinned: np.zeros(nbytes, np.uint8))
    pack, sent = Packer(), []
    places = set()
    for version in (1, 2):
        found = pack(state(), version, send=sent.append)
        assert np.array_equal(found.buffer, expected.buffer)
        assert not np.shares_memory(found.buffer, sent[-1].buffer.numpy())
        places.add(found.buffer.ctypes.data)
        del found
    assert len(places) == 1
    assert sent[0].manifest == expected.manifest


def test_equal_shapes_of_another_architecture_are_refused() -> None:
    """Heads and rotary frequencies show in no shape."""
    policy = tiny_policy()
    config = {**TINY.to_dict(), "num_heads": 4}
    snapshot = Packer()(policy.state_dict(), 3, config=config)
    expected = "snapshot 3 is of another architecture: num_heads is 4, expected 2"
    with pytest.raises(CheckpointError, match=expected):
        load_weights(policy, snapshot)
    load_weights(policy, Packer()(policy.state_dict(), 3, config=TINY.to_dict()))


def low_rank(layer: nn.Linear, scale: float = 0.5) -> tuple[torch.Tensor, torch.Tensor, float]:
    generator = torch.Generator().manual_seed(3)
    rows, columns = layer.weight.shape
    a = torch.randn(2, columns, generator=generator)
    return a, torch.randn(rows, 2, generator=generator), scale


def test_adapters_alone_give_the_merged_weights() -> None:
    source, receiver = nn.Linear(4, 3), nn.Linear(4, 3)
    base = pack_weights(source.state_dict(), 0)
    a, b, scale = low_rank(source)
    adapters = pack_adapters({"weight": (a, b, scale)}, 5, open_snapshot(base).name)
    assert (adapters.version, adapters.base) == (5, 0)
    before = base.buffer.copy()
    for _ in range(2):  # each time from the base, not from what is held
        load_weights(receiver, adapters, read_only(base))
        expected = source.weight.double() + scale * (b.double() @ a.double())
        torch.testing.assert_close(receiver.weight.double(), expected, rtol=0, atol=1e-6)
        assert torch.equal(receiver.bias, source.bias)
    assert np.array_equal(base.buffer, before)


def test_adapters_without_their_base_are_refused() -> None:
    layer = nn.Linear(4, 3)
    before = layer.weight.clone()
    base = pack_weights(layer.state_dict(), 0)
    name = open_snapshot(base).name
    adapters = pack_adapters({"weight": low_rank(layer)}, 5, name)
    other = pack_weights({n: t + 1 for n, t in layer.state_dict().items()}, 0)
    with pytest.raises(CheckpointError, match=r"snapshot 5 builds upon version 0 .* came without"):
        load_weights(layer, adapters)
    with pytest.raises(CheckpointError, match=r"5 builds upon version 0 .* wrong base: version 0"):
        load_weights(layer, adapters, other)
    with pytest.raises(CheckpointError, match=r"adapter of 'bias' for a weight of shape \(3, 4\)"):
        load_weights(layer, pack_adapters({"bias": low_rank(layer)}, 5, name), base)
    base.buffer[3] ^= 1
    with pytest.raises(CheckpointError, match="snapshot 0 is damaged"):
        load_weights(layer, adapters, base)
    assert torch.equal(layer.weight, before)
    assert str(SnapshotName(0, b"\xab" * 16)) == "version 0 (abababab)"
