"""The reader of checkpoints: layouts, wrappers, kinds, shards; each file by its own tool."""

from __future__ import annotations

import gzip
import json
import mmap
import random
import tarfile
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import Tensor, nn

import cluster.model_files.tensors
from cluster.errors import CheckpointError
from cluster.model_files.checkpoints import open_checkpoint, read_checkpoint
from cluster.model_files.tensors import load_strict, read_tensors
from cluster.model_files.torchvision_ops import ensure_torchvision
from tests.file_rows import reads
from tests.fuzzing import check_reader
from tests.unit.actors.checkpoints.test_official import same
from tests.unit.cluster.model_files.test_pickles import WEIGHTS, public_checkpoint


class Net(nn.Module):
    """Blocks in a list, as transformers have them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(3, 3)) for _ in range(2))
        self.head = nn.Linear(3, 2)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


def state_of(net: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}


# Layouts.


@reads("actors/README.md", "`.pt` `.pth` `.ckpt` `.bin` of `torch.save`")
@pytest.mark.parametrize(
    "content",
    [
        WEIGHTS,
        {"model": WEIGHTS, "optimizer": {"state": {}}, "epoch": 3},
        {"module": WEIGHTS, "dp_world_size": 1},
        {"state_dict": WEIGHTS, "callbacks": {}},
        {"model_state_dict": WEIGHTS, "loss": torch.tensor(1.0)},
        {"params": WEIGHTS, "params_ema": {}},
        {"state_dict": {"model": WEIGHTS}},
        {"model": "ViT-L", "state_dict": WEIGHTS, "params": {"lr": 1e-3}},
        {"ema": 0.999, "model": WEIGHTS},
    ],
)
@pytest.mark.parametrize("name", ["model.pt", "MODEL.PT", "model.ckpt", "model.safetensors", "m"])
def test_layouts(content: dict[str, Any], name: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / name)
    assert same(read_checkpoint(tmp_path / name), WEIGHTS)


@pytest.mark.parametrize("key", ["ema", "ema_model", "model_ema", "state_dict_ema", "params_ema"])
def test_averages(key: str, tmp_path: Path) -> None:
    average = {name: tensor / 2 for name, tensor in WEIGHTS.items()}
    torch.save({"model": WEIGHTS, key: average, "ema_beta": 0.9}, tmp_path / "a.pt")
    assert same(dict(open_checkpoint(tmp_path / "a.pt", ema=True).read()), average)
    torch.save({"model": WEIGHTS, key: None}, tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match=f"{key}' is empty: the trainer kept no average"):
        open_checkpoint(tmp_path / "none.pt", ema=True)
    save_file(WEIGHTS, tmp_path / "one.safetensors")
    with pytest.raises(CheckpointError, match="files of this kind hold one set of weights"):
        open_checkpoint(tmp_path / "one.safetensors", ema=True)


@reads("actors/README.md", "`checkpoint-last.pth`")
@pytest.mark.parametrize("archive", [True, False])
def test_the_public_codes_checkpoint(archive: bool, tmp_path: Path) -> None:
    from actors.checkpoints.official import open_official

    file = tmp_path / "checkpoint-last.pth"
    torch.save(public_checkpoint(), file, _use_new_zipfile_serialization=archive)
    found = open_official(file)
    assert same(found.tensors, WEIGHTS)
    assert found.buffers == {"layers.0.attention.kv_cache.k_cache": (1, 2, 3)}
    assert found.options["image_size"] == 384
    average = {name: tensor / 2 for name, tensor in WEIGHTS.items()}
    assert same(open_official(file, ema=True).tensors, average)


def test_nothing_but_the_weights_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An optimizer whose bytes are damaged does not matter; weights whose bytes are, do."""
    file = tmp_path / "model.pt"
    state = {"weights": torch.full((64,), 1.5), "more": torch.full((64,), 2.5)}
    torch.save({"model": state, "optimizer": {"exp_avg": torch.full((64,), 3.5)}}, file)
    whole = file.read_bytes()
    file.write_bytes(whole.replace(np.float32(3.5).tobytes() * 64, b"\xff" * 256))
    built: list[int] = []
    plain = torch.frombuffer

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        built.append(kwargs["count"])
        return plain(*args, **kwargs)

    monkeypatch.setattr(torch, "frombuffer", counted)
    opened = open_checkpoint(file)
    assert built == []
    assert opened.read(["more"])["more"][0] == 2.5
    assert len(built) == 1
    assert same(opened.read(), state)
    file.write_bytes(whole.replace(np.float32(1.5).tobytes() * 64, b"\x00" * 256))
    with pytest.raises(CheckpointError, match=r"tensor 'weights': the checksum .* differs"):
        read_checkpoint(file)


