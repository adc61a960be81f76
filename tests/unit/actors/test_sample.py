"""Sampling from the command line, with the miniature's shipped networks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image

from actors import sample
from actors.checkpoints.loading import PolicyConfig, TokenizerConfig, load_decoder, load_policy
from actors.decoding.steps import Workspace
from actors.kernels import plain
from actors.models.llamagen import LlamaGen, LlamaGenConfig
from actors.models.taming import TamingConfig, TamingGPT
from actors.sample import main, sample_images
from actors.sample_files import GAP, SMALLEST_CELL, ContactSheet, NpzWriter
from actors.sample_source import default_tokenizer
from actors.text.features import write_caption_features
from cluster.errors import DataError
from cluster.io.run_layout import MANIFEST
from cluster.messages import Condition, SamplingSpec
from cluster.model_files.tensors import read_config, read_tensors, write_tensors

SIDE = 8  # pixels of the miniature's images
POLICY = PolicyConfig().checkpoint


def run_sample(out: Path, *options: object) -> Path:
    assert main(["--out", str(out), "--device", "cpu", *map(str, options)]) == 0
    return out


def pngs(out: Path) -> dict[str, np.ndarray]:
    files = sorted((out / "images").iterdir())
    return {file.name: np.asarray(Image.open(file)) for file in files}


def record(out: Path) -> dict:
    return json.loads((out / "samples.json").read_text())


def test_the_first_command_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--classes", "0,1,2"]) == 0
    images = pngs(Path("samples"))
    assert len(images) == 12
    assert list(images)[:4] == [
        "000000_class0000.png",
        "000001_class0001.png",
        "000002_class0002.png",
        "000003_class0000.png",
    ]
    assert all(image.shape == (SIDE, SIDE, 3) for image in images.values())
    cell = SMALLEST_CELL + GAP
    assert Image.open("samples/grid.png").size == (4 * cell + GAP, 3 * cell + GAP)
    said = record(Path("samples"))
    assert said["policy"]["checkpoint"] == POLICY
    assert said["spec"]["guidance"] == "none"
    assert (said["seed"], said["num_images"], said["dtype"]) == (0, 12, "float32")
    assert said["conditions"][2] == {"text": "class 2", "class_index": 2}


def test_images_depend_on_seed_and_number_alone(tmp_path: Path) -> None:
    base = pngs(run_sample(tmp_path / "a", "--classes", "3,7", "--per-condition", 5))
    for name, options in {
        "again": ["--per-condition", 5],
        "one at a time": ["--per-condition", 5, "--batch", 1],
        "uneven batches": ["--per-condition", 5, "--batch", 3],
        "more": ["--per-condition", 6],
    }.items():
        other = pngs(run_sample(tmp_path / name, "--classes", "3,7", *options))
        assert all(np.array_equal(other[file], image) for file, image in base.items()), name
    other = pngs(run_sample(tmp_path / "b", "--classes", "3,7", "--per-condition", 5, "--seed", 1))
    assert not all(np.array_equal(other[file], image) for file, image in base.items())


def test_npz_holds_the_same_images(tmp_path: Path) -> None:
    npz = tmp_path / "deep" / "samples.npz"
    out = run_sample(tmp_path / "out", "--num-images", 23, "--batch", 10, "--npz", npz)
    with np.load(npz, allow_pickle=False) as file:
        images, labels = file["arr_0"], file["arr_1"]
    assert images.shape == (23, SIDE, SIDE, 3)
    assert images.dtype == np.uint8
    assert labels.tolist() == [number % 10 for number in range(23)]
    for image, png in zip(images, pngs(out).values(), strict=True):
        assert np.array_equal(image, png)
    bare = run_sample(tmp_path / "bare", "--num-images", 3, "--no-png")
    assert sorted(file.name for file in bare.iterdir()) == ["grid.png", "samples.json"]


def test_kernels_may_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a way around Triton's on a GPU."""
    given: list[object] = []

    def recorded(*inputs: Any, kernels: Any) -> Workspace:
        given.append(kernels)
        return Workspace(*inputs, kernels=kernels)

    monkeypatch.setattr(sample, "Workspace", recorded)
    for name in ("auto", "torch"):
        out = run_sample(tmp_path / name, "--num-images", 1, "--no-png", "--kernels", name)
        assert record(out)["kernels"] == name
    assert given == [None, plain]


