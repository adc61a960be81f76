"""What is found before anything is started, by the run and by --dry-run alike."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from actors.checkpoints.loading import init_policy
from actors.models.llamagen import LlamaGenConfig
from actors.models.vq import VQConfig, VQTokenizer
from actors.text.features import write_caption_features
from cluster.model_files.tensors import locate, write_tensors
from cluster.preflight import Findings
from learner.config import load_preset, merge, to_dict, validate
from learner.preflight import listed, preflight
from learner.run import REFUSED, main
from rewards.networks.open_clip_models import clip_parameters
from tests.reduced import random_run
from tests.small_run import plain_miniature, small_config

NETWORKS = "package://learner.miniature/networks"


def found(**changes: Any) -> Findings:
    return preflight(validate(merge(plain_miniature(), changes), "test"))


def problems(**changes: Any) -> list[str]:
    return found(**changes).problems


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and empty caches."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TESSERA_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path


def policy_file(path: Path, **changes: Any) -> str:
    config = LlamaGenConfig(
        **{
            "dim": 32,
            "num_layers": 1,
            "num_heads": 2,
            "grid": 4,
            "vocab_size": 64,
            "num_classes": 10,
            **changes,
        }
    )
    write_tensors(path, init_policy(config).state_dict(), config.to_dict())
    return str(path)


def tokenizer_file(path: Path, **changes: Any) -> str:
    config = VQConfig(
        **{
            "channels": 32,
            "multipliers": (1, 1),
            "num_res_blocks": 1,
            "z_channels": 32,
            "codebook_size": 64,
            **changes,
        }
    )
    write_tensors(path, VQTokenizer(config).state_dict(), config.to_dict())
    return str(path)


def moments(path: str, dim: int = 64, **arrays: Any) -> str:
    np.savez(path, mu=np.zeros(dim), sigma=np.eye(dim), **arrays)
    return path


def test_the_default_run_lacks_nothing() -> None:
    everything = found()
    assert (everything.problems, everything.downloads, everything.notes) == ([], [], [])


def test_the_default_run_is_looked_at_without_libraries_that_take_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("open_clip", "timm", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    assert preflight(load_preset("miniature")).problems == []


def test_a_preset_at_reduced_width_lacks_nothing(tmp_path: Path) -> None:
    for name in ("llamagen-b-256", "llamagen-t2i", "vqgan-imagenet"):
        assert preflight(random_run(name, tmp_path)).problems == []


# Policy and tokenizer.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda file: None, "policy.safetensors: no such file"),
        (lambda file: file.write_bytes(b""), "found an empty file; fetch it again"),
        (lambda file: file.write_text("<html>"), "found a web page; "),
        (lambda file: write_tensors(file, {}, {"family": "convnet"}), "holds a 'convnet'"),
        (lambda file: tokenizer_file(file), "holds a 'llamagen-vq'"),
    ],
)
def test_a_policy_that_cannot_be_loaded(make: Any, message: str) -> None:
    make(Path("policy.safetensors"))
    (problem,) = problems(policy={"checkpoint": "./policy.safetensors"})
    assert problem.startswith("policy.checkpoint: ")
    assert message in problem


def test_a_policy_whose_tensors_do_not_fit_its_header() -> None:
    config = LlamaGenConfig(
        dim=32, num_layers=1, num_heads=2, grid=4, vocab_size=64, num_classes=10
    )
    tensors = init_policy(config).state_dict()
    lacking = dict(list(tensors.items())[1:])
    write_tensors("lacking.safetensors", lacking, config.to_dict())
    wider = {name: torch.zeros(*tensor.shape, 2) for name, tensor in tensors.items()}
    write_tensors("wider.safetensors", wider, config.to_dict())
    whole = {name: tensor.to(torch.int8) for name, tensor in tensors.items()}
    write_tensors("integers.safetensors", whole, config.to_dict())
    for file, message in {
        "lacking": "1 tensors are missing",
        "wider": "has shape",
        "integers": "expected floating-point",
    }.items():
        (problem,) = problems(policy={"checkpoint": f"./{file}.safetensors"})
        assert message in problem


def test_official_files_are_looked_at(tmp_path: Path) -> None:
    ours = {"policy": {"checkpoint": "./policy.pt", "architecture": "llamagen-b-256"}}
    for content, message in {
        b"version https://git-lfs.github.com/spec/v1": "a Git LFS pointer",
        b"<!doctype html>": "a web page",
        b"": "an empty file",
    }.items():
        Path("policy.pt").write_bytes(content)
        assert any(message in problem for problem in problems(**ours))
    torch.save({"model": {"tok_embeddings.weight": torch.zeros(2, 2)}}, "policy.pt")
    assert any("tensors are missing" in problem for problem in problems(**ours))


def test_named_models_that_are_not_fetched(tmp_path: Path) -> None:
    everything = found(
        policy={"checkpoint": "llamagen-b-256"},
        tokenizer={"checkpoint": "llamagen-vq-16"},
        conditions={"names": "imagenet"},
        evaluation={"num_images": 0},
        rewards={
            "features": {"network": "inception"},
            # the miniature's scorers read 16 tokens, and some of ImageNet's names have more
            **{name: {"prompts": {"long_captions": "truncate"}} for name in ("clip", "hps")},
        },
    )
    policy, tokenizer, reference = everything.problems
    assert f"expected llamagen-b-256 at {tmp_path}/weights/c2i_B_256.pt, found nothing" in policy
    assert "python -m actors.weights fetch llamagen-b-256" in policy
    assert "https://huggingface.co/FoundationVision/LlamaGen/resolve/main/c2i_B_256.pt" in policy
    assert tokenizer.startswith("tokenizer.checkpoint: expected llamagen-vq-16")
    assert "1000 classes of conditions.names, found the ten digits" in reference
    sizes = {download.name: download.size for download in everything.downloads}
    assert sizes.keys() == {"llamagen-b-256", "llamagen-vq-16", "inception"}
    assert sizes["llamagen-b-256"] == pytest.approx(4 * 111e6, rel=0.02)


def test_a_taming_model_needs_both_files_and_says_where_from(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "cin_transformer.ckpt").write_bytes(b"PK\x03\x04")
    name = {"checkpoint": "cin_transformer"}
    everything = preflight(
        validate(
            merge(
                to_dict(load_preset("vqgan-imagenet")), {"rewards": {"clip": {"enabled": False}}}
            ),
            "test",
        )
    )
    policy = everything.problems[0]
    assert "cin_transformer-project.yaml, found nothing there" in policy
    assert "cin_transformer.ckpt" not in policy
    assert "https://github.com/CompVis/taming-transformers" in policy
    names = [download.name for download in everything.downloads]
    assert names.count(name["checkpoint"]) == 1  # policy and tokenizer are one file


def test_policy_and_tokenizer_must_speak_of_the_same_codes() -> None:
    (problem,) = problems(
        policy={"checkpoint": policy_file(Path("policy.safetensors"), vocab_size=65)}
    )
    assert problem.startswith("tokenizer.checkpoint: expected a codebook of 65 codes")
    assert "found 64" in problem


# Conditions.


def test_captions_files(tmp_path: Path) -> None:
    policy = policy_file(Path("t2i.safetensors"), caption_dim=16, caption_tokens=8)
    asked: dict[str, Any] = {
        "policy": {"checkpoint": policy},
        "evaluation": {"num_images": 0},
    }
    Path("empty.txt").write_text("\n\n")
    Path("texts.txt").write_text("a cat\n")
    Path("bytes.txt").write_bytes(b"\xff\xfe\x00")
    pq.write_table(pa.table({"x": [1]}), "x.parquet")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), "none.parquet")
    pq.write_table(pa.table({"text": ["a cat"], "features": [[[0.0] * 8]]}), "narrow.parquet")
    pq.write_table(pa.table({"text": ["a cat"], "features": [[[0.0] * 16]]}), "fits.parquet")
    Path("torn.parquet").write_bytes(b"PAR1torn")
    long = [np.zeros((2, 16), np.float32), np.zeros((9, 16), np.float32)]
    write_caption_features(Path("long.parquet"), ["a", "b"], long)
    odd = [np.zeros((2, 16), np.float32), np.zeros((2, 8), np.float32)]
    write_caption_features(Path("odd.parquet"), ["a", "b"], odd)
    for file, message in {
        "absent.txt": "not a readable UTF-8 text file",
        "absent.parquet": "not a readable Parquet file",
        "torn.parquet": "not a readable Parquet file",
        "empty.txt": "holds no caption",
        "bytes.txt": "not a readable UTF-8 text file",
        "x.parquet": "name it with --column",
        "none.parquet": "holds no caption",
        "texts.txt": "expected captions with features",
        "long.parquet": "expected features of at most 8 tokens, which the policy reads, found 9",
        "odd.parquet": "row 1: found width 8, but row 0 has 16",
        "narrow.parquet": "expected features of width 16, which the policy reads, found width 8",
    }.items():
        (problem,) = problems(conditions={"captions": file}, **asked)
        assert problem.startswith("conditions.captions: ")
        assert message in problem
    assert problems(conditions={"captions": "fits.parquet"}, **asked) == []
    (problem,) = problems(**asked)
    assert "expected a file of captions, since the policy takes captions" in problem


def test_an_encoder_that_is_not_here_yet() -> None:
    policy = policy_file(Path("t2i.safetensors"), caption_dim=16, caption_tokens=8)
    Path("texts.txt").write_text("a cat\n")
    conditions = {"captions": "texts.txt", "encoder": "owner/t5"}
    told = found(policy={"checkpoint": policy}, conditions=conditions, evaluation={"num_images": 0})
    assert told.problems == []
    assert any(note.startswith("conditions.encoder: owner/t5 is not on") for note in told.notes)


def test_captions_for_a_policy_of_classes() -> None:
    Path("texts.txt").write_text("a cat\n")
    told = problems(conditions={"captions": "texts.txt"}, evaluation={"num_images": 0})
    assert told == [
        "conditions.captions: expected nothing, since the policy takes classes, found "
        "texts.txt: leave it empty, or choose a policy of captions"
    ]


def test_more_classes_than_the_policy_has() -> None:
    names = [str(index) for index in range(12)]
    told = problems(conditions={"names": names}, evaluation={"num_images": 0})
    assert "expected the 10 classes of" in told[0]
    assert "found 12 names, of which number 11 is asked for" in told[0]
    few = {"names": names, "classes": [0, 9]}
    assert not any("conditions" in p for p in problems(conditions=few, evaluation={"num_images": 0})
                   if p.startswith("conditions"))  # fmt: skip


# Rewards.


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        ({"model": "ViT-L-41"}, "expected a model that open_clip has, found 'ViT-L-41'"),
        ({"model": "ViT-B-32"}, "rewards.clip.pretrained: expected a pretrained tag or a file"),
        ({"model": "ViT-B-32", "pretrained": "openia"}, "did you mean 'openai'?"),
        ({"model": "ViT-B-32", "pretrained": "openai"}, "set model to ViT-B-32-quickgelu"),
        ({"model": "ViT-B-32", "pretrained": "nets/c.pt"}, "nets/c.pt: no such file"),
        ({"model": "nets/clip"}, "there is no such directory"),
        ({"model": f"{NETWORKS}/clap"}, "no such directory"),
        ({"model": f"{NETWORKS}/clip", "pretrained": "openai"}, "comes with its own weights"),
        ({"model": "empty"}, "expected a directory in open_clip's layout"),
        ({"model": "torn"}, "expected a directory in open_clip's layout"),
        ({"model": "bare"}, "expected weights (open_clip_model.safetensors"),
        ({"model": "damaged"}, "found a text file that begins with"),
    ],
)
def test_clip(clip: dict[str, str], message: str) -> None:
    for name in ("empty", "torn", "bare", "damaged"):
        Path(name).mkdir()
    Path("torn/open_clip_config.json").write_text("{")
    shipped = locate(f"{NETWORKS}/clip", directory=True)
    for name in ("bare", "damaged"):
        shutil.copy(shipped / "open_clip_config.json", name)
    Path("damaged/open_clip_model.safetensors").write_bytes(b"x" * 100)
    (problem,) = problems(rewards={"clip": clip})
    assert problem.startswith("rewards.clip.")
    assert message in problem


def test_a_scorer_that_is_off_is_not_looked_at() -> None:
    assert problems(rewards={"clip": {"model": "nets/clip", "enabled": False}}) == []


@pytest.mark.parametrize("offline", [False, True])
def test_what_the_run_fetches_itself_is_no_problem_where_it_may(
    offline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    everything = found(
        rewards={
            "clip": {"model": "ViT-B-32-quickgelu", "pretrained": "openai"},
            "hps": {"model": "ViT-H-14", "pretrained": "v2.1"},
        },
        judge={
            "features": {"network": "inception", "checkpoint": ""},
            "second": {"network": "dinov2"},
        },
    )
    names = [download.field for download in everything.downloads]
    assert names == ["rewards.clip", "rewards.hps", "judge.features", "judge.second"]
    for download in everything.downloads:
        assert download.url.startswith("https://")
        assert download.size > 9e7
        assert str(download).endswith("fetched by the run itself")
    forbidden = [p for p in everything.problems if "HF_HUB_OFFLINE" in p]
    assert len(forbidden) == (3 if offline else 0)  # torch.hub knows no such switch
    assert len(everything.problems) == len(forbidden)


def test_what_is_in_the_cache_is_not_fetched(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--xswu--HPSv2"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "HPS_v2.1_compressed.pt").write_bytes(b"PK")
    hub = tmp_path / "torch" / "hub" / "checkpoints"
    hub.mkdir(parents=True)
    (hub / "weights-inception-2015-12-05-6726825d.pth").write_bytes(b"PK")
    everything = found(
        rewards={"hps": {"model": "ViT-H-14", "pretrained": "v2.1"}},
        judge={"features": {"network": "inception", "checkpoint": ""}},
    )
    assert (everything.problems, everything.downloads) == ([], [])


def test_the_size_of_a_clip_is_that_of_its_towers() -> None:
    config = json.loads(locate(f"{NETWORKS}/clip/open_clip_config.json").read_text())["model_cfg"]
    from safetensors import safe_open

    with safe_open(locate(f"{NETWORKS}/clip/open_clip_model.safetensors"), "pt") as file:
        real = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    assert clip_parameters(config) == pytest.approx(real, rel=0.05)
    assert clip_parameters({"vision_cfg": {"layers": [3, 4]}, "text_cfg": {}}) == 0


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"network": "convnet", "checkpoint": "nets/f.safetensors"}, "no such file"),
        (
            {"network": "convnet", "checkpoint": f"{NETWORKS}/policy.safetensors"},
            "expected a convnet, found a 'llamagen'",
        ),
        ({"network": "inception", "checkpoint": "inception.pth"}, "no such file"),
        (
            {"network": "inception", "checkpoint": f"{NETWORKS}/judge.safetensors"},
            "expected published weights, found a 'convnet'",
        ),
        ({"network": "inception", "checkpoint": "./page.pth"}, "found a web page; "),
        ({"network": "dinov2", "model": "vit_large_patch41_dinov2"}, "none of timm's"),
        ({"network": "clip", "model": "ViT-B-32", "checkpoint": "openia"}, "did you mean 'openai'"),
    ],
)
def test_feature_networks(features: dict[str, str], message: str) -> None:
    Path("page.pth").write_text("<html>")
    told = problems(rewards={"features": features})
    assert any(p.startswith("rewards.features") and message in p for p in told)


# The reference.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: None, "found none at"),
        (lambda: None, "--images DIR --features.network convnet --out"),
        (lambda: Path("r.npz").write_bytes(b"PK\x03\x04torn"), "it was cut off"),
        (lambda: np.savez("r.npz", mean=np.zeros(3)), "needs arrays 'mu' and 'sigma'"),
        (lambda: np.savez("r.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8)), "holds samples"),
        (lambda: moments("r.npz", 2048), "expected moments of 64 dimensions"),
        (lambda: np.savez("r.npz", mu=np.zeros(2), sigma=np.full((2, 2), np.nan)), "finite"),
        (lambda: moments("r.npz", fingerprint="convnet-0123"), "found those of 'convnet-0123'"),
        (lambda: moments("r.npz", fingerprint="inception-1-x"), "found those of 'inception-1-x'"),
        (lambda: moments("r.npz", fingerprint="inception-1-x"), "--features.network convnet --out"),
    ],
)
def test_a_reference_that_is_none(make: Any, message: str) -> None:
    make()
    (problem,) = problems(rewards={"loo_fid": {"reference": "r.npz"}})
    assert problem.startswith("rewards.loo_fid.reference: ")
    assert message in problem
    assert "python -m rewards.reference" in problem or "r.npz" in problem


def test_a_reference_that_fits_is_taken() -> None:
    moments("r.npz")
    assert problems(rewards={"loo_fid": {"reference": "r.npz"}}) == []


@pytest.mark.parametrize(
    ("covariance", "features", "dim"),
    [
        ("full", {"network": "convnet"}, 64),
        ("full", {"network": "pixels"}, 64),
        ("diagonal", {"network": "inception"}, 2048),
        ("diagonal", {"network": "torchvision-inception"}, 2048),
        ("full", {"network": "dinov2", "model": "vit_tiny_patch16_224"}, 192),
        ("diagonal", {"network": "clip"}, 512),
        ("diagonal", {"network": "clip", "model": "ViT-L-14", "checkpoint": "openai"}, 768),
        ("full", {"network": "clip", "model": "./clip"}, 96),
    ],
)
def test_a_reference_of_another_dimension(
    covariance: str, features: dict[str, str], dim: int
) -> None:
    """A file of another tool names no network: its dimension alone tells. No weights are here."""
    Path("clip").mkdir()
    Path("clip/open_clip_config.json").write_text(
        '{"model_cfg": {"embed_dim": 96, "vision_cfg": {}, "text_cfg": {}}}'
    )
    moments("r.npz", dim=7)
    term = {"reference": "r.npz", "covariance": covariance}
    told = problems(rewards={"loo_fid": term, "features": features})
    (problem,) = [p for p in told if p.startswith("rewards.loo_fid.reference: ")]
    name = features["network"]
    assert f"r.npz: expected moments of {dim} dimensions, as the features of {name!r}" in problem
    assert "found 7" in problem
    moments("r.npz", dim=dim)
    told = problems(rewards={"loo_fid": term, "features": features})
    assert not any(p.startswith("rewards.loo_fid.reference: ") for p in told)


def test_joint_moments_of_another_dimension() -> None:
    arrays = {"joint_mu": np.zeros(75), "joint_sigma": np.eye(75), "joint_weight": np.array(1.0)}
    moments("r.npz", joint_table=np.eye(10), **arrays)
    (problem,) = problems(rewards={"loo_fid": {"reference": "r.npz", "joint": True}})
    assert "expected moments of 74 dimensions" in problem
    assert "found 75" in problem


def test_real_images_whose_pixels_are_more_than_the_policys() -> None:
    np.savez("s.npz", arr_0=np.zeros((70, 4, 16, 3), np.uint8), arr_1=np.zeros(70, int))
    rewards = {"features": {"network": "pixels"}, "loo_fid": {"reference": "digits:train"}}
    assert problems(rewards=rewards) == []
    (problem,) = problems(rewards=rewards, evaluation={"images": "./s.npz"})
    assert problem.startswith("evaluation.images: ./s.npz: expected images of 8 x 8")
    assert "found 4 x 16" in problem


def test_few_images_are_noted() -> None:
    few = "r.npz has 64 images, which give no full covariance in 64 dimensions"
    moments("r.npz", images=64)
    term = {"reference": "r.npz"}
    (note,) = found(rewards={"loo_fid": term}).notes
    assert note.startswith("rewards.loo_fid.reference: ")
    assert few in note
    assert found(rewards={"loo_fid": {**term, "covariance": "diagonal"}}).notes == []
    for known in ({"images": 65}, {"images": -1}, {}):
        moments("r.npz", **known)
        assert found(rewards={"loo_fid": term}).notes == []
    np.savez("s.npz", arr_0=np.zeros((40, 8, 8, 3), np.uint8))
    notes = found(evaluation={"images": "./s.npz"}).notes
    assert any("s.npz has 40 images, which give no full covariance in 64" in n for n in notes)


def test_a_joint_reference_must_have_the_classes_of_the_run() -> None:
    moments("plain.npz")
    joint = {"joint": True, "reference": "plain.npz"}
    (problem,) = problems(rewards={"loo_fid": joint})
    assert "has no joint moments" in problem
    mu, sigma = np.zeros(71), np.eye(71)
    arrays = {"joint_mu": mu, "joint_sigma": sigma, "joint_weight": np.array(1.0)}
    moments("joint.npz", joint_table=np.eye(7), **arrays)
    (problem,) = problems(rewards={"loo_fid": {**joint, "reference": "joint.npz"}})
    assert "joint moments of 7 classes, but the conditions are 10" in problem
    mu, sigma = np.zeros(74), np.eye(74)
    arrays = {"joint_mu": mu, "joint_sigma": sigma, "joint_weight": np.array(1.5)}
    moments("joint.npz", joint_table=np.eye(10), **arrays)
    joint["reference"] = "joint.npz"
    assert problems(rewards={"loo_fid": {**joint, "joint_dim": 10, "joint_weight": 1.5}}) == []
    for name, given, theirs in (("joint_dim", 4, "10"), ("joint_weight", 2.5, "1.5")):
        (problem,) = problems(rewards={"loo_fid": {**joint, name: given}})
        assert f"built with {name} {theirs}, but rewards.loo_fid.{name} is {given}" in problem
    np.save("images.npy", np.zeros((80, 8, 8, 3), np.uint8))
    (problem,) = problems(rewards={"loo_fid": {**joint, "reference": "images.npy"}})
    assert "images.npy: an array of images has no classes" in problem


@pytest.mark.parametrize("name", ["imagenet256", "VIRTUAL_imagenet256_labeled.npz"])
def test_a_published_reference_says_the_command(name: str) -> None:
    features = {"features": {"network": "inception"}, "loo_fid": {"reference": name}}
    (problem,) = problems(rewards=features)
    assert "python -m rewards.reference fetch imagenet256" in problem
    assert "https://openaipublic.blob.core.windows.net/" in problem


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("imagenet25", "imagenet256"),
        ("Imagenet_256", "imagenet256"),
        ("digit:train", "digits:train"),
    ],
)
def test_a_reference_by_a_wrong_name(written: str, meant: str) -> None:
    (problem,) = problems(rewards={"loo_fid": {"reference": written}})
    assert f"{written}: no such file" in problem
    assert f"did you mean {meant!r}?" in problem


def test_a_reference_of_no_known_name() -> None:
    there = "digits:train, digits:held-out, mnist:train, mnist:held-out, imagenet256"
    (problem,) = problems(rewards={"loo_fid": {"reference": "xyz"}})
    assert f"there are {there}" in problem
    (problem,) = problems(evaluation={"images": "xyz"})
    assert f"there are {there}" in problem
    assert problem.endswith("or a path")


def test_a_file_that_is_needed_twice_is_missing_once() -> None:
    (problem,) = problems(judge={"classifier": {"checkpoint": "nofile"}})
    assert problem.startswith("judge.classifier.checkpoint: nofile: no such file")


@pytest.mark.parametrize("pretrained", ["", "v2.2", "v2"])
def test_hps_without_a_checkpoint_names_its_own(pretrained: str) -> None:
    (problem,) = problems(rewards={"hps": {"model": "ViT-H-14", "pretrained": pretrained}})
    assert problem == (
        "rewards.hps.pretrained: expected a published checkpoint of HPS, or a file, found "
        f"{pretrained!r}: choose one of v2.0, v2.1"
    )


def test_digits_by_a_wrong_name() -> None:
    (problem,) = problems(rewards={"loo_fid": {"reference": "digits:trian"}})
    assert problem.startswith("rewards.loo_fid.reference: ")
    assert "found 'trian'" in problem


# The judge.


def test_the_judge_of_digits_is_refused_for_other_images() -> None:
    policy = policy_file(Path("p.safetensors"))
    tokenizer = tokenizer_file(Path("t.safetensors"), multipliers=(1, 1, 1))
    ours: dict[str, Any] = {
        "policy": {"checkpoint": policy},
        "tokenizer": {"checkpoint": tokenizer},
    }
    told = problems(**ours)
    assert {p.partition(":")[0] for p in told} == {
        "rewards.features.checkpoint",
        "evaluation.images",
        "judge.classifier.checkpoint",
        "judge.features.checkpoint",
    }
    for problem in told:
        of_pixels = "expected images of 16 x 16, as the policy's, since pixels are compared"
        eight = "expected images of 8 x 8 pixels" in problem
        assert of_pixels in problem or (eight and "found 16 x 16 from the policy" in problem)
    assert "set evaluation.num_images to 0" in told[-2]
    smaller = problems(**ours, evaluation={"image_size": 8})
    assert not any(p.startswith("judge") for p in smaller)
    off = {"evaluation": {"num_images": 0}, "rewards": {"features": {"network": "inception"}}}
    assert not any(p.startswith("judge") for p in problems(**ours, **off))


def test_the_judge_of_digits_is_refused_for_other_classes() -> None:
    names = [str(index) for index in range(12)]
    policy = policy_file(Path("p.safetensors"), num_classes=12)
    told = problems(policy={"checkpoint": policy}, conditions={"names": names})
    assert any("classes 0 to 9 of the classifier, found 11" in p for p in told)
    assert any(p.startswith("evaluation.images: expected real images of the 12") for p in told)


def test_what_is_compared_with_must_be_there() -> None:
    (problem,) = problems(evaluation={"images": "held-out.npz"})
    assert problem.startswith("evaluation.images: ")
    np.savez("held-out.npz", images=np.zeros((2, 8, 8, 3), np.uint8))
    (problem,) = problems(evaluation={"images": "held-out.npz"})
    assert "needs an array 'arr_0'" in problem


def test_real_tokens() -> None:
    for source, message in {
        "real.npz": "no such file",
        "real.parquet": "no such file",
        "digits:trian": "trian",
    }.items():
        (problem,) = problems(real={"weight": 0.1, "source": source})
        assert problem.startswith("real.source: ")
        assert message in problem
    np.savez("real.npz", tokens=np.zeros((2, 16)))
    (problem,) = problems(real={"weight": 0.1, "source": "real.npz"})
    assert "found no classes" in problem
    captions = {"captions": f"{NETWORKS}/captions/captions.parquet"}
    told = problems(conditions=captions, real={"weight": 0.1, "source": "real.npz"})
    assert any(p.startswith("real.source: ") and "found no captions" in p for p in told)
    assert problems(real={"weight": 0.0, "source": "nowhere.npz"}) == []


# Notes.


def test_settings_that_learn_nothing_are_noted() -> None:
    off = {name: {"weight": 0} for name in ("clip", "hps", "loo_fid")}
    (note,) = found(rewards=off).notes
    assert "all weights of rewards are 0" in note
    assert "nothing is learned" in note
    (note,) = found(rewards=off, loss={"kl_coef": 0.1}, real={"weight": 1.0}).notes
    assert "all that changes the policy is loss.kl_coef, real.weight" in note
    one = {"clip": {"weight": 0}, "hps": {"enabled": False}}
    assert found(rewards=one).notes == []
    (note,) = found(iterations=5, learner={"warmup": 10}).notes
    assert "learner.warmup 10 is not over within 5 iterations" in note


def test_options_of_earlier_configurations_are_noted() -> None:
    (note,) = found(rewards={"loo_fid": {"rebuild_every": 8}}).notes
    assert "rewards.loo_fid.rebuild_every is not used any more" in note


def test_a_file_says_with_which_settings_it_is_scored(tmp_path: Path) -> None:
    """Or that nobody knows them, before anything is started."""
    save_file({"w": torch.zeros(1)}, tmp_path / "w.safetensors")
    file = str(tmp_path / "w.safetensors")
    clip = {"model": "ViT-B-16-SigLIP", "pretrained": file}
    findings = found(rewards={"clip": clip})
    (note,) = findings.notes
    (tokenizer,) = findings.downloads
    assert tokenizer.name == "the tokenizer timm/ViT-B-16-SigLIP"
    assert "of its published weights (webli), GELU, bicubic, squash, mean 0.5,0.5,0.5" in note
    (problem,) = problems(rewards={"clip": {"model": "ViT-B-32", "pretrained": file}})
    assert "rewards.clip.pretrained: " in problem
    assert "set tag to the one that they are of" in problem
    tagged = {"model": "ViT-B-32", "pretrained": file, "tag": "laion2b_e16"}
    (note,) = found(rewards={"clip": tagged}).notes
    assert "of the tag laion2b_e16" in note
    features = {"network": "clip", "model": "ViT-B-32", "checkpoint": file}
    told = problems(rewards={"features": features})
    assert any("set tag" in problem for problem in told)
    tower = {"network": "dinov2", "model": "vit_base_patch16_224", "checkpoint": file}
    assert any("tags differ" in problem for problem in problems(rewards={"features": tower}))


def test_scorers_of_the_digits_are_noted_for_other_conditions() -> None:
    told = found(conditions={"names": ["cat"] * 10}, evaluation={"num_images": 0}).notes
    assert [note.partition(" ")[0] for note in told] == ["rewards.clip.model", "rewards.hps.model"]


# The commands.


@pytest.mark.parametrize("kind", [[], ["--inline"], ["--dry-run"]])
def test_all_problems_are_reported_at_once_and_nothing_is_started(
    kind: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = ["--policy.checkpoint", "./nowhere.safetensors", "--rewards.clip.model", "nets/clip"]
    wrong += ["--rewards.loo-fid.reference", "r.npz", "--evaluation.images", "held-out.npz"]
    started = "ray" in sys.modules
    assert main([*kind, *wrong]) == REFUSED
    told = capsys.readouterr()
    text = told.out if kind == ["--dry-run"] else told.err
    assert "the run cannot start, 4 problems:" in text
    for field in ("policy.checkpoint", "rewards.clip.model", "rewards.loo_fid.reference"):
        assert f"  {field}: " in text
    assert "Traceback" not in told.out + told.err
    assert list(here.iterdir()) == []
    assert ("ray" in sys.modules) == started
    if kind == ["--dry-run"]:
        assert text.index("problems") < text.index("num_samplers:")


def test_findings_are_listed_problems_first() -> None:
    everything = found(
        policy={"checkpoint": "./nowhere.safetensors"},
        rewards={"clip": {"model": "ViT-B-32-quickgelu", "pretrained": "openai"}},
        learner={"warmup": 1000},
    )
    lines = listed(everything)
    assert lines[0] == "the run cannot start, 1 problem:"
    assert lines[2] == "downloads, together about 0.6 GB:"
    assert lines[-1].startswith("note: learner.warmup")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"working_dir": "/nowhere"}, "/nowhere is not a valid path"),
        ({"pip": {"packages": ["x"], "oops": 1}}, "can only have these fields"),
        ({"env_vars": {"A": 1}}, "env_vars"),
        ({"env_vars": {"A": "${TESSERA_NOT_SET}"}}, "has no TESSERA_NOT_SET"),
        ({"pip": ["a"], "conda": "b"}, "cannot be specified at the same time"),
        ({"py_modules": "no list"}, "py_modules"),
    ],
)
def test_an_environment_of_a_pool_that_ray_refuses(
    environment: dict[str, Any], message: str
) -> None:
    extra = ["tests.stand_ins:Brightness=1,pool=apart"]
    pools = {"apart": {"runtime_env": environment}}
    (problem,) = preflight(small_config(rewards={"extra": extra}, reward_pools=pools)).problems
    assert problem.startswith("reward_pools.apart: ")
    assert message in problem
    assert "\n" not in problem


def test_an_environment_of_a_pool_that_ray_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TESSERA_SET", "1")
    environment = {"pip": ["a==1"], "env_vars": {"A": "${TESSERA_SET}"}}
    rewards = {"extra": ["nowhere.here:Brightness=1,pool=apart"]}
    pools = {"apart": {"runtime_env": environment}}
    assert not preflight(small_config(rewards=rewards, reward_pools=pools)).problems


def test_a_share_of_the_gpu_that_is_too_small_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("learner.preflight.this_gpu", lambda: ("any", 4e9))
    shares = {"learner": {"num_gpus": 0.1}, "sampler": {"num_gpus": 0.8}}
    notes = [note for note in found(**shares).notes if "its share" in note]
    assert [note.split()[0] for note in notes] == ["learner"]
    assert "0.1 of a GPU of 4 GB, is 0.4: it will probably run out of memory" in notes[0]
    assert not [note for note in found().notes if "its share" in note]  # on the CPU
    monkeypatch.setattr("learner.preflight.this_gpu", lambda: ("any", 80e9))
    assert not [note for note in found(**shares).notes if "its share" in note]
