from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from actors.checkpoints.loading import (
    PolicyConfig,
    TokenizerConfig,
    build_policy,
    count_parameters,
    load_decoder,
    load_policy,
    load_tokenizer,
)
from actors.checkpoints.official import open_official
from actors.checkpoints.taming import official_policy_tensors
from actors.checkpoints.zoo import MODELS, find_model
from actors.models.llamagen import LlamaGen, LlamaGenConfig, rope_tables
from actors.models.taming import TamingConfig, TamingGPT
from actors.models.vq import VQConfig, VQTokenizer
from cluster.errors import CheckpointError, ConfigError
from cluster.model_files.tensors import write_tensors
from tests.file_rows import reads
from tests.unit.actors.checkpoints.test_official import same, trainer_file
from tests.unit.helpers import TINY, tiny_policy

Tensors = dict[str, Tensor]
OWN = "package://learner.miniature/networks/policy.safetensors"


@pytest.fixture
def tensors() -> Tensors:
    return dict(tiny_policy().state_dict())


def architecture_file(folder: Path, config: Any = TINY) -> str:
    file = folder / "architecture.json"
    file.write_text(json.dumps(config.to_dict()))
    return str(file)


def official_config(folder: Path, content: Any, config: Any = TINY, **options: Any) -> PolicyConfig:
    """Content written as an official file, and how to load it."""
    torch.save(content, folder / "policy.pt")
    architecture = architecture_file(folder, config)
    return PolicyConfig(checkpoint=str(folder / "policy.pt"), architecture=architecture, **options)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_dtype_is_what_was_asked_for(
    stored: torch.dtype, wanted: torch.dtype, tensors: Tensors, tmp_path: Path
) -> None:
    kept = {name: tensor.to(stored) for name, tensor in tensors.items()}
    policy = load_policy(official_config(tmp_path, {"model": kept}), dtype=wanted)
    assert not policy.training
    assert not any(parameter.requires_grad for parameter in policy.parameters())
    assert same(dict(policy.state_dict()), {n: tensor.to(wanted) for n, tensor in kept.items()})
    assert isinstance(policy, LlamaGen)
    cos, sin = rope_tables(TINY)
    assert torch.equal(policy.rope_cos, cos)
    assert torch.equal(policy.rope_sin, sin)


def test_official_and_own_files_give_the_same_policy(tensors: Tensors, tmp_path: Path) -> None:
    official = load_policy(official_config(tmp_path, {"model": tensors}))
    write_tensors(tmp_path / "own.safetensors", tensors, TINY.to_dict())
    own = load_policy(PolicyConfig(checkpoint=str(tmp_path / "own.safetensors")))
    assert official.config == own.config == TINY
    assert same(dict(official.state_dict()), dict(own.state_dict()))
    own.tok_embeddings.weight.zero_()  # the policy owns its memory: the file is not written to
    assert same(open_official(tmp_path / "policy.pt").tensors, tensors)


def test_without_weights_the_official_file_is_not_opened(tmp_path: Path) -> None:
    config = official_config(tmp_path, {})
    (tmp_path / "policy.pt").unlink()
    policy = load_policy(config, weights=False)
    assert policy.config == TINY
    assert not any(tensor.isnan().any() for tensor in policy.state_dict().values())


