"""Policies and tokenizers in files of other tools, through every command that takes one."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from actors import sample, weights
from actors.checkpoints.loading import PolicyConfig, TokenizerConfig, load_decoder, load_policy
from actors.models.llamagen import LlamaGen
from actors.models.vq import VQConfig, VQTokenizer
from actors.preflight import check_models
from actors.sample_source import default_tokenizer
from cluster.errors import CheckpointError, ConfigError
from cluster.model_files.tensors import read_config, read_tensors, write_tensors
from cluster.model_files.torchvision_ops import ensure_torchvision
from cluster.preflight import Findings
from tests.file_rows import reads
from tests.unit.actors.checkpoints.test_loading import architecture_file, named_like
from tests.unit.actors.checkpoints.test_official import same
from tests.unit.helpers import TINY, tiny_policy

VQ = VQConfig(
    channels=32, multipliers=(1, 1), num_res_blocks=1, z_channels=32, codebook_size=TINY.vocab_size
)


@pytest.fixture
def architectures(tmp_path: Path) -> tuple[str, str]:
    """Files of the fields of the policy's and the tokenizer's architecture."""
    (tmp_path / "vq").mkdir()
    return architecture_file(tmp_path), architecture_file(tmp_path / "vq", VQ)


def saved_by_ar_grpo(folder: Path, shard: str = "1GB") -> None:
    """As AR-GRPO saves: one transformers model with both networks in it."""
    ensure_torchvision()
    from transformers import PretrainedConfig, PreTrainedModel

    class Config(PretrainedConfig):
        model_type = "ImgGen_HF"

    class ImgGen(PreTrainedModel):  # type: ignore[no-untyped-call]
        config_class = Config

        def __init__(self, config: Config) -> None:
            super().__init__(config)
            self.vq_model = VQTokenizer(VQ)
            self.vq_model.quantize.register_buffer("codebook_used", torch.zeros(8))
            self.gpt_model = LlamaGen(TINY)
            self.post_init()

    torch.manual_seed(1)
    ImgGen(Config()).save_pretrained(folder, max_shard_size=shard)


@reads("actors/README.md", "`gpt_model.*` and `vq_model.*` of AR-GRPO")
@pytest.mark.parametrize("shard", ["1GB", "40KB"])
def test_ar_grpos_file_serves_policy_and_tokenizer(
    shard: str,
    architectures: tuple[str, str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = tmp_path / "checkpoint-100"
    saved_by_ar_grpo(folder, shard)
    assert (folder / "model.safetensors.index.json").exists() == (shard == "40KB")
    policy = PolicyConfig(checkpoint=str(folder), architecture=architectures[0])
    tokenizer = TokenizerConfig(checkpoint=str(folder), architecture=architectures[1])
    with caplog.at_level(logging.INFO):
        loaded, decoder = load_policy(policy), load_decoder(tokenizer)
    assert "taking gpt_model.* for the policy, as AR-GRPO names it" in caplog.text
    assert "taking vq_model.* for the tokenizer" in caplog.text
    parts: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        parts |= read_tensors(file)
    for prefix, module in (("gpt_model.", loaded), ("vq_model.", decoder)):
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, parts[prefix + name]), name
    findings = Findings()
    check_models(policy, tokenizer, findings)
    assert findings.problems == []
    half = {name: tensor for name, tensor in parts.items() if name.startswith("vq_model.")}
    save_file(half, tmp_path / "half.safetensors")
    with pytest.raises(CheckpointError, match=r"holds vq_model\.\* .* there is no policy in it"):
        load_policy(
            PolicyConfig(
                checkpoint=str(tmp_path / "half.safetensors"), architecture=architectures[0]
            )
        )


def test_what_ar_grpo_writes_beside_it(architectures: tuple[str, str], tmp_path: Path) -> None:
    """The grid is not in the weights, but the size of the images is in the options."""
    folder = tmp_path / "model"
    saved_by_ar_grpo(folder)
    beside = json.loads((folder / "config.json").read_text()) | {"gpt_model": "GPT-B"}
    config = PolicyConfig(checkpoint=str(folder), architecture=architectures[0])
    for pixels in (48, 64):
        sizes = {"image_size": pixels, "downsample_size": 16}
        (folder / "config.json").write_text(json.dumps(beside | sizes))
        if pixels == 48:
            load_policy(config)
        else:
            with pytest.raises(CheckpointError, match=r"a grid of 4, but .* has a grid of 3"):
                load_policy(config)
    named_policy = PolicyConfig(checkpoint=str(folder), architecture="llamagen-b-256")
    own = TokenizerConfig(checkpoint=str(folder), architecture="llamagen-vq-16")
    assert default_tokenizer(named_policy) == own
    save_file(dict(tiny_policy().state_dict()), tmp_path / "alone.safetensors")
    alone = PolicyConfig(
        checkpoint=str(tmp_path / "alone.safetensors"), architecture="llamagen-b-256"
    )
    assert default_tokenizer(alone) == TokenizerConfig(checkpoint="llamagen-vq-16")


@pytest.mark.parametrize("part", ["policy", "tokenizer"])
def test_convert_takes_either_part(
    part: str, architectures: tuple[str, str], tmp_path: Path
) -> None:
    saved_by_ar_grpo(tmp_path / "both")
    target = tmp_path / f"{part}.safetensors"
    architecture = architectures[part == "tokenizer"]
    options = ["--architecture", architecture, "--part", part]
    assert weights.main(["convert", str(tmp_path / "both"), str(target), *options]) == 0
    assert read_config(target)["family"] == ("llamagen" if part == "policy" else "llamagen-vq")
    if part == "policy":
        assert load_policy(PolicyConfig(checkpoint=str(target))).config == TINY
    else:
        assert load_decoder(TokenizerConfig(checkpoint=str(target))).config == VQ


def test_sample_draws_from_it(architectures: tuple[str, str], tmp_path: Path) -> None:
    """Twice the same images: from both parts of the file, and from our own files."""
    both = tmp_path / "both"
    saved_by_ar_grpo(both)
    foreign = ["--checkpoint", str(both), "--architecture", architectures[0]]
    foreign += ["--tokenizer", str(both), "--tokenizer-architecture", architectures[1]]
    own = []
    for part, architecture in zip(("policy", "tokenizer"), architectures):
        file = str(tmp_path / f"{part}.safetensors")
        options = ["--architecture", architecture, "--part", part]
        assert weights.main(["convert", str(both), file, *options]) == 0
        own += ["--checkpoint" if part == "policy" else "--tokenizer", file]
    images = []
    for name, options in (("foreign", foreign), ("own", own)):
        out = tmp_path / name
        assert sample.main([*options, "--classes", "0,1", "--out", str(out)]) == 0
        images.append([file.read_bytes() for file in sorted((out / "images").iterdir())])
    assert images[0] == images[1]
    assert len(images[0]) == 8


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"config": "{}"}, {"config": "x"}])
def test_safetensors_of_other_tools_take_an_architecture(
    metadata: Any, architectures: tuple[str, str], tmp_path: Path
) -> None:
    tensors = dict(tiny_policy().state_dict())
    file = str(tmp_path / "model.safetensors")
    save_file(tensors, file, metadata=metadata)
    loaded = load_policy(PolicyConfig(checkpoint=file, architecture=architectures[0]))
    assert same(dict(loaded.state_dict()), tensors)
    with pytest.raises(ConfigError, match=r"is an official file, .*: set architecture; "):
        load_policy(PolicyConfig(checkpoint=file))
    findings = Findings()
    check_models(
        PolicyConfig(checkpoint=file, architecture=architectures[0]),
        TokenizerConfig(),
        findings,
    )
    assert not any(problem.startswith("policy.") for problem in findings.problems)


def test_following_the_advice_succeeds(tmp_path: Path) -> None:
    """The architecture that an error message suggests is accepted."""
    file = str(tmp_path / "mine.safetensors")
    like = {name: tensor.contiguous() for name, tensor in named_like("llamagen-l-256").items()}
    save_file(like, file)
    with pytest.raises(ConfigError, match=r"set architecture; .* llamagen-l-256, llamagen-l-384"):
        load_policy(PolicyConfig(checkpoint=file))
    with pytest.raises(CheckpointError, match=r"does not fit LlamaGen: \d+ tensors are missing"):
        load_policy(PolicyConfig(checkpoint=file, architecture="llamagen-l-256"))


def test_our_own_file_still_takes_none(tmp_path: Path, architectures: tuple[str, str]) -> None:
    for name in ("own.safetensors", "OWN.SAFETENSORS", "own.pt"):
        file = str(tmp_path / name)
        write_tensors(file, dict(tiny_policy().state_dict()), TINY.to_dict())
        assert load_policy(PolicyConfig(checkpoint=file)).config == TINY
        with pytest.raises(ConfigError, match="written by this program and carries its own"):
            PolicyConfig(checkpoint=file, architecture=architectures[0])


@pytest.mark.parametrize("name", ["C2I.PT", "weights.Ckpt", "weights.data", "policy.safetensors"])
def test_file_file_names_do_not_decide_the_format_the_format(
    name: str, architectures: tuple[str, str], tmp_path: Path
) -> None:
    tensors = dict(tiny_policy().state_dict())
    torch.save({"model": tensors}, tmp_path / name)
    config = PolicyConfig(checkpoint=str(tmp_path / name), architecture=architectures[0].upper())
    assert config.architecture.endswith(".JSON")
    Path(config.architecture).parent.mkdir(parents=True, exist_ok=True)
    Path(config.architecture).write_text(json.dumps(TINY.to_dict()))
    try:
        assert same(dict(load_policy(config).state_dict()), tensors)
    finally:
        Path(config.architecture).unlink()


def test_a_directory_of_another_kind_says_what_it_is(
    architectures: tuple[str, str], tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    config = PolicyConfig(checkpoint=str(tmp_path / "run"), architecture=architectures[0])
    with pytest.raises(CheckpointError, match="run: expected a checkpoint, found a directory"):
        load_policy(config)
    findings = Findings()
    check_models(config, TokenizerConfig(), findings)
    assert any("found a directory" in problem for problem in findings.problems)