# Wrappers.


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    import torch.distributed as dist

    rendezvous = f"file://{tmp_path / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@reads("actors/README.md", "state dicts of wrapped modules")
def test_names_of_real_wrappers(net: Net, group: None, tmp_path: Path) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.nn.parallel import DistributedDataParallel
    from torch.optim.swa_utils import AveragedModel

    plain = state_of(net)
    states = {
        "ddp": DistributedDataParallel(net).state_dict(),
        "compile": torch.compile(net).state_dict(),
        "ddp of compile": DistributedDataParallel(torch.compile(net)).state_dict(),  # type: ignore[arg-type]
        "compile of ddp": torch.compile(DistributedDataParallel(net)).state_dict(),
        "average": AveragedModel(net).state_dict(),
        "average of ddp": AveragedModel(DistributedDataParallel(net)).state_dict(),
    }
    for index in range(2):
        net.blocks[index] = torch.compile(checkpoint_wrapper(net.blocks[index]))  # type: ignore[assignment]
    states["blocks"] = dict(net.named_parameters())
    assert "blocks.0._orig_mod._checkpoint_wrapped_module.0.weight" in states["blocks"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sharded = FullyShardedDataParallel(net, device_id=torch.device("cpu"), use_orig_params=True)
    states["fsdp"] = dict(sharded.named_parameters())
    assert any(name.startswith("_fsdp_wrapped_module.blocks.0._orig") for name in states["fsdp"])
    for name, state in states.items():
        torch.save({"model": state}, tmp_path / "x.pt")
        assert same(read_checkpoint(tmp_path / "x.pt"), plain), name


def test_wrappers_in_any_order_and_place(tmp_path: Path) -> None:
    draw = random.Random(0)
    wrappers = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
    for _ in range(20):
        state = {}
        for name, tensor in WEIGHTS.items():
            parts: list[str] = []
            for part in name.split("."):
                parts += [*draw.choices(wrappers, k=draw.randrange(3)), part]
            state[".".join(parts)] = tensor
        torch.save(state, tmp_path / "x.pt")
        assert same(read_checkpoint(tmp_path / "x.pt"), WEIGHTS), list(state)
        save_file(state, tmp_path / "x.safetensors")
        assert same(read_checkpoint(tmp_path / "x.safetensors"), WEIGHTS)
    torch.save({"module.a": torch.ones(1), "a": torch.ones(1)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"'module\.a' and 'a' are both 'a' without"):
        read_checkpoint(tmp_path / "x.pt")
    for name in ("modules.a", "my_module.a", "a_orig_mod"):  # parts of names that are not whole
        torch.save({name: torch.ones(1)}, tmp_path / "x.pt")
        assert list(read_checkpoint(tmp_path / "x.pt")) == [name]


def test_strict_after_that(net: Net, tmp_path: Path) -> None:
    state = {f"module.{name}": tensor for name, tensor in state_of(net).items()}
    torch.save(state | {"module.extra": torch.ones(1)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="1 tensors are unexpected, the first is 'extra'"):
        load_strict(net, read_checkpoint(tmp_path / "x.pt"), "x.pt")


# What is no checkpoint.


def test_files_that_are_none_are_distinguished(net: Net, tmp_path: Path) -> None:
    torch.save(net.state_dict(), tmp_path / "good.pt")
    good = (tmp_path / "good.pt").read_bytes()
    kinds: dict[str, tuple[Any, str]] = {
        "script.pt": (lambda f: torch.jit.script(nn.Linear(2, 2)).save(f), "TorchScript.*`openai`"),
        "page.pt": (lambda f: f.write_text("<!DOCTYPE html><html>"), "found a web page;.*fetch"),
        "lfs.safetensors": (
            lambda f: f.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
            "Git LFS pointer; run `git lfs pull`",
        ),
        "cut.pt": (lambda f: f.write_bytes(good[: len(good) // 2]), "was cut off.*fetch it again"),
        "empty.pt": (lambda f: f.write_bytes(b""), "an empty file; fetch it again"),
        "whole.pt": (lambda f: torch.save(net, f), r"pickled tests\S+\.Net, which is refused"),
        "half.pt": (lambda f: torch.save({"model": net}, f), r"pickled \S+Net under 'model'"),
        "plain.pt": (
            lambda f: f.write_bytes(__import__("pickle").dumps({"a": 1})),
            "a pickle that torch.save did not write.*any program",
        ),
        "arrays.pt": (lambda f: np.savez(f.open("wb"), a=np.ones(2)), r"an \.npz file of arrays"),
        "w.msgpack": (lambda f: f.write_bytes(b"\x81\xa6params\x80"), "flax's msgpack"),
        "w.h5": (lambda f: f.write_bytes(b"\x89HDF\r\n\x1a\n\0\0"), "as Keras writes"),
        "w.gguf": (lambda f: f.write_bytes(b"GGUF\3\0\0\0"), "a GGUF file"),
        "w.pt.gz": (lambda f: f.write_bytes(gzip.compress(good)), "a gzip file; unpack it first"),
        "w.zip": (lambda f: _zipped(f, good), r"a zip archive with inner/good\.pt in it; unpack"),
        "w.tar": (
            lambda f: _tarred(f, tmp_path / "good.pt"),
            r"a tar archive \(good\.pt.*; unpack",
        ),
        "old.pt": (lambda f: _tarred(f, *_old(tmp_path)), r"a file of torch before 0\.2"),
        "none.safetensors": (lambda f: save_file({}, f), "a safetensors file without a tensor"),
        "text.pt": (
            lambda f: f.write_text("see README"),
            "begins with 'see README'",
        ),
    }
    for name, (write, told) in kinds.items():
        write(tmp_path / name)
        with pytest.raises(CheckpointError, match=rf"{name}: .*{told}"):
            open_checkpoint(tmp_path / name)
    with pytest.raises(CheckpointError, match="no such file"):
        open_checkpoint(tmp_path / "absent.pt")


def _zipped(file: Path, data: bytes) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("inner/good.pt", data)


def _tarred(file: Path, *inside: Path) -> None:
    with tarfile.open(file, "w") as archive:
        for member in inside:
            archive.add(member, member.name)


def _old(folder: Path) -> list[Path]:
    files = [folder / name for name in ("sys_info", "pickle", "storages", "tensors")]
    for file in files:
        file.write_bytes(b"x")
    return files


def test_directories_are_distinguished(net: Net, group: None, tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    made: dict[str, str] = {
        "dcp": "of torch.distributed.checkpoint.*dcp_to_torch",
        "zero3": r"DeepSpeed's ZeRO-3.*zero_to_fp32\.py",
        "zero1": r"of DeepSpeed: name .*mp_rank_00_model_states\.pt",
        "torn": r"shards \(model-00001-of-00002.safetensors, \.\.\.\) and no .*index\.json",
        "several": r"with a\.pt, b\.pt: name one of them",
        "bare": "with none in it",
    }
    for name in made:
        (tmp_path / name).mkdir()
    dcp.save({"model": net.state_dict()}, checkpoint_id=str(tmp_path / "dcp"))
    for name, file in (
        ("zero3", "global_step1/zero_pp_rank_0_mp_rank_00_model_states.pt"),
        ("zero1", "global_step1/mp_rank_00_model_states.pt"),
        ("torn", "model-00001-of-00002.safetensors"),
        ("several", "a.pt"),
        ("several", "b.pt"),
        ("bare", "config.json"),
    ):
        (tmp_path / name / file).parent.mkdir(exist_ok=True)
        (tmp_path / name / file).write_text("{}")
    for name, told in made.items():
        with pytest.raises(CheckpointError, match=f"{name}: expected a checkpoint, .*{told}"):
            open_checkpoint(tmp_path / name)


def test_tensors_that_are_no_plain_numbers(net: Net, group: None, tmp_path: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    odd: dict[str, tuple[Tensor, str]] = {
        "sparse": (torch.eye(3).to_sparse(), "sparse; save its to_dense"),
        "compressed": (torch.eye(3).to_sparse_csr(), "sparse; save its to_dense"),
        "meta": (torch.empty(3, device="meta"), "meta device"),
        "quantised": (torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "quantised"),
        "distributed": (distribute_tensor(torch.ones(4), mesh), "distributed tensor"),
    }
    for name, (tensor, told) in odd.items():
        torch.save({"model": {"fine": torch.ones(1), "odd": tensor}}, tmp_path / "x.pt")
        opened = open_checkpoint(tmp_path / "x.pt")
        assert opened.read(["fine"])["fine"] == 1
        with pytest.raises(CheckpointError, match=f"tensor 'odd' is .*{told}"):
            opened.read()
        with pytest.raises(CheckpointError, match=f"tensor 'odd' is .*{told}"):
            opened.shapes()
        del name
    linear = nn.Linear(2, 2)
    emptied = {name: tensor[:0] for name, tensor in linear.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"'weight' is empty, of shape \(0, 2\): ZeRO-3"):
        load_strict(linear, emptied, "x.pt")


def test_adapters_are_no_model(net: Net, tmp_path: Path) -> None:
    ensure_torchvision()
    from peft import LoraConfig, get_peft_model

    peft = get_peft_model(net, LoraConfig(r=2, target_modules=["head"]))  # type: ignore[arg-type]
    peft.save_pretrained(tmp_path / "adapters")
    with pytest.raises(CheckpointError, match=r"of peft's adapters.*merge_and_unload"):
        open_checkpoint(tmp_path / "adapters")
    with pytest.raises(CheckpointError, match=r"low-rank adapter's; merge"):
        open_checkpoint(tmp_path / "adapters" / "adapter_model.safetensors")
    torch.save(peft.state_dict(), tmp_path / "all.pt")
    with pytest.raises(CheckpointError, match=r"low-rank adapter's; merge"):
        open_checkpoint(tmp_path / "all.pt")
    merged = peft.merge_and_unload()
    torch.save(merged.state_dict(), tmp_path / "merged.pt")
    assert same(read_checkpoint(tmp_path / "merged.pt"), state_of(merged))


# safetensors and shards.


@reads("actors/README.md", "`.safetensors` of other tools")
@pytest.mark.parametrize("name", ["model.safetensors", "model.pt", "MODEL.SAFETENSORS"])
def test_safetensors_whatever_they_are_called(name: str, tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / name, metadata={"format": "pt"})
    assert same(read_checkpoint(tmp_path / name), WEIGHTS)
    whole = (tmp_path / name).read_bytes()
    for cut in (9, 40, len(whole) - 1):
        (tmp_path / name).write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match=f"{name}: not a whole safetensors file"):
            read_checkpoint(tmp_path / name)


@reads("actors/README.md", "directory with `*.index.json` and shards")
@pytest.mark.parametrize("safe", [True, False])
def test_shards_as_the_hubs_library_writes_them(safe: bool, net: Net, tmp_path: Path) -> None:
    from huggingface_hub import save_torch_state_dict

    save_torch_state_dict(net.state_dict(), tmp_path, max_shard_size=40, safe_serialization=safe)
    index = next(tmp_path.glob("*.index.json"))
    with pytest.raises(CheckpointError, match="files of this kind hold one set of weights"):
        open_checkpoint(tmp_path, ema=True)
    shards = sorted(tmp_path.glob("*-of-*"))
    assert len(shards) > 2
    assert same(read_checkpoint(tmp_path), state_of(net))
    assert same(read_checkpoint(index), state_of(net))
    with pytest.raises(CheckpointError, match=rf"{shards[0].name}: this is one of \d+ shards"):
        read_checkpoint(shards[0])
    kept = shards[1].read_bytes()
    shards[1].unlink()
    with pytest.raises(
        CheckpointError, match=rf"1 of {len(shards)} shards .* is '{shards[1].name}"
    ):
        read_checkpoint(tmp_path)
    shards[1].write_bytes(shards[0].read_bytes())
    with pytest.raises(CheckpointError, match=rf"{shards[1].name}: {index.name} .* tensor '"):
        read_checkpoint(tmp_path)
    shards[1].write_bytes(kept[: len(kept) // 2])
    with pytest.raises(CheckpointError, match=f"{shards[1].name}: "):
        read_checkpoint(tmp_path)
    for text in ("", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 3}}'):
        index.write_text(text)
        with pytest.raises(CheckpointError, match=rf"{index.name}: "):
            read_checkpoint(tmp_path)
    for place in ("../x.safetensors", "/x.safetensors", "..", "a/b.bin", ""):
        index.write_text(json.dumps({"weight_map": {"a": place}}))
        with pytest.raises(CheckpointError, match="must name files beside the index"):
            read_checkpoint(tmp_path)


# Damage.


def _loads(net: Net) -> Any:
    """Reads a file into the network, as every reader of weights does."""

    def read(file: Path) -> dict[str, Tensor]:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", "invalid escape", DeprecationWarning)  # pickletools'
            load_strict(net, read_checkpoint(file), str(file))
        return state_of(net)

    return read


@pytest.mark.parametrize("first", [0, 250])
def test_damaged_archives(first: int, net: Net, tmp_path: Path) -> None:
    """They have checksums: an error, or the very same tensors."""
    file, plain = tmp_path / "x.pt", state_of(net)
    torch.save(public_checkpoint() | {"model": plain}, file)
    check_reader(file, _loads(net), 250, first=first, good=lambda found: same(found, plain))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["legacy", "safetensors"])
def test_damaged_files_without_checksums(kind: str, net: Net, tmp_path: Path) -> None:
    """An error, or finite tensors of the right names and shapes."""
    file, plain = tmp_path / "x", state_of(net)
    if kind == "legacy":
        torch.save({"model": plain}, file, _use_new_zipfile_serialization=False)
    else:
        save_file(plain, file)

    def good(found: object) -> bool:
        return all(tensor.isfinite().all() for tensor in found.values())  # type: ignore[attr-defined]

    check_reader(file, _loads(net), 500, good=good)


def test_damaged_indexes(net: Net, tmp_path: Path) -> None:
    from huggingface_hub import save_torch_state_dict

    save_torch_state_dict(net.state_dict(), tmp_path, max_shard_size=60)
    index, plain = next(tmp_path.glob("*.index.json")), state_of(net)
    check_reader(index, _loads(net), 500, good=lambda found: same(found, plain))  # type: ignore[arg-type]


# What other tools put beside and around weights.


def misread(content: Any, file: Path, **options: Any) -> str:
    """The message for a file with this content."""
    torch.save(content, file)
    with pytest.raises(CheckpointError) as found:
        open_checkpoint(file, **options)
    return str(found.value)


def test_names_that_are_no_text_and_long_ones(tmp_path: Path) -> None:
    """A number of more digits than Python prints is no reason for a traceback."""
    file, tensor = tmp_path / "a.pt", torch.ones(1)
    assert "found Tensor under (int)" in misread({10**5000: tensor}, file)
    assert "under (int)" in misread({"model": {10**5000: tensor}}, file)
    assert "the entries (int), 'a'" in misread({10**5000: 1, "a": 2}, file)
    assert len(misread({"x" * 100_000: 1}, file)) < 1000
    assert len(misread({"model": {"x" * 100_000: 1}}, file)) < 1000


def test_a_file_with_an_average_alone_says_that_ema_takes_it(tmp_path: Path) -> None:
    file = tmp_path / "a.pt"
    assert "set ema for the average under 'ema'" in misread({"ema": WEIGHTS, "steps": 3}, file)
    assert same(dict(open_checkpoint(file, ema=True).read()), WEIGHTS)
    assert "save the ones you mean" in misread({"ema": 0.99, "net": WEIGHTS}, file)


def test_weights_of_a_part_of_another_module_are_reported_by_its_name(
    net: Net, tmp_path: Path
) -> None:
    """Lightning's modules hold the model as an attribute, whose name stands before all others."""
    for prefix in ("model.", "net.inner."):
        state = {prefix + name: tensor for name, tensor in state_of(net).items()}
        torch.save({"state_dict": state | {"loss.scale": torch.ones(1)}}, tmp_path / "a.ckpt")
        with pytest.raises(CheckpointError, match=f"names of its weights begin with '{prefix}'"):
            load_strict(net, read_checkpoint(tmp_path / "a.ckpt"), "a.ckpt")


def test_tied_weights_that_safetensors_left_out(tmp_path: Path) -> None:
    """save_model writes one of two tensors that are the same, and notes the other's name."""
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    save_model(tied, str(tmp_path / "tied.safetensors"))
    assert same(read_checkpoint(tmp_path / "tied.safetensors"), state_of(tied))


def test_files_beyond_this_machines_memory(
    net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux refuses a map that may be written to and is larger than memory; optimizers make files
    that large, of which the weights alone are read."""
    plain = mmap.mmap

    def refused(number: int, length: int, access: int) -> mmap.mmap:
        if access == mmap.ACCESS_COPY:
            raise OSError(12, "Cannot allocate memory")
        return plain(number, length, access=access)

    torch.save({"model": net.state_dict()}, tmp_path / "a.pt")
    monkeypatch.setattr(mmap, "mmap", refused)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(read_checkpoint(tmp_path / "a.pt"), state_of(net))
    save_file(state_of(net), tmp_path / "a.safetensors")

    def no_map(*_: Any, framework: str, **__: Any) -> Any:
        raise RuntimeError("unable to mmap 42949910640 bytes: Cannot allocate memory (12)")

    monkeypatch.setattr(cluster.model_files.tensors, "safe_open", no_map)
    for read in (read_checkpoint, read_tensors):
        with pytest.raises(CheckpointError, match=r"cannot be read .*larger than this machine's"):
            read(tmp_path / "a.safetensors")


@pytest.mark.parametrize("text", ["Access denied: quota", '{"error": "Entry not found"}', "<?xml"])
def test_what_a_server_answered_is_shown(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_text(text)
    with pytest.raises(CheckpointError, match=r"begins with .*a server answered, fetch the file"):
        open_checkpoint(tmp_path / "a.pt")
