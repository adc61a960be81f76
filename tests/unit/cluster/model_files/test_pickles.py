"""Pickles as data: the same values as Python's own machine, and nothing executed."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import random
import struct
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.errors import CheckpointError
from cluster.model_files.checkpoints import open_checkpoint, read_checkpoint
from cluster.model_files.pickles import MalformedError, Opaque, read_pickle

PROTOCOLS = range(6)
WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b.c": torch.ones(2, dtype=torch.bfloat16)}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_plain_values_are_pythons_own(protocol: int) -> None:
    shared = ["shared", {"x": 1}]
    values: list[Any] = [
        *(0, 1, -1, 255, 256, 65536, -(2**31), 2**31, 2**63, -(2**700), True, False, None),
        *(1.5, -0.0, 1e300, "", "ascii", "ünï\u2028\n", "x" * 300, b"", b"\x00\xff", b"x" * 300),
        *((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [], [1, [2]], {}, {"a": {1: 2}}, shared),
        [shared, shared],
    ]
    if protocol >= 4:
        values += [{1, 2}, frozenset((1, 2))]
    if protocol >= 5:
        values.append(bytearray(b"abc"))
    for value in values:
        found = read_pickle(io.BytesIO(pickle.dumps(value, protocol=protocol)))
        if protocol < 3 and isinstance(value, bytes):  # older ones make bytes by a call
            assert isinstance(found, Opaque)
        else:
            assert found == value
            assert type(found) is type(value)
    found = read_pickle(io.BytesIO(pickle.dumps([shared, shared], protocol=protocol)))
    assert found[0] is found[1]
    ring: list[Any] = []
    ring.append(ring)
    found = read_pickle(io.BytesIO(pickle.dumps(ring, protocol=protocol)))
    assert found[0] is found


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_objects_are_named_and_not_made(protocol: int) -> None:
    names: set[str] = set()
    value = {"options": argparse.Namespace(size=256), "place": Path("x"), "state": np.arange(3)}
    found = read_pickle(io.BytesIO(pickle.dumps(value, protocol=protocol)), names=names)
    assert found["options"].name == "argparse.Namespace"
    assert found["options"].state == {"size": 256}
    assert isinstance(found["state"], Opaque)
    assert any(name.startswith("pathlib") for name in names)
    assert any(name.startswith("numpy.") for name in names)


def damaging(marker: Path) -> dict[str, bytes]:
    """Programs that make a directory when they are unpickled, in each way that pickle has."""
    place = str(marker).encode()
    short = b"\x8c" + bytes([len(place)]) + place
    call = b"cos\nmkdir\n"
    stack = b"\x8c\x02os\x8c\x05mkdir\x93"
    string = b"X" + struct.pack("<I", len(place)) + place
    return {
        "reduce": b"\x80\x02" + call + string + b"\x85R.",
        "stack global": b"\x80\x04" + stack + short + b"\x85R.",
        "inst": b"(" + b"V" + place + b"\nios\nmkdir\n.",
        "obj": b"(" + call + string + b"o.",
        "newobj": b"\x80\x02" + call + string + b"\x85\x81.",
        "newobj_ex": b"\x80\x04" + stack + short + b"\x85}\x92.",
        "memo": b"\x80\x02" + call + b"q\x000h\x00" + string + b"\x85R.",
        "nested": b"\x80\x02}X\x01\x00\x00\x00k]" + call + string + b"\x85Ras.",
        "dup": b"\x80\x02" + call + b"2" + string + b"\x85R0.",
        "popped": b"\x80\x02" + call + string + b"\x85R0N.",
    }


def test_no_way_of_running_a_program_works(tmp_path: Path) -> None:
    marker = tmp_path / "made"
    for way, program in damaging(marker).items():
        names: set[str] = set()
        read_pickle(io.BytesIO(program), names=names)
        assert names == {"os.mkdir"}, way
        assert not marker.exists(), way
        if way != "newobj_ex" and way != "newobj":  # Python's own runs them
            pickle.loads(program)
            assert marker.exists(), way
            marker.rmdir()


class Calls:
    """Makes a directory when it is unpickled, by a function."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


