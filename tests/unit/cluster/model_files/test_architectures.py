"""Architectures in files: fields of another type or size are named; nothing is built for hours."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from actors.checkpoints.loading import PolicyConfig, load_policy
from actors.checkpoints.taming import read_project
from actors.checkpoints.zoo import FAMILIES
from actors.models.vq import VQConfig
from cluster.errors import CheckpointError, TesseraError
from cluster.model_files.architectures import from_fields
from cluster.model_files.tensors import write_tensors
from rewards.networks.convnet import ConvNetConfig, convnet_config
from tests.unit.actors.checkpoints.test_loading import PROJECT
from tests.unit.helpers import TINY, tiny_policy

WRONG = ("x", -1, 1.5, 1e300, None, [], {}, True, 10**12, 10**30, [10**9], ["a"], [0] * 100)


CONVNET = ConvNetConfig(image_size=8, channels=(4,), num_classes=2)


def attempt(make: Callable[[], Any]) -> tuple[Any, str]:
    """What it makes, or the message of our error."""
    try:
        return make(), ""
    except TesseraError as error:
        return None, str(error)


@pytest.mark.parametrize("config", [TINY, VQConfig(attention_levels=(4,)), CONVNET])
def test_every_field_of_every_type(config: Any) -> None:
    fields = json.loads(json.dumps(config.to_dict()))
    fields.pop("family", None)
    kind = type(config)
    assert from_fields(kind, fields, "a.json") == config
    for name in fields:
        for value in WRONG:
            made, told = attempt(lambda n=name, v=value: from_fields(kind, fields | {n: v}, "a"))  # type: ignore[misc]
            assert made is not None or told.startswith("a: "), (name, value)
            if made is not None:  # of the field's type, and may be meant
                found = getattr(made, name)
                assert isinstance(found, type(getattr(config, name))) or found is None
    with pytest.raises(CheckpointError, match=r"a\.json: architecture field 'wide' is unknown"):
        from_fields(kind, fields | {"wide": 3}, "a.json")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"dim": "x"}, "dim: Input should be a valid integer"),
        ({"dim": 0}, "field 'dim' is 0, expected 1 to"),
        ({"num_layers": 10**9}, "field 'num_layers' is 1000000000, expected 1 to 1024"),
        ({"num_heads": 3}, "not a multiple of 4"),
        ({"norm_eps": -1.0}, "field 'norm_eps' is -1.0, expected a positive number"),
    ],
)
@pytest.mark.parametrize("where", ["json", "header"])
def test_files_that_say_so_are_refused(
    where: str, change: dict[str, Any], told: str, tmp_path: Path
) -> None:
    fields = TINY.to_dict() | change
    tensors = dict(tiny_policy().state_dict())
    if where == "header":
        write_tensors(tmp_path / "own.safetensors", tensors, fields)
        config = PolicyConfig(checkpoint=str(tmp_path / "own.safetensors"))
    else:
        torch.save({"model": tensors}, tmp_path / "p.pt")
        (tmp_path / "a.json").write_text(json.dumps(fields))
        config = PolicyConfig(
            checkpoint=str(tmp_path / "p.pt"), architecture=str(tmp_path / "a.json")
        )
    with pytest.raises(CheckpointError, match=told):
        load_policy(config)


def test_a_convnets_header(tmp_path: Path) -> None:
    write_tensors(tmp_path / "net.safetensors", {"a": torch.ones(1)}, {"family": "convnet"})
    with pytest.raises(CheckpointError, match=r"net\.safetensors: .*image_size: Field required"):
        convnet_config(str(tmp_path / "net.safetensors"))


def places(value: Any, inside: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in nested values."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in items:
        yield (*inside, key)
        if isinstance(part, dict | list):
            yield from places(part, (*inside, key))


def test_every_place_of_a_taming_project(tmp_path: Path) -> None:
    whole = yaml.safe_load(PROJECT)
    file = tmp_path / "x-project.yaml"
    for place in places(whole):
        for value in ("x", 1.5, None, [], 10**12, 0):
            changed = copy.deepcopy(whole)
            part = changed
            for key in place[:-1]:
                part = part[key]
            part[place[-1]] = value
            file.write_text(yaml.safe_dump(changed))
            made, told = attempt(lambda: read_project(file))
            assert made is not None or str(file) in told, (place, value)


def test_every_family_is_read_in_this_way() -> None:
    for kind in (VQConfig, *(family.architecture for family in FAMILIES)):
        with pytest.raises(CheckpointError, match=r"Field required|expected|multiple"):
            from_fields(kind, {"dim": 16} if kind is not VQConfig else {"channels": -1}, "a.json")