@pytest.mark.parametrize("size", [5, 8, 12])
def test_images_are_resized_before_they_are_rounded(tmp_path: Path, size: int) -> None:
    """As LlamaGen's script does with --image-size-eval; in the .npz and the files alike."""
    options = ["--num-images", 6, "--batch", 4, "--npz", tmp_path / "s.npz", "--size", size]
    out = run_sample(tmp_path / "out", *options)
    policy, decoder = load_policy(PolicyConfig()), load_decoder(TokenizerConfig())
    shown = [Condition(text="", class_index=number) for number in range(6)]
    decoded: list[torch.Tensor] = []
    decoder.register_forward_hook(lambda _, __, image: decoded.append(image))
    spec = SamplingSpec()
    list(sample_images(policy, decoder, shown, spec, num_images=6, seed=0, batch=4))
    samples = torch.cat(decoded)
    if size != SIDE:
        samples = F.interpolate(samples, size=(size, size), mode="bicubic")
    expected = torch.clamp(127.5 * samples + 128.0, 0, 255).permute(0, 2, 3, 1).to(torch.uint8)
    with np.load(tmp_path / "s.npz") as file:
        np.testing.assert_array_equal(file["arr_0"], expected.numpy())
    for image, png in zip(expected.numpy(), pngs(out).values(), strict=True):
        np.testing.assert_array_equal(png, image)
    assert record(out)["size"] == size


