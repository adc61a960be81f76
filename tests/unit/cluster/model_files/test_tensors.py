from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from cluster.errors import CheckpointError
from cluster.model_files.tensors import (
    load_strict,
    locate,
    read_config,
    read_tensors,
    write_tensors,
)


def test_round_trip(tmp_path: Path) -> None:
    file = tmp_path / "net.safetensors"
    write_tensors(file, {"a": torch.ones(2, 3).T}, {"family": "test", "sizes": [1, 2]})
    assert read_config(file) == {"family": "test", "sizes": [1, 2]}
    assert torch.equal(read_tensors(file)["a"], torch.ones(3, 2))


def test_tensors_that_share_memory_are_written_each(tmp_path: Path) -> None:
    """Tied weights and parts of one tensor, overlapping or not; the caller's stay as they are."""
    base = torch.arange(6.0)
    tensors = {"a": base, "tied": base, "part": base[2:4], "next": base[4:]}
    tensors |= {"over": base[3:5], "empty": base[:0], "number": torch.tensor(3)}
    write_tensors(tmp_path / "tied.safetensors", tensors, {})
    found = read_tensors(tmp_path / "tied.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert tensors["tied"] is base


def test_shipped_files_are_found_wherever_the_package_is() -> None:
    assert locate("package://learner.miniature/networks/policy.safetensors").is_file()
    assert locate("package://learner.miniature/networks/clip", directory=True).is_dir()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere.safetensors", "nowhere.safetensors: no such file"),
        ("package://no_such_package/x", "no package named 'no_such_package'"),
        ("package://learner.miniature/networks/missing", "no such file"),
    ],
)
def test_missing_files_are_named(path: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        locate(path)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "net.safetensors"
    write_tensors(file, {"a": torch.ones(100)}, {})
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(CheckpointError, match=r"net\.safetensors: not a whole safetensors file"):
        read_tensors(file)


def test_a_file_without_architecture_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    file = tmp_path / "foreign.safetensors"
    save_file({"a": torch.ones(1)}, file)
    with pytest.raises(CheckpointError, match="no 'config' entry"):
        read_config(file)


def test_strict_loading_names_what_does_not_fit() -> None:
    tensors = nn.Linear(2, 2).state_dict()
    renamed = {"wieght": tensors["weight"], "bias": tensors["bias"]}
    with pytest.raises(CheckpointError, match=r"first is 'weight' \(the file has 'wieght'\)"):
        load_strict(nn.Linear(2, 2), renamed, "some.pt")
    with pytest.raises(CheckpointError, match=r"'weight' has shape \(2, 2\).*expects \(2, 3\)"):
        load_strict(nn.Linear(3, 2), tensors, "some.pt")
    with pytest.raises(CheckpointError, match="1 tensors are unexpected, the first is 'extra'"):
        load_strict(nn.Linear(2, 2), {**tensors, "extra": torch.ones(1)}, "some.pt")


def test_ignored_prefixes_are_left_out() -> None:
    tensors = {**nn.Linear(2, 2).state_dict(), "encoder.weight": torch.ones(1)}
    load_strict(nn.Linear(2, 2), tensors, "some.pt", ignore=("encoder.",))