def test_rotary_tables_of_derived_code_are_complex_numbers(
    tensors: Tensors, tmp_path: Path
) -> None:
    table = torch.ones(TINY.num_tokens + 1, TINY.head_dim // 2, dtype=torch.complex64)
    policy = load_policy(official_config(tmp_path, {"model": tensors | {"freqs_cis": table}}))
    assert same(dict(policy.state_dict()), tensors)
    wrong = {"model": tensors | {"freqs_cis": table[:, :3]}}
    with pytest.raises(CheckpointError, match="of another number of heads, or another grid"):
        load_policy(official_config(tmp_path, wrong))


def test_captions_keep_their_untrained_buffer(tmp_path: Path) -> None:
    config = LlamaGenConfig(
        dim=32, num_layers=1, num_heads=2, grid=2, vocab_size=20, caption_dim=8, caption_tokens=5
    )
    tensors = dict(LlamaGen(config).state_dict())
    policy = load_policy(official_config(tmp_path, tensors, config), dtype=torch.bfloat16)
    kept = policy.state_dict()["cls_embedding.uncond_embedding"]
    expected = tensors["cls_embedding.uncond_embedding"]
    assert torch.equal(kept, expected.bfloat16())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm.weight": None}, "1 tensors are missing, the first is 'norm.weight'"),
        ({"extra": torch.ones(1)}, "1 tensors are unexpected, the first is 'extra'"),
        ({"norm.weight": torch.ones(3)}, r"'norm.weight' has shape \(3,\).*expects \(32,\)"),
        ({"norm.weight": torch.ones(32, dtype=torch.int8)}, "'norm.weight' is torch.int8"),
        ({"freqs_cis": torch.ones(17, 8, 2)}, r"shape \(17, 8, 2\).*leads to \(10, 8, 2\)"),
        (
            {"layers.0.attention.kv_cache.v_cache": torch.ones(2, 4, 16, 8)},
            r"shape \(2, 4, 16, 8\).*leads to \(2, 2, 16, 16\): it is of another number of heads",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(
    change: dict[str, Tensor | None], message: str, tensors: Tensors, tmp_path: Path
) -> None:
    changed = {name: tensor for name, tensor in (tensors | change).items() if tensor is not None}
    with pytest.raises(CheckpointError, match=rf"policy\.pt.*{message}"):
        load_policy(official_config(tmp_path, {"model": changed}))


def test_the_trainers_options_contradict_a_wrong_grid(tensors: Tensors, tmp_path: Path) -> None:
    content = trainer_file(tensors, image_size=48, downsample_size=16)
    load_policy(official_config(tmp_path, content))
    content = trainer_file(tensors, image_size=64, downsample_size=16)
    with pytest.raises(CheckpointError, match=r"a grid of 4, but .* has a grid of 3"):
        load_policy(official_config(tmp_path, content))


def named_like(name: str) -> Tensors:
    """A few tensors from which a model's width, depth and vocabulary can be told."""
    config = find_model(name).architecture
    assert isinstance(config, LlamaGenConfig)
    layers = {f"layers.{i}.ffn_norm.weight": torch.ones(1) for i in range(config.num_layers)}
    return layers | {"tok_embeddings.weight": torch.zeros(1, 1).expand(16384, config.dim)}


def test_without_an_architecture_the_fitting_names_are_listed(tmp_path: Path) -> None:
    file = tmp_path / "mine.pt"
    torch.save(named_like("llamagen-l-256"), file)
    with pytest.raises(ConfigError, match=r"set architecture; .* llamagen-l-256, llamagen-l-384"):
        load_policy(PolicyConfig(checkpoint=str(file)))
    wrong = PolicyConfig(checkpoint=str(file), architecture="llamagen-b-256")
    with pytest.raises(CheckpointError, match=r"is llamagen-b-256; .*of llamagen-l-256, llamagen"):
        load_policy(wrong)
    torch.save({"transformer.head.weight": torch.ones(1)}, file)
    with pytest.raises(ConfigError, match=r"taming file, .*\*-project\.yaml"):
        load_policy(PolicyConfig(checkpoint=str(file)))


def test_an_official_file_name_contradicts_another_grid(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.ones(1)}}, tmp_path / "c2i_B_384.pt")
    config = PolicyConfig(checkpoint=str(tmp_path / "c2i_B_384.pt"), architecture="llamagen-b-256")
    with pytest.raises(CheckpointError, match="official file of llamagen-b-384, but architecture"):
        load_policy(config)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"checkpoint": "llamagen-b-265"}, ConfigError, "mean 'llamagen-b-256'"),
        ({"checkpoint": "llamagen-3b-256"}, ConfigError, "no official file .* published"),
        ({"checkpoint": "llamagen-b-256"}, CheckpointError, "fetch llamagen-b-256"),
        ({"checkpoint": "cin_transformer"}, CheckpointError, "fetch cin_transformer"),
        ({"checkpoint": "llamagen-vq-16"}, CheckpointError, "is a tokenizer, expected a policy"),
        (
            {"checkpoint": "llamagen-b-256", "architecture": "llamagen-b-384"},
            ConfigError,
            "leave architecture empty",
        ),
        ({"checkpoint": OWN, "ema": True}, ConfigError, "ema off"),
        (
            {"checkpoint": "x/y.pt", "architecture": "llamagen-b-265"},
            ConfigError,
            "mean 'llamagen-b-256'",
        ),
    ],
)
def test_contradictory_checkpoint_options_are_refused(
    fields: dict[str, Any],
    error: type[Exception],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("TESSERA_WEIGHTS", str(tmp_path))
    with pytest.raises(error, match=message):
        load_policy(PolicyConfig(**fields))


def test_a_named_tokenizer_is_found_where_fetch_puts_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """VQ-8 of the true architecture, small only in its channels' values."""
    monkeypatch.setenv("TESSERA_WEIGHTS", str(tmp_path))
    config = find_model("llamagen-vq-8").architecture
    assert isinstance(config, VQConfig)
    tensors = dict(VQTokenizer(config).half().state_dict())
    usage = {"quantize.codebook_used": torch.zeros(65536)}
    torch.save({"model": tensors | usage}, tmp_path / "vq_ds8_c2i.pt")
    decoder = load_decoder(TokenizerConfig(checkpoint="llamagen-vq-8"))
    assert decoder.config == config
    assert not decoder.training
    assert torch.equal(decoder.post_quant_conv.weight, tensors["post_quant_conv.weight"].float())
    file = str(tmp_path / "vq_ds8_c2i.pt")
    (tmp_path / "mine.pt").symlink_to(file)
    wrong = TokenizerConfig(checkpoint=str(tmp_path / "mine.pt"), architecture="llamagen-vq-16")
    with pytest.raises(CheckpointError, match=r"is llamagen-vq-16; .* are those of llamagen-vq-8"):
        load_tokenizer(wrong)


PROJECT = """
model:
  target: taming.models.cond_transformer.Net2NetTransformer
  params:
    transformer_config:
      target: taming.modules.transformer.mingpt.GPT
      params: {vocab_size: 16, block_size: 16, n_layer: 2, n_head: 4, n_embd: 16}
    first_stage_config:
      target: taming.models.vqgan.VQModel
      params:
        embed_dim: 8
        n_embed: 16
        ddconfig: {double_z: false, z_channels: 32, resolution: 8, in_channels: 3, out_ch: 3,
                   ch: 32, ch_mult: [1, 2], num_res_blocks: 1, attn_resolutions: [4]}
    cond_stage_config:
      target: taming.modules.util.Labelator
      params: {n_classes: 4}
"""


@reads("actors/README.md", "`last.ckpt` of taming-transformers")
def test_taming_files_load_through_their_project(tmp_path: Path) -> None:
    config = TamingConfig(
        dim=16, num_layers=2, num_heads=4, vocab_size=16, block_size=16, grid=4, num_classes=4
    )
    policy = TamingGPT(config)
    (tmp_path / "x-project.yaml").write_text(PROJECT)
    state = official_policy_tensors(dict(policy.state_dict()), config)
    torch.save({"state_dict": state, "global_step": 1}, tmp_path / "last.ckpt")
    loaded = load_policy(
        PolicyConfig(
            checkpoint=str(tmp_path / "last.ckpt"), architecture=str(tmp_path / "x-project.yaml")
        )
    )
    assert loaded.config == config
    assert same(dict(loaded.state_dict()), dict(policy.state_dict()))
    assert isinstance(loaded, TamingGPT)
    assert torch.equal(loaded.sequence_order, policy.sequence_order)


# Architectures.


def test_the_largest_model_without_memory() -> None:
    config = find_model("llamagen-3b-384").architecture
    assert isinstance(config, LlamaGenConfig)
    assert (config.head_dim, config.hidden_dim, config.num_tokens) == (100, 8704, 576)
    with torch.device("meta"):
        policy = LlamaGen(config)
    assert all(tensor.is_meta for tensor in policy.state_dict().values())
    assert count_parameters(config) == sum(p.numel() for p in policy.parameters())


@pytest.mark.parametrize(
    ("name", "millions"),
    [  # as the official README has them
        ("llamagen-b-256", 111),
        ("llamagen-l-384", 343),
        ("llamagen-xl-384", 775),
        ("llamagen-xxl-384", 1411),
        ("llamagen-3b-384", 3097),
        ("llamagen-vq-16", 72),
        ("llamagen-vq-8", 70),
    ],
)
def test_parameter_counts(name: str, millions: int) -> None:
    architecture = find_model(name).architecture
    assert architecture is not None
    assert round(count_parameters(architecture) / 1e6) == millions


def test_a_policy_without_weights_has_real_tables() -> None:
    """Every buffer that no file holds is computed, although the weights are not."""
    coordinates = TamingConfig(
        dim=16,
        num_layers=1,
        num_heads=2,
        vocab_size=64,
        block_size=40,
        grid=4,
        condition="coordinates",
        image_size=8,
        coordinate_levels=32,
        coordinate_stride=2,
        permuter="SpiralIn",
    )
    for config, whole in ((TINY, LlamaGen(TINY)), (coordinates, TamingGPT(coordinates))):
        built = build_policy(config, dtype=torch.bfloat16)
        kept = whole.state_dict().keys()
        tables = {name: buffer for name, buffer in whole.named_buffers() if name not in kept}
        assert tables
        assert same({name: built.get_buffer(name) for name in tables}, tables)
        assert {tensor.dtype for tensor in built.state_dict().values()} == {torch.bfloat16}


def test_tokenizers_of_policies_are_in_the_table() -> None:
    for model in MODELS.values():
        if model.kind == "policy":
            assert model.tokenizer in MODELS
        assert not model.file or model.repo or model.project