@pytest.mark.parametrize("size", [-1, 5000])
def test_an_impossible_size_is_refused(
    tmp_path: Path, size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--out", str(tmp_path / "o"), "--classes", "0", "--size", str(size)]) == 2
    assert f"--size must be in [0, 4096] pixels a side, found {size}" in capsys.readouterr().err


def test_npz_is_what_numpy_writes(tmp_path: Path) -> None:
    """The same members, headers and bytes as np.savez, whose files evaluators stream."""
    images = np.random.default_rng(0).integers(0, 256, (7, 4, 5, 3), dtype=np.uint8)
    with NpzWriter(tmp_path / "ours.npz", 7) as writer:
        writer.write(images[:5])
        writer.write(images[5:])
    np.savez(tmp_path / "numpy.npz", images)
    ours, theirs = (
        {name: file.zip.read(name) for name in file.zip.namelist()}
        for file in (np.load(tmp_path / "ours.npz"), np.load(tmp_path / "numpy.npz"))
    )
    assert ours == theirs


def test_npz_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    images = np.zeros((2, 4, 4, 3), np.uint8)

    def write(name: str, stop: Exception | None) -> None:
        with NpzWriter(tmp_path / name, 3) as writer:
            writer.write(images)
            if stop:
                raise stop

    with pytest.raises(DataError, match="2 images written, expected 3"):
        write("short.npz", None)
    with pytest.raises(OSError, match="disk full"):
        write("cut.npz", OSError("disk full"))
    assert list(tmp_path.iterdir()) == []


def test_contact_sheet_has_bounds(tmp_path: Path) -> None:
    sheet = ContactSheet(1000, 50_000)
    for level in range(40):
        sheet.write(np.full((1000, 2, 2, 3), level, np.uint8))
    sheet.save(tmp_path / "grid.png")
    image = np.asarray(Image.open(tmp_path / "grid.png"))
    assert image.shape == (16 * (SMALLEST_CELL + GAP) + GAP, 16 * (SMALLEST_CELL + GAP) + GAP, 3)
    assert image[-GAP - 1, GAP, 0] == 0  # last row, first image
    assert image[GAP, -GAP - 1, 0] == 15  # first row, sixteenth image


def test_guidance_and_filters(tmp_path: Path) -> None:
    options = ["--classes", "4", "--per-condition", 3]
    plain = run_sample(tmp_path / "plain", *options)
    guided = run_sample(tmp_path / "guided", *options, "--cfg-scale", 3.0, "--top-k", 5)
    assert record(guided)["spec"] == {
        "temperature": 1.0,
        "top_k": 5,
        "top_p": 1.0,
        "cfg_scale": 3.0,
        "guidance": "guided",
    }
    one, other = (list(pngs(out).values()) for out in (plain, guided))
    assert not np.array_equal(np.stack(one), np.stack(other))


def test_sample_images_is_a_function() -> None:
    policy, decoder = load_policy(PolicyConfig()), load_decoder(TokenizerConfig())
    conditions = [Condition(text="", class_index=index) for index in (1, 8)]
    spec = SamplingSpec(cfg_scale=1.5, guidance="guided")

    def draw(batch: int) -> list[np.ndarray]:
        batches = sample_images(
            policy, decoder, conditions, spec, num_images=5, seed=3, batch=batch
        )
        return list(batches)

    assert [len(images) for images in draw(2)] == [2, 2, 1]
    assert np.array_equal(np.concatenate(draw(2)), draw(5)[0])


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run that kept two checkpoints and was interrupted while it wrote a third."""
    run = tmp_path / "run"
    config = {
        "seed": 5,
        "policy": {"checkpoint": POLICY},
        "tokenizer": {"checkpoint": TokenizerConfig().checkpoint},
        "sampling": {"temperature": 0.9, "top_k": 8, "cfg_scale": 1.5, "guidance": "distil"},
    }
    tensors, header = read_tensors(POLICY), read_config(POLICY)
    for step in (50, 100):
        folder = run / "checkpoints" / f"step_{step:06d}"
        folder.mkdir(parents=True)
        tensors["output.weight"] = tensors["output.weight"] * 0.5
        write_tensors(folder / "policy.safetensors", tensors, header)
        (folder / MANIFEST).touch()
    (run / "checkpoints" / ".step_000150.partial").mkdir()
    (run / "checkpoints" / "step_000150").mkdir()
    shutil.copytree(folder, run / "checkpoints" / "step_000200")  # a copy that was cut short
    (run / "checkpoints" / "step_000200" / MANIFEST).unlink()
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return run


def test_a_run_is_sampled_as_it_was_trained(tmp_path: Path, run_dir: Path) -> None:
    newest = run_sample(tmp_path / "newest", "--run", run_dir, "--classes", "all")
    said = record(newest)
    assert said["step"] == 100
    assert said["policy"]["checkpoint"].endswith("step_000100/policy.safetensors")
    # Distilled guidance: what was learned, and is therefore shown, is the policy without it.
    assert said["spec"] == {
        "temperature": 0.9,
        "top_k": 8,
        "top_p": 1.0,
        "cfg_scale": 1.0,
        "guidance": "none",
    }
    older = run_sample(tmp_path / "50", "--run", run_dir, "--step", 50, "--classes", "all")
    base = run_sample(tmp_path / "base", "--run", run_dir, "--base", "--classes", "all")
    assert (record(older)["step"], record(base)["step"]) == (50, 0)
    assert record(base)["spec"]["cfg_scale"] == 1.5
    images = [np.stack(list(pngs(out).values())) for out in (newest, older, base)]
    assert not np.array_equal(images[0], images[1])
    assert not np.array_equal(images[1], images[2])
    by_file = run_sample(
        tmp_path / "file",
        *("--checkpoint", run_dir / "checkpoints/step_000100/policy.safetensors"),
        *("--tokenizer", TokenizerConfig().checkpoint),
        *("--temperature", 0.9, "--top-k", 8, "--classes", "all"),
    )
    assert np.array_equal(np.stack(list(pngs(by_file).values())), images[0])


def test_captions_of_a_caption_conditional_policy(tmp_path: Path) -> None:
    codes = read_config(TokenizerConfig().checkpoint)["codebook_size"]
    config = LlamaGenConfig(
        dim=32, num_layers=1, num_heads=2, grid=4, vocab_size=codes, caption_dim=6
    )
    torch.manual_seed(0)
    write_tensors(tmp_path / "t2i.safetensors", LlamaGen(config).state_dict(), config.to_dict())
    features = [np.random.default_rng(n).normal(size=(n, 6)).astype(np.float32) for n in (3, 5)]
    write_caption_features(tmp_path / "f.parquet", ["a cat", "two dogs"], features)
    out = run_sample(
        tmp_path / "out",
        *(
            "--checkpoint",
            tmp_path / "t2i.safetensors",
            "--tokenizer",
            TokenizerConfig().checkpoint,
        ),
        *("--captions", tmp_path / "f.parquet", "--per-condition", 2, "--cfg-scale", 2),
        *("--npz", tmp_path / "s.npz"),
    )
    assert list(pngs(out))[1::2] == ["000001_caption0001.png", "000003_caption0001.png"]
    assert record(out)["conditions"][1] == {"text": "two dogs", "class_index": None}
    assert np.load(tmp_path / "s.npz").files == ["arr_0"]


def test_tokenizers_that_belong_to_policies() -> None:
    named = default_tokenizer(PolicyConfig(checkpoint="llamagen-b-256"))
    assert named == TokenizerConfig(checkpoint="llamagen-vq-16")
    copy = PolicyConfig(checkpoint="my.pt", architecture="llamagen-t2i-xl-stage1-256")
    assert default_tokenizer(copy) == TokenizerConfig(checkpoint="llamagen-vq-16-t2i")
    taming = PolicyConfig(checkpoint="cin.ckpt", architecture="cin-project.yaml")
    assert default_tokenizer(taming).checkpoint == "cin.ckpt"
    assert default_tokenizer(PolicyConfig()) == TokenizerConfig()
    assert default_tokenizer(PolicyConfig(checkpoint="x.safetensors")) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "what should be shown?"),
        (["--classes", "0,10"], "class_index 10, but this policy has 10 classes (0 to 9)"),
        (["--classes", "0,one"], "indices separated by commas, or all; found '0,one'"),
        (["--classes", "0", "--captions", "c.txt"], "exclude each other"),
        (["--classes", "0", "--num-images", "3", "--per-condition", "1"], "exclude each other"),
        (["--classes", "0", "--batch", "0"], "--batch must be >= 1, found 0"),
        (["--classes", "0", "--per-condition", "0"], "--per-condition must be >= 1"),
        (["--classes", "0", "--seed", "-1"], "--seed must be in [0, 2^63), found -1"),
        (["--classes", "0", "--seed", str(2**63)], "--seed must be in [0, 2^63)"),
        (["--classes", "0", "--cfg-scale", "inf"], "--cfg-scale must be finite"),
        (["--classes", "0", "--checkpoint", "p.safetensors"], "name it with --tokenizer"),
        (["--classes", "0", "--npz", "/nowhere/x/s.npz", "--out", "/nowhere/x/s.npz"], "is --out"),
        (["--classes", "0", "--temperature", "0"], "temperature must be > 0"),
        (["--classes", "0", "--top-p", "1.5"], "top_p must be in (0, 1]"),
        (["--classes", "0", "--device", "toaster"], "device 'toaster'"),
        (
            ["--classes=0", "--tokenizer", POLICY, "--checkpoint", "/nowhere/p.safetensors"],
            "no such file",
        ),
        (["--classes", "0", "--tokenizer", "/nowhere/t.safetensors"], "no such file"),
        (["--classes", "0", "--tokenizer", POLICY], "expected a 'llamagen-vq'"),
        (["--captions", "/nowhere/captions.txt"], "needs a caption-conditional policy"),
        (["--captions", "/nowhere/f.parquet"], "/nowhere/f.parquet: not a readable Parquet"),
        (["--classes", "0", "--step", "5"], "need a --run"),
        (["--classes", "0", "--run", "/nowhere"], "/nowhere is not a run directory"),
        (["--classes", "0", "--run", "RUN", "--checkpoint", "x"], "--run brings its own policy"),
        (["--classes", "0", "--checkpoint", "RUN"], "is a run directory: name it with --run"),
        (["--classes", "0", "--run", "RUN", "--step", "70"], "no checkpoint of step 70: there are"),
        (["--classes", "0", "--run", "RUN", "--base", "--step", "50"], "exclude each other"),
        (["--classes", "0", "--npz", "RUN/config.yaml"], "exists or is --out: name another file"),
        (["--classes", "0", "--tokenizer-architecture", "x"], "without --tokenizer"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    tmp_path: Path,
    run_dir: Path,
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    options = [option.replace("RUN", str(run_dir)) for option in options]
    assert main(["--out", str(out), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not out.exists()


def test_captions_with_a_class_policy_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_caption_features(tmp_path / "f.parquet", ["a cat"], [np.ones((2, 3))])
    out = tmp_path / "out"
    assert main(["--out", str(out), "--captions", str(tmp_path / "f.parquet")]) == 2
    assert "class-conditional, but the condition 'a cat'" in capsys.readouterr().err
    assert not out.exists()


def test_a_tokenizer_of_another_size_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = LlamaGenConfig(dim=16, num_layers=1, num_heads=2, grid=2, vocab_size=9)
    write_tensors(tmp_path / "p.safetensors", LlamaGen(config).state_dict(), config.to_dict())
    options = ["--out", str(tmp_path / "out"), "--checkpoint", str(tmp_path / "p.safetensors")]
    options += ["--tokenizer", TokenizerConfig().checkpoint]
    assert main([*options, "--classes", "0"]) == 2
    assert "draws from 9 codes" in capsys.readouterr().err


def test_guidance_needs_a_null_condition(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = read_config(TokenizerConfig().checkpoint)["codebook_size"]
    config = TamingConfig(
        dim=16, num_layers=1, num_heads=2, grid=4, vocab_size=codes, num_classes=5, block_size=16
    )
    write_tensors(tmp_path / "p.safetensors", TamingGPT(config).state_dict(), config.to_dict())
    options = ["--checkpoint", str(tmp_path / "p.safetensors"), "--classes", "all"]
    options += ["--tokenizer", TokenizerConfig().checkpoint]
    assert main([*options, "--out", str(tmp_path / "out"), "--cfg-scale", "1.5"]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not (tmp_path / "out").exists()
    assert len(pngs(run_sample(tmp_path / "plain", *options))) == 20


def test_unconditional_policies_take_no_conditions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = read_config(TokenizerConfig().checkpoint)["codebook_size"]
    config = TamingConfig(
        dim=16,
        num_layers=1,
        num_heads=2,
        grid=4,
        vocab_size=codes,
        block_size=16,
        condition="none",
    )
    write_tensors(tmp_path / "p.safetensors", TamingGPT(config).state_dict(), config.to_dict())
    options = ["--checkpoint", str(tmp_path / "p.safetensors"), "--num-images", "3"]
    options += ["--tokenizer", TokenizerConfig().checkpoint]
    out = run_sample(tmp_path / "out", *options)
    assert list(pngs(out)) == ["000000.png", "000001.png", "000002.png"]
    assert main([*options, "--out", str(tmp_path / "no"), "--classes", "1"]) == 2
    assert "this policy is unconditional" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["policy: [1", "- a\n- b\n", "policy: 3\n", "policy: {colour: red}\n"]
)
def test_unreadable_run_configurations(
    run_dir: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_dir / "config.yaml").write_text(text)
    out = run_dir.parent / "out"
    assert main(["--out", str(out), "--run", str(run_dir), "--classes", "0"]) == 2
    error = capsys.readouterr().err
    assert "config.yaml" in error
    assert error.count("\n") == 1


def test_existing_output_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run_sample(tmp_path / "out", "--classes", "0")
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*")}
    assert main(["--out", str(out), "--classes", "1"]) == 2
    assert "is not empty: name another directory" in capsys.readouterr().err
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*")} == before


def test_a_failure_while_sampling_exits_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> np.ndarray:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sample, "decode_batch", full)
    npz = tmp_path / "s.npz"
    assert main(["--out", str(tmp_path / "out"), "--classes", "0", "--npz", str(npz)]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert not npz.exists()
    assert not (tmp_path / "out" / "samples.json").exists()
