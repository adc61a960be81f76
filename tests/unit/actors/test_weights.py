from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from torch import Tensor

from actors.checkpoints.loading import PolicyConfig, load_policy
from actors.checkpoints.official import open_official
from actors.checkpoints.taming import official_policy_tensors
from actors.checkpoints.zoo import find_model
from actors.models.taming import TamingConfig, TamingGPT
from actors.models.vq import VQConfig, VQTokenizer
from actors.weights import main
from cluster.io.run_layout import MANIFEST
from cluster.model_files.tensors import read_config, read_tensors, write_tensors
from cluster.program.console import FAILED, INTERRUPTED, REFUSED
from tests.unit.helpers import TINY, tiny_policy

Tensors = dict[str, Tensor]
NAME, FILE = "llamagen-b-256", "c2i_B_256.pt"
BYTES = b"the official file" * 1000
SHA256 = hashlib.sha256(BYTES).hexdigest()


def bits(tensor: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return tensor.dtype, tensor.shape, tensor.contiguous().view(torch.uint8).numpy().tobytes()


def same(found: Tensors, expected: Tensors) -> bool:
    """Names, dtypes, shapes and bytes."""
    return found.keys() == expected.keys() and all(
        bits(found[name]) == bits(expected[name]) for name in expected
    )


def architecture_file(folder: Path, config: Any = TINY) -> str:
    file = folder / "architecture.json"
    file.write_text(json.dumps(config.to_dict()))
    return str(file)


def plain(path: Path) -> Any:
    """As the official scripts read it."""
    return torch.load(path, map_location="cpu", weights_only=True)


# Fetching, from a hub that is a function.


class Hub:
    """A fake hub: stated metadata, sent bytes."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.stated, self.sent = SHA256, BYTES
        self.error: Exception | None = None
        """Raised when the hub is asked about a file."""
        self.breaks: BaseException | None = None
        """Raised in the middle of a transfer."""
        self.offsets: list[int] = []
        """Where each transfer began."""

    def visible(self) -> list[str]:
        return sorted(
            file.name for file in self.directory.iterdir() if not file.name.startswith(".")
        )

    def metadata(self, url: str, **options: Any) -> Any:
        if self.error:
            raise self.error
        assert url.endswith(f"/FoundationVision/LlamaGen/resolve/main/{FILE}")
        return SimpleNamespace(etag=self.stated, commit_hash="c0ffee", size=len(self.sent))

    def download(self, url: str, stream: Any, *, resume_size: int, **options: Any) -> None:
        """Fails after 100 bytes, if an error is set."""
        assert url.endswith(f"/FoundationVision/LlamaGen/resolve/c0ffee/{FILE}")
        assert options["expected_size"] == len(self.sent)
        self.offsets.append(resume_size)
        stream.write(self.sent[resume_size : resume_size + 100 if self.breaks else None])
        if self.breaks:
            raise self.breaks


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    hub = Hub(tmp_path / "weights")
    monkeypatch.setenv("TESSERA_WEIGHTS", str(hub.directory))
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", hub.metadata)
    monkeypatch.setattr(huggingface_hub.file_download, "http_get", hub.download)
    return hub


def test_fetch_verifies_and_stores_the_checksum(
    hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fetch", NAME]) == 0
    assert (hub.directory / FILE).read_bytes() == BYTES
    assert (hub.directory / f"{FILE}.sha256").read_text() == f"{SHA256}  {FILE}\n"
    assert hub.visible() == [FILE, f"{FILE}.sha256"]
    assert not list(hub.directory.glob(".*.part"))
    assert main(["fetch", NAME]) == 0
    assert hub.offsets == [0]
    assert "already, SHA-256 as noted" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("llamagen-b", "llamagen-b-256"),
        ("llamagen-l", "llamagen-l-256"),
        ("llamagen-xl", "llamagen-xl-384"),  # no file of 256 pixels is published
        ("llamagen-3b", "llamagen-3b-384"),
        ("LlamaGen_B_384", "llamagen-b-384"),
        ("llamgen-b-256", "llamagen-b-256"),
        ("llamagen-vq", "llamagen-vq-16"),
        ("cin", "cin_transformer"),
        ("c2i_L_384.pt", "llamagen-l-384"),
    ],
)
def test_the_nearest_name_is_suggested(
    written: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fetch", written]) == REFUSED
    assert f"did you mean {meant!r}?" in capsys.readouterr().err


def test_a_name_like_no_other_has_no_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fetch", "zzz"]) == REFUSED
    assert "did you mean" not in capsys.readouterr().err


def test_fetch_into_another_directory(hub: Hub, tmp_path: Path) -> None:
    assert main(["fetch", NAME, "--directory", str(tmp_path / "elsewhere")]) == 0
    assert (tmp_path / "elsewhere" / FILE).is_file()


def test_a_wrong_checksum_keeps_nothing(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.sent = BYTES[:-1] + b"?"
    assert main(["fetch", NAME]) == FAILED
    error = capsys.readouterr().err
    assert SHA256 in error
    assert hashlib.sha256(hub.sent).hexdigest() in error
    assert "nothing was kept" in error
    assert hub.visible() == []
    assert not list(hub.directory.glob(".*.part"))


def test_a_hub_without_a_checksum_is_refused(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.stated = "b5e9"
    assert main(["fetch", NAME]) == FAILED
    assert "states no SHA-256" in capsys.readouterr().err
    assert hub.offsets == []


def test_a_file_placed_by_hand_is_verified(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.directory.mkdir()
    (hub.directory / FILE).write_bytes(BYTES)
    hub.error = ConnectionError("mirror.invalid")
    assert main(["fetch", NAME]) == REFUSED
    assert "is there, but was not compared" in capsys.readouterr().err
    hub.error = None
    assert main(["fetch", NAME]) == 0
    assert (hub.directory / f"{FILE}.sha256").is_file()
    (hub.directory / FILE).write_bytes(b"damaged")
    assert main(["fetch", NAME]) == FAILED
    assert "says" in capsys.readouterr().err
    (hub.directory / f"{FILE}.sha256").unlink()
    assert main(["fetch", NAME]) == FAILED
    assert "move the file away" in capsys.readouterr().err
    assert hub.offsets == []


@pytest.mark.parametrize(
    "error",
    [
        huggingface_hub.errors.OfflineModeIsEnabled("mirror.invalid"),
        huggingface_hub.errors.FileMetadataError("mirror.invalid"),
        huggingface_hub.errors.HfHubHTTPError.__mro__[1]("mirror.invalid"),
        ConnectionResetError("mirror.invalid"),
        TimeoutError("mirror.invalid"),
    ],
)
def test_no_network_says_what_to_place_where(
    error: Exception, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.error = error
    assert main(["fetch", NAME]) == REFUSED
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert f"place {FILE} of https://huggingface.co/FoundationVision/LlamaGen at" in message
    assert str(hub.directory / FILE) in message
    assert "mirror" not in message


def test_a_broken_transfer_resumes(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    for error, status in ((ConnectionResetError(), REFUSED), (KeyboardInterrupt(), INTERRUPTED)):
        hub.breaks = error
        assert main(["fetch", NAME]) == status
        assert hub.visible() == []
    hub.breaks = OSError("Consistency check failed")
    assert main(["fetch", NAME]) == REFUSED
    assert "the transfer broke off" in capsys.readouterr().err
    hub.breaks = None
    assert main(["fetch", NAME]) == 0
    assert hub.offsets == [0, 100, 200, 300]
    assert (hub.directory / FILE).read_bytes() == BYTES


def test_a_part_of_another_file_is_not_resumed(hub: Hub) -> None:
    hub.breaks = ConnectionResetError()
    main(["fetch", NAME])
    hub.breaks, hub.sent = None, b"a newer file"
    hub.stated = hashlib.sha256(hub.sent).hexdigest()
    assert main(["fetch", NAME]) == 0
    assert (hub.directory / FILE).read_bytes() == hub.sent


def test_a_directory_that_cannot_be_written(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.directory.write_text("a file")
    assert main(["fetch", NAME]) == FAILED
    assert f"cannot keep {FILE} there (File exists)" in capsys.readouterr().err


def test_a_refusal_of_the_hub_is_no_network_failure(
    hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    error = huggingface_hub.errors.HfHubHTTPError.__new__(huggingface_hub.errors.HfHubHTTPError)
    error.response = SimpleNamespace(status_code=404)  # type: ignore[assignment]
    hub.error = error
    assert main(["fetch", NAME]) == FAILED
    assert f"the hub refuses {FILE}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("llamagen-b-265", "did you mean 'llamagen-b-256'"),
        ("llamagen-3b-256", "no official file of llamagen-3b-256 is published"),
        ("cin_transformer", "cin_transformer-project.yaml"),
    ],
)
def test_what_the_hub_does_not_have(
    name: str, message: str, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fetch", name]) == REFUSED
    assert message in capsys.readouterr().err


def test_list_names_what_is_fetched(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    main(["fetch", NAME])
    capsys.readouterr()
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if NAME in line)
    assert "111 M" in row
    assert "16x16" in row
    assert f"{FILE}, 17 kB" in row
    assert "not fetched" in next(line for line in lines if "llamagen-b-384" in line)
    assert "none published" in next(line for line in lines if "llamagen-xl-256" in line)


# Converting and exporting.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["model", "fsdp"])
def test_the_round_trip_is_bitwise(layout: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = dict(tiny_policy().to(dtype).state_dict())
    official, own, back = (tmp_path / n for n in ("a.pt", "b.safetensors", "c.pt"))
    torch.save({"model": tensors} if layout == "model" else tensors, official)
    architecture = architecture_file(tmp_path)
    assert main(["convert", str(official), str(own), "--architecture", architecture]) == 0
    assert read_config(own) == TINY.to_dict()
    assert same(read_tensors(own), tensors)
    options = ["--layout", "fsdp"] if layout == "fsdp" else []
    assert main(["export", str(own), str(back), *options]) == 0
    exported = plain(back)
    assert same(exported["model"] if layout == "model" else exported, tensors)
    assert same(open_official(back).tensors, tensors)
    assert load_policy(PolicyConfig(checkpoint=str(own))).config == TINY


def test_convert_takes_the_average_and_another_dtype(tmp_path: Path) -> None:
    tensors = dict(tiny_policy().state_dict())
    average = {name: tensor / 3 for name, tensor in tensors.items()}
    torch.save({"model": tensors, "ema": average}, tmp_path / "a.pt")
    options = ["--architecture", architecture_file(tmp_path), "--ema", "--dtype", "bfloat16"]
    assert main(["convert", str(tmp_path / "a.pt"), str(tmp_path / "b.safetensors"), *options]) == 0
    expected = {name: tensor.bfloat16() for name, tensor in average.items()}
    assert same(read_tensors(tmp_path / "b.safetensors"), expected)


def test_tokenizers_convert_by_name_and_export_for_strict_loading(hub: Hub, tmp_path: Path) -> None:
    config = find_model("llamagen-vq-16").architecture
    assert isinstance(config, VQConfig)
    tensors = dict(VQTokenizer(config).state_dict())
    usage = {"quantize.codebook_used": torch.arange(65536.0)}
    hub.directory.mkdir()
    torch.save({"model": tensors | usage}, hub.directory / "vq_ds16_c2i.pt")
    own, back = tmp_path / "b.safetensors", tmp_path / "c.pt"
    assert main(["convert", "llamagen-vq-16", str(own)]) == 0
    assert main(["export", str(own), str(back)]) == 0
    assert same(plain(back)["model"], tensors | usage)
    write_tensors(tmp_path / "ours.safetensors", tensors, config.to_dict())
    assert main(["export", str(tmp_path / "ours.safetensors"), str(tmp_path / "d.pt")]) == 0
    exported = plain(tmp_path / "d.pt")["model"]
    assert same(exported, tensors | {"quantize.codebook_used": torch.zeros(65536)})


def test_a_packaged_policy_is_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    networks = "package://learner.miniature/networks"
    assert main(["export", f"{networks}/policy.safetensors", str(tmp_path / "policy.pt")]) == 0
    exported = plain(tmp_path / "policy.pt")["model"]
    assert same(exported, read_tensors(f"{networks}/policy.safetensors"))
    assert main(["export", f"{networks}/none.safetensors", str(tmp_path / "none.pt")]) == 1
    assert f"{networks}/none.safetensors: no such file" in capsys.readouterr().err


def test_taming_exports_with_the_rest_of_its_base(tmp_path: Path) -> None:
    config = TamingConfig(
        dim=16, num_layers=2, num_heads=4, vocab_size=16, block_size=16, grid=4, num_classes=4
    )
    whole = official_policy_tensors(dict(TamingGPT(config).state_dict()), config)
    whole["first_stage_model.encoder.conv_in.weight"] = torch.ones(1)
    base, own, back = (tmp_path / n for n in ("last.ckpt", "b.safetensors", "c.ckpt"))
    torch.save({"state_dict": whole, "global_step": 5}, base)
    architecture = architecture_file(tmp_path, config)
    assert main(["convert", str(base), str(own), "--architecture", architecture]) == 0
    assert main(["export", str(own), str(back), "--base", str(base)]) == 0
    assert same(plain(back)["state_dict"], whole)
    tuned = {name: tensor + 1 for name, tensor in read_tensors(own).items()}
    write_tensors(own, tuned, config.to_dict())
    assert main(["export", str(own), str(tmp_path / "d.ckpt"), "--base", str(base)]) == 0
    exported = plain(tmp_path / "d.ckpt")["state_dict"]
    assert torch.equal(exported["transformer.head.weight"], whole["transformer.head.weight"] + 1)
    assert "first_stage_model.encoder.conv_in.weight" in exported
    assert main(["export", str(own), str(tmp_path / "e.ckpt")]) == 0
    assert same(plain(tmp_path / "e.ckpt")["state_dict"], official_policy_tensors(tuned, config))


PROJECT = """
model:
  target: taming.models.cond_transformer.Net2NetTransformer
  params:
    cond_stage_config: {target: taming.modules.util.Labelator, params: {n_classes: 10}}
    transformer_config:
      target: taming.modules.transformer.mingpt.GPT
      params: {vocab_size: 64, block_size: 16, n_layer: 4, n_head: 4, n_embd: 96}
    first_stage_config:
      target: taming.models.vqgan.VQModel
      params:
        n_embed: 64
        embed_dim: 32
        ddconfig: {double_z: false, z_channels: 32, resolution: 8, in_channels: 3, out_ch: 3,
                   ch: 32, ch_mult: [1, 1], num_res_blocks: 1, attn_resolutions: [4]}
"""
"""taming's description of the miniature's VQGAN and GPT."""


def test_a_vqgan_and_its_policy_pass_through_tamings_format(tmp_path: Path) -> None:
    """The shipped ones: exported to the official names, and back with a project file."""
    (tmp_path / "it-project.yaml").write_text(PROJECT)
    for kind in ("tokenizer", "policy"):
        shipped = f"package://learner.miniature/networks/vqgan/{kind}.safetensors"
        official, back = tmp_path / f"{kind}.ckpt", tmp_path / f"{kind}.safetensors"
        assert main(["export", shipped, str(official)]) == 0
        state = plain(official)["state_dict"]
        known = {"tokenizer": "decoder.up.1.block.0.conv1.weight", "policy": "transformer.tok_emb"}
        assert any(name.startswith(known[kind]) for name in state)
        options = ["--architecture", str(tmp_path / "it-project.yaml"), "--part", kind]
        assert main(["convert", str(official), str(back), *options]) == 0
        assert same(read_tensors(back), read_tensors(shipped))
        assert read_config(back) == read_config(shipped)
    base = ["--base", str(tmp_path / "policy.ckpt")]
    target = str(tmp_path / "whole.ckpt")
    assert main(["export", str(tmp_path / "tokenizer.safetensors"), target, *base]) == REFUSED


def test_export_takes_the_newest_checkpoint_of_a_run(tmp_path: Path) -> None:
    for step in (50, 100, 1_000_000):
        place = tmp_path / "run" / "checkpoints" / f"step_{step:06d}"
        place.mkdir(parents=True)
        tensors = {name: tensor + step for name, tensor in tiny_policy().state_dict().items()}
        write_tensors(place / "policy.safetensors", tensors, TINY.to_dict())
        (place / MANIFEST).touch()
    part = place.parent / "step_3000000"  # a copy that was cut short
    part.mkdir()
    shutil.copy(place / "policy.safetensors", part)
    (tmp_path / "run" / "checkpoints" / ".step_2000000.partial").mkdir()
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "newest.pt")]) == 0
    assert same(plain(tmp_path / "newest.pt")["model"], tensors)
    assert main(["export", str(place.parent / "step_000050"), str(tmp_path / "first.pt")]) == 0
    first = plain(tmp_path / "first.pt")["model"]
    assert torch.equal(first["norm.weight"], torch.full_like(first["norm.weight"], 51))


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["convert", "a.pt", "there.safetensors"], REFUSED, "set architecture; no named policy"),
        (["convert", "a.pt", "b.bin"], REFUSED, "expected a name that ends in .safetensors"),
        (["convert", "own.safetensors", "b.safetensors"], REFUSED, "is no official file"),
        (["convert", "no.pt", "b.safetensors", "TINY"], FAILED, "no.pt: no such file"),
        (["convert", "a.pt", "there.safetensors", "TINY"], REFUSED, "exists and is not overwritte"),
        (["convert", "bad.pt", "b.safetensors", "TINY"], FAILED, "first is 'norm.weight'"),
        (["export", "own.safetensors", "a.pt"], REFUSED, "a.pt exists and is not overwritten"),
        (["export", "own.safetensors", "b.safetensors"], REFUSED, "ends in .pt .pth .ckpt .bin"),
        (["export", ".", "b.pt"], REFUSED, "a run directory with checkpoints"),
        (["export", "own.safetensors", "b.pt", "--base", "x.pt"], REFUSED, "taming's policies"),
    ],
)
def test_refusals(
    arguments: list[str],
    status: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    tensors = dict(tiny_policy().state_dict())
    torch.save({"model": tensors}, "a.pt")
    torch.save({"model": {n: t for n, t in tensors.items() if n != "norm.weight"}}, "bad.pt")
    write_tensors("own.safetensors", tensors, TINY.to_dict())
    Path("there.safetensors").touch()
    if arguments[-1] == "TINY":
        arguments = [*arguments[:-1], "--architecture", architecture_file(tmp_path)]
    before = sorted(tmp_path.iterdir())
    assert main(arguments) == status
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert sorted(tmp_path.iterdir()) == before


def test_a_failed_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tensors(tmp_path / "own.safetensors", tiny_policy().state_dict(), TINY.to_dict())

    def full(content: Any, file: Path) -> None:
        file.write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file")

    monkeypatch.setattr(torch, "save", full)
    assert main(["export", str(tmp_path / "own.safetensors"), str(tmp_path / "b.pt")]) == FAILED
    assert "b.pt: not written" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["own.safetensors"]


def test_help_and_unknown_options(capsys: pytest.CaptureFixture[str]) -> None:
    run: Callable[[list[str]], int] = main
    for arguments, status in ((["--help"], 0), (["fetch", "--nowhere"], REFUSED)):
        with pytest.raises(SystemExit) as stopped:
            run(arguments)
        assert stopped.value.code == status
    capsys.readouterr()