class Fills:
    """Makes a directory when its state is put back."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __setstate__(self, state: dict[str, Any]) -> None:
        os.mkdir(state["marker"])


FORMATS = [(2, True), (3, True), (4, True), (5, True), (2, False), (4, False)]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(("protocol", "archive"), FORMATS)
@pytest.mark.parametrize("where", ["model", "inside", "args", "optimizer", "key", "whole", "bare"])
def test_harmful_checkpoints_run_nothing(
    where: str, protocol: int, archive: bool, tmp_path: Path
) -> None:
    marker, file = tmp_path / "made", tmp_path / "model.pt"
    for harm in (Calls(marker), Fills(marker)):
        content: dict[str, Any] = {
            "model": {"model": harm},
            "inside": {"model": WEIGHTS | {"b.c": harm}},
            "args": {"model": WEIGHTS, "args": argparse.Namespace(x=[harm])},
            "optimizer": {"model": WEIGHTS, "optimizer": {"state": (1, {2: harm})}},
            "key": {"model": WEIGHTS, "rng_state": OrderedDict(((1, harm),))},
            "whole": harm,  # type: ignore[dict-item]
            "bare": WEIGHTS | {"b.c": harm},
        }
        _save(content[where], file, protocol, archive)
        if isinstance(harm, Fills) and where in ("args", "optimizer", "key"):
            assert read_checkpoint(file).keys() == WEIGHTS.keys()  # unread, and so harmless
        else:
            with pytest.raises(CheckpointError, match=r"found a pickled (posix\.mkdir|\S*Fills)"):
                open_checkpoint(file)
        assert not marker.exists()


def test_no_module_is_imported_for_a_file(tmp_path: Path) -> None:
    (tmp_path / "never_imported.py").write_text("raise SystemExit\n")
    program = b"\x80\x02}X\x05\x00\x00\x00modelcnever_imported\nThing\n)Rs."
    sys.path.insert(0, str(tmp_path))
    try:
        read_pickle(io.BytesIO(program))
    finally:
        sys.path.remove(str(tmp_path))
    assert "never_imported" not in sys.modules


def public_checkpoint() -> dict[str, Any]:
    """As the public code of 2603.23086 saves it: options as a dict, states of three generators."""
    caches = {"layers.0.attention.kv_cache.k_cache": torch.zeros(1, 2, 3)}
    average = {name: tensor / 2 for name, tensor in WEIGHTS.items()}
    return {
        "model": OrderedDict(WEIGHTS | caches),
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-5}]},
        "ema_model": OrderedDict(average | caches),
        "ema_beta": 0.997,
        "args": {"image_size": 384, "out": None},
        "global_step": 10,
        "iteration": 5,
        "rng_state": {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "torch_cpu": torch.get_rng_state(),
            "numpy_new": np.random.default_rng(0).bit_generator.state,
        },
        "stats": {"mu": np.zeros(3), "count": np.int64(3)},
    }


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(("protocol", "archive"), FORMATS)
def test_tensors_are_bit_for_bit_those_of_torch(
    protocol: int, archive: bool, tmp_path: Path
) -> None:
    base = torch.randn(6, 5)
    tensors = {
        "whole": base,
        "transposed": base.T,
        "part": base[1:4, ::2],
        "expanded": torch.ones(1, 1).expand(3, 4),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "scalar": torch.tensor(3.0, dtype=torch.float64),
        "empty": torch.empty(0, 4),
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
        **{str(t): torch.arange(3).to(t) for t in (torch.int64, torch.int32, torch.int16)},
        **{str(t): torch.arange(3).to(t) for t in (torch.int8, torch.uint8, torch.bool)},
        **{str(t): torch.randn(3).to(t) for t in (torch.float16, torch.bfloat16)},
        "complex": torch.randn(2, dtype=torch.complex64),
    }
    if archive:  # torch cannot write these in the old format
        tensors |= {"uint16": torch.arange(3).to(torch.uint16)}
        tensors |= {"float8": torch.randn(3).to(torch.float8_e4m3fn)}
    file = tmp_path / "checkpoint.pt"
    _save(public_checkpoint() | {"model": tensors}, file, protocol, archive)
    expected = torch.load(file, weights_only=False)["model"]
    found = read_checkpoint(file)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        other = expected[name].detach()
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape)
        assert tensor.stride() == other.stride()
        assert _bits(tensor) == _bits(other), name


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _save(content: Any, file: Path, protocol: int, archive: bool) -> None:
    torch.save(content, file, pickle_protocol=protocol, _use_new_zipfile_serialization=archive)


@pytest.mark.parametrize(
    "program",
    [
        b"",
        b"\x80",
        b"\x80\x02.",
        b"\x80\x02(.",
        b"\x80\x02K\x01K\x02a.",  # an item for a number
        b"\x80\x02K\x01N\x86s.",
        b"\x80\x02h\x07.",  # a memo that is not there
        b"\x80\x02K\x01)R.",  # a call of a number
        b"\x80\x02cos\nmkdir\nK\x01R.",  # arguments that are no tuple
        b"\x80\x02]]s.",
        b"\x80\x02}]N\x86u.",
        b"\x80\x02\x82\x01.",  # a numbered extension
        b"\x80\x05\x97.",  # a buffer outside the file
        b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b".",  # more bytes than there are
        b"\x80\x04\x96" + struct.pack("<Q", 1 << 40) + b".",
        b"\x80\x02\x8b" + struct.pack("<i", (1 << 31) - 1) + b".",
        b"\x80\x02N" + b"r" + struct.pack("<I", (1 << 32) - 1),  # a memo of 34 GB, in C
        b"\x80\x02}]" + b"(" * 50 + b"t" * 50 + b"sN",
        b"I" + b"9" * 5000 + b"\n.",
        b"\x80\x02}(]K\x01u.",  # a key that cannot be one
        b"\xff\xff",
    ],
)
def test_damage_is_an_error_of_ours(program: bytes) -> None:
    with pytest.raises(MalformedError):
        read_pickle(io.BytesIO(program))


@pytest.mark.parametrize("name", ["a\x1b[31m\nb", "a\nb\x07", "a" * 5000 + "\nb"])
def test_names_that_no_function_has_reach_no_terminal(name: str) -> None:
    with pytest.raises(MalformedError, match="a name that no function has"):
        read_pickle(io.BytesIO(b"\x80\x02c" + name.encode() + b"\n)R."))


def test_nesting_that_would_end_the_process() -> None:
    """Hashing a tuple in a tuple in a tuple, ..., overflows the stack of C."""
    deep = b")" + b"\x85" * 200_000  # 150,000 are enough
    for program in (
        b"\x80\x02}" + deep + b"Ns.",
        b"\x80\x02(" + deep + b"Nd.",
        b"\x80\x04\x8f(" + deep + b"\x90.",
        b"\x80\x04(" + deep + b"\x91.",
    ):
        assert len(read_pickle(io.BytesIO(program))) == 1


def test_shapes_that_no_tensor_has(tmp_path: Path) -> None:
    """Numbers that are repeated (a step of 0) take no bytes, and could be any number of them."""
    file = tmp_path / "x.pt"
    for shape in ((1 << 50,), (1 << 40, 1 << 40), (1,) * 100, (0, 1 << 40, 1 << 40)):
        record = _Shaped(shape)
        torch.save({"model": {"a": record}}, file, pickle_protocol=2)
        with pytest.raises(CheckpointError, match="a tensor whose shape cannot be"):
            open_checkpoint(file)


class _Shaped:
    """Pickled as a tensor of any shape over one number."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def __reduce__(self) -> Any:
        storage = torch.ones(1)._typed_storage()
        arguments = (storage, 0, self.shape, (0,) * len(self.shape), False, OrderedDict())
        return torch._utils._rebuild_tensor_v2, arguments
