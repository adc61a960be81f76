"""Weights with NaN or infinities are named where they are loaded; so are types too narrow."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from actors.checkpoints.loading import PolicyConfig, TokenizerConfig, load_decoder, load_policy
from actors.weights import main
from cluster.errors import CheckpointError
from cluster.model_files.tensors import (
    load_strict,
    locate,
    read_config,
    read_tensors,
    write_tensors,
)
from cluster.model_files.torchvision_ops import ensure_torchvision
from cluster.model_files.weight_checks import largest, losses
from cluster.program.console import FAILED
from rewards.networks.convnet import load_convnet
from rewards.networks.features import FeaturesConfig, load_features
from rewards.networks.open_clip_models import TextImageModel
from rewards.scorers.hpsv2 import HpsConfig, HpsReward
from tests.unit.actors.checkpoints.test_loading import architecture_file
from tests.unit.helpers import TINY, tiny_policy
from tests.unit.rewards.networks.test_inception import randomise

NETWORKS = "package://learner.miniature/networks"
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float8_e4m3fn])
@pytest.mark.parametrize("layout", ["plain", "transposed", "part", "repeated", "scalar"])
def test_the_largest_magnitude(dtype: torch.dtype, layout: str) -> None:
    for value in (3.0, -3.0, math.nan, math.inf, -math.inf):
        if math.isinf(value) and dtype is torch.float8_e4m3fn:
            continue  # it has none
        whole = torch.linspace(-1, 1, 60).reshape(6, 10)
        whole[3, 4] = value
        tensor = (
            {
                "plain": whole,
                "transposed": whole.T,
                "part": whole[1:5, ::2],
                "repeated": whole[3, 4].expand(1 << 40),
                "scalar": whole[3, 4],
            }[layout].to(dtype)
            if layout != "repeated"
            else whole[3:4, 4].to(dtype).expand(1 << 40)
        )
        assert largest(tensor) == abs(value) or (math.isnan(value) and math.isnan(largest(tensor)))
    assert largest(torch.tensor([7])) == largest(torch.empty(0)) == 0


def test_what_a_type_cannot_hold() -> None:
    weights = {"a": torch.tensor([1e5, -1e6, 65504, 1e-9, 0, 1]), "b": torch.tensor([1e-39, 2.0])}
    half = losses(weights, torch.float16)
    assert half.overflowed == {"a": 2}
    assert half.vanished == {"a": 1, "b": 1}
    with pytest.raises(CheckpointError, match=r"x: 2 numbers of tensor 'a' are beyond float16"):
        half.refuse_overflow("x", torch.float16)
    assert "2 numbers of 2 tensors are too small for float16" in half.warning(torch.float16)
    assert losses({"a": torch.tensor([3.4e38])}, torch.bfloat16).overflowed == {"a": 1}
    assert not losses({"a": torch.tensor([1e5]).bfloat16()}, torch.float32).overflowed
    assert losses({"a": torch.tensor([1e5]).bfloat16()}, torch.float16).overflowed == {"a": 1}
    assert losses({"a": torch.tensor([1e39], dtype=torch.float64)}, torch.float32).overflowed == {
        "a": 1
    }


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_strict_loading_refuses_what_is_not_finite(bad: float) -> None:
    state = nn.Linear(3, 2).state_dict()
    state["weight"][1, 2] = bad
    with pytest.raises(CheckpointError, match=r"x\.pt: tensor 'weight' is not finite: 1 of its 6"):
        load_strict(nn.Linear(3, 2), state, "x.pt")


def test_loading_into_a_type_that_cannot_hold_it(caplog: pytest.LogCaptureFixture) -> None:
    state = nn.Linear(3, 2).state_dict()
    state["weight"][0, 0] = 1e5
    with pytest.raises(CheckpointError, match=r"x\.pt: 1 numbers of tensor 'weight' are beyond"):
        load_strict(nn.Linear(3, 2).half(), state, "x.pt")
    load_strict(nn.Linear(3, 2).bfloat16(), state, "x.pt")
    state["weight"][0, 0] = 1e-12
    with caplog.at_level(logging.WARNING):
        load_strict(nn.Linear(3, 2).half(), state, "x.pt")
    assert "1 numbers of 1 tensors are too small for float16" in caplog.text


def test_a_mask_of_the_module_itself_is_none_of_its_weights() -> None:
    class Masked(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.register_buffer("mask", torch.tensor([0.0, -math.inf]))

    load_strict(Masked(), Masked().state_dict(), "x.pt")
    other = Masked().state_dict() | {"mask": torch.tensor([-math.inf, 0.0])}
    with pytest.raises(CheckpointError, match="'mask' is not finite"):
        load_strict(Masked(), other, "x.pt")


# Everywhere weights are loaded.


def spoiled(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """With one NaN in the last matrix, whose name comes, too."""
    name = [name for name, tensor in tensors.items() if tensor.is_floating_point()][-1]
    worse = {key: tensor.clone() for key, tensor in tensors.items()}
    worse[name].view(-1)[-1] = math.nan
    return worse, name


def ours(name: str, folder: Path) -> tuple[str, str]:
    """A copy of a shipped network with one NaN, and the tensor that has it."""
    source = f"{NETWORKS}/{name}"
    worse, tensor = spoiled(read_tensors(source))
    write_tensors(folder / Path(name).name, worse, read_config(source))
    return str(folder / Path(name).name), tensor


def clip_directory(name: str, folder: Path) -> tuple[str, str]:
    directory = folder / name
    shutil.copytree(locate(f"{NETWORKS}/{name}", directory=True), directory)
    file = directory / "open_clip_model.safetensors"
    worse, tensor = spoiled(read_tensors(file))
    save_file(worse, file)
    return str(directory), tensor


def official(folder: Path, suffix: str) -> tuple[PolicyConfig, str]:
    worse, tensor = spoiled(dict(tiny_policy().state_dict()))
    file = folder / f"policy{suffix}"
    if suffix == ".pt":
        torch.save({"model": worse}, file)
    else:
        save_file(worse, file)
    return PolicyConfig(checkpoint=str(file), architecture=architecture_file(folder)), tensor


def inception(folder: Path) -> tuple[FeaturesConfig, str]:
    from rewards.networks.inception import fid_inception

    worse, tensor = spoiled(dict(randomise(fid_inception()).state_dict()))
    torch.save(worse, folder / "inception.pth")
    return FeaturesConfig(network="inception", checkpoint=str(folder / "inception.pth")), tensor


def tower(folder: Path) -> tuple[FeaturesConfig, str]:
    ensure_torchvision()
    import timm

    from tests.unit.rewards.networks.test_vision_towers import SMALL

    worse, tensor = spoiled(dict(timm.create_model(SMALL, num_classes=0).state_dict()))
    torch.save(worse, folder / "tower.pth")
    file = str(folder / "tower.pth")
    return FeaturesConfig(network="dinov2", model=SMALL, checkpoint=file), tensor


CASES: dict[str, Callable[[Path], tuple[Any, str, Callable[[Any], object]]]] = {
    "our policy": lambda f: (
        *ours("policy.safetensors", f),
        lambda file: load_policy(PolicyConfig(checkpoint=file)),
    ),
    "official policy": lambda f: (*official(f, ".pt"), load_policy),
    "safetensors of another tool": lambda f: (*official(f, ".safetensors"), load_policy),
    "tokenizer": lambda f: (
        *ours("tokenizer.safetensors", f),
        lambda file: load_decoder(TokenizerConfig(checkpoint=file)),
    ),
    "convnet": lambda f: (*ours("judge.safetensors", f), lambda file: load_convnet(file, "cpu")),
    "clip": lambda f: (*clip_directory("clip", f), lambda d: TextImageModel(d, "", "cpu")),
    "preference": lambda f: (
        *clip_directory("preference", f),
        lambda directory: HpsReward(HpsConfig(model=directory)),
    ),
    "inception": lambda f: (*inception(f), load_features),
    "vision tower": lambda f: (*tower(f), load_features),
}


@pytest.mark.parametrize("case", CASES)
def test_every_reader_names_the_tensor(case: str, tmp_path: Path) -> None:
    source, tensor, load = CASES[case](tmp_path)
    with pytest.raises(CheckpointError, match=rf"tensor '\S*{tensor}' is not finite: 1 of its"):
        load(source)


def test_adapters_name_the_tensor() -> None:
    from learner.training.lora import Adapters, LoraConfig

    adapters = Adapters(tiny_policy(), LoraConfig(rank=2))
    worse, tensor = spoiled(adapters.tensors())
    with pytest.raises(CheckpointError, match=rf"a\.safetensors: tensor '{tensor}' is not finite"):
        adapters.load(worse, "a.safetensors")


# Conversions.


def convert(folder: Path, change: Callable[[Tensor], None], dtype: str) -> int:
    tensors = {name: tensor.clone() for name, tensor in tiny_policy().state_dict().items()}
    change(tensors["norm.weight"])
    torch.save({"model": tensors}, folder / "a.pt")
    options = ["--architecture", architecture_file(folder), "--dtype", dtype]
    return main(["convert", str(folder / "a.pt"), str(folder / "b.safetensors"), *options])


def set_to(value: float) -> Callable[[Tensor], None]:
    return lambda tensor: tensor[:2].fill_(value)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("value", "dtype", "told"),
    [
        (
            1e5,
            "float16",
            "2 numbers of tensor 'norm.weight' are beyond float16, whose largest is",
        ),
        (-7e4, "float16", "are beyond float16"),
        (3.4e38, "bfloat16", "are beyond bfloat16"),
        (math.nan, "keep", "'norm.weight' is not finite: 2 of its 32 numbers are NaN or infinite"),
        (math.inf, "float32", "'norm.weight' is not finite"),
    ],
)
def test_conversions_that_would_destroy_are_refused(
    value: float, dtype: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(tmp_path, set_to(value), dtype) == FAILED
    error = capsys.readouterr().err
    assert "a.pt" in error
    assert told in error
    assert not (tmp_path / "b.safetensors").exists()


def test_conversions_that_lose_small_numbers_say_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(tmp_path, set_to(1e-9), "float16") == 0
    told = capsys.readouterr()
    assert "2 numbers of 1 tensors are too small for float16 and become 0" in told.out + told.err
    assert read_tensors(tmp_path / "b.safetensors")["norm.weight"][0] == 0
    (tmp_path / "b.safetensors").unlink()
    assert convert(tmp_path, set_to(65504.0), "float16") == 0
    told = capsys.readouterr()
    assert "too small" not in told.out + told.err
    assert read_tensors(tmp_path / "b.safetensors")["norm.weight"][0] == 65504


def test_export_refuses_what_is_not_finite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    worse, tensor = spoiled(dict(tiny_policy().state_dict()))
    write_tensors(tmp_path / "own.safetensors", worse, TINY.to_dict())
    assert main(["export", str(tmp_path / "own.safetensors"), str(tmp_path / "b.pt")]) == FAILED
    assert f"own.safetensors: tensor '{tensor}' is not finite" in capsys.readouterr().err
