"""taming policies: two passes of one distribution, orders, conditions, official files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from actors.checkpoints.taming import (
    official_policy_tensors,
    parse_project,
    policy_tensors,
    read_project,
)
from actors.checkpoints.taming_vqgan import official_tokenizer_tensors, tokenizer_tensors
from actors.decoding.decode import decode_tokens, token_logprobs
from actors.models.base import Conditions, Window
from actors.models.permuters import inverse, permutation
from actors.models.taming import TamingConfig, TamingGPT
from actors.models.vq import VQConfig, VQDecoder, VQTokenizer, to_uint8
from cluster.errors import CheckpointError, ConfigError, DataError
from cluster.messages import Condition, SamplingSpec
from cluster.model_files.tensors import load_strict

BATCH = 3
CONFIGS: dict[str, dict[str, Any]] = {
    "class": {"condition": "class", "num_classes": 5},
    "none": {"condition": "none", "sos_token": 3, "permuter": "SpiralOut"},
    "coordinates": {
        "condition": "coordinates",
        "image_size": 8,
        "coordinate_levels": 20,
        "coordinate_stride": 2,
    },
    "coordinates, open": {
        "condition": "coordinates",
        "image_size": 8,
        "coordinate_levels": 20,
        "coordinate_stride": 2,
        "n_unmasked": 11,
        "permuter": "ZCurve",
    },
}


def make_config(**fields: Any) -> TamingConfig:
    sizes: dict[str, Any] = {
        "dim": 32,
        "num_layers": 2,
        "num_heads": 4,
        "vocab_size": 24,
        "block_size": 33,
    }
    return TamingConfig(**(sizes | {"grid": 4} | fields))


@pytest.fixture(params=CONFIGS)
def policy(request: pytest.FixtureRequest) -> TamingGPT:
    torch.manual_seed(0)
    policy = TamingGPT(make_config(**CONFIGS[request.param]))
    with torch.no_grad():  # positions start at zero: make them count
        policy.pos_emb.normal_()
        policy.head.weight.normal_()
    return policy.requires_grad_(False)


@pytest.fixture
def conditions(policy: TamingGPT) -> Conditions:
    return policy.encode([Condition(text="", class_index=index) for index in range(BATCH)])


@pytest.fixture
def uniforms(policy: TamingGPT) -> Tensor:
    drawn = np.random.default_rng(0).random((BATCH, policy.num_tokens))
    return torch.from_numpy(drawn)


@pytest.mark.parametrize("spec", [SamplingSpec(), SamplingSpec(temperature=0.8, top_k=9)])
def test_decoding_and_teacher_forcing_give_the_same_logprobs(
    policy: TamingGPT, conditions: Conditions, uniforms: Tensor, spec: SamplingSpec
) -> None:
    decoded = decode_tokens(policy, conditions, uniforms, spec)
    logprobs, entropies = token_logprobs(policy, decoded.tokens, conditions, spec)
    assert (decoded.logprobs - logprobs).abs().max() <= 1e-4
    assert (decoded.entropies - entropies).abs().max() <= 1e-4
    assert decoded.tokens.unique().numel() > 5


@torch.inference_mode()
def test_a_step_may_take_its_slot_from_a_tensor(policy: TamingGPT, conditions: Conditions) -> None:
    """As a captured step does: fixed window, empty slots under -inf."""
    states = [policy.allocate(BATCH) for _ in range(2)]
    for state in states:
        policy.prefill(state, conditions)
    slots = states[0].cache.shape[4]
    for column in range(policy.num_tokens - 1):
        tokens = torch.full((BATCH,), column)
        place = torch.tensor([states[1].position])
        bias = torch.where(torch.arange(slots) <= place, 0.0, -torch.inf).view(1, 1, 1, -1)
        live = policy.decode_step(states[0], tokens)
        static = policy.decode_step(states[1], tokens, Window(place, slots, bias))
        assert (live - static).abs().max() <= 1e-5


def test_an_image_token_sees_none_after_it(policy: TamingGPT, conditions: Conditions) -> None:
    tokens = torch.zeros(BATCH, policy.num_tokens, dtype=torch.int64)
    changed = tokens.clone()
    changed[:, 7] = 1
    apart = (policy(tokens, conditions) - policy(changed, conditions)).abs().amax((0, 2))
    assert apart[:8].max() == 0
    assert apart[8:].min() > 0


def test_unmasked_condition_tokens_see_each_other() -> None:
    fields = CONFIGS["coordinates"]
    torch.manual_seed(0)
    causal = TamingGPT(make_config(**fields))
    opened = TamingGPT(make_config(**fields, n_unmasked=16))
    opened.load_state_dict(causal.state_dict())
    conditions = causal.encode([Condition(text="")])
    tokens = torch.zeros(1, 16, dtype=torch.int64)
    assert (causal(tokens, conditions) - opened(tokens, conditions)).abs().max() > 1e-4


def test_train_and_eval_mode_agree(policy: TamingGPT, conditions: Conditions) -> None:
    tokens = torch.zeros(BATCH, policy.num_tokens, dtype=torch.int64)
    assert torch.equal(policy.train()(tokens, conditions), policy.eval()(tokens, conditions))


def test_codes_undo_the_order(policy: TamingGPT) -> None:
    raster = torch.arange(16).view(1, 4, 4)
    tokens = policy.tokens_of(raster)
    assert torch.equal(tokens[0], permutation(policy.config.permuter, 4))
    assert torch.equal(policy.codes(tokens), raster)


def test_guidance_is_refused(policy: TamingGPT, conditions: Conditions, uniforms: Tensor) -> None:
    with pytest.raises(ConfigError, match="without a null class: set guidance to 'none'"):
        policy.null_conditions(conditions)
    with pytest.raises(ConfigError, match="guidance"):
        decode_tokens(policy, conditions, uniforms, SamplingSpec(cfg_scale=2, guidance="guided"))


@pytest.mark.parametrize(("index", "message"), [(None, "no class_index"), (5, "5 classes")])
def test_a_wrong_class_is_refused(index: int | None, message: str) -> None:
    policy = TamingGPT(make_config(**CONFIGS["class"]))
    with pytest.raises(DataError, match=message):
        policy.encode([Condition(text="a dog", class_index=index)])


def test_coordinates_are_those_of_the_whole_image() -> None:
    policy = TamingGPT(make_config(**CONFIGS["coordinates"], vocab_size=20))
    tokens = policy.encode([Condition(text="")] * 2).values
    # Cell (r, c) of 2x2 pixels has the mean index 16 r + 2 c + 4.5 of 64, on 20 levels.
    cells = [round(20 * (16 * r + 2 * c + 4.5) / 64) for r in range(4) for c in range(4)]
    assert tokens.tolist() == [cells] * 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": 5}, "multiple of num_heads"),
        ({"condition": "depth"}, "'depth' is unknown"),
        ({"condition": "class", "num_classes": 25}, "num_classes"),
        ({"condition": "none", "sos_token": 24}, "sos_token"),
        ({"condition": "none", "block_size": 15}, "block_size is 15"),
        ({"condition": "none", "n_unmasked": 2}, "reaches past"),
        ({**CONFIGS["coordinates"], "image_size": 9}, "multiple of coordinate_stride"),
    ],
)
def test_impossible_architectures_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({**CONFIGS["coordinates"], "coordinate_levels": 40}, "vocab_size is 24"),
        ({"condition": "none", "permuter": "Hilbert"}, "'Hilbert' is unknown"),
        ({"condition": "none", "grid": 3, "permuter": "ZCurve"}, "power of two, found 3"),
        ({"condition": "none", "grid": 3, "permuter": "SpiralIn"}, "even grid, found 3"),
    ],
)
def test_impossible_orders_and_levels_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TamingGPT(make_config(**fields))


def test_orders_by_hand() -> None:
    assert permutation("AlternateParsing", 3).tolist() == [0, 1, 2, 5, 4, 3, 6, 7, 8]
    assert permutation("ZCurve", 4)[:8].tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert permutation("Subsample", 4)[:8].tolist() == [0, 2, 8, 10, 1, 3, 9, 11]
    assert permutation("SpiralOut", 4)[:8].tolist() == [9, 5, 6, 10, 14, 13, 12, 8]
    order = permutation("Random", 16)
    assert torch.equal(order[inverse(order)], torch.arange(256))


# Official files.

VQGAN_PARAMS: dict[str, Any] = {
    "embed_dim": 256,
    "n_embed": 1024,
    "ddconfig": {
        "double_z": False,
        "z_channels": 256,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 128,
        "ch_mult": [1, 1, 2, 2, 4],
        "num_res_blocks": 2,
        "attn_resolutions": [16],
        "dropout": 0.0,
    },
    "lossconfig": {"target": "taming.modules.losses.DummyLoss"},
}
VQGAN = {"target": "taming.models.vqgan.VQModel", "params": VQGAN_PARAMS}
GPT_PARAMS = {"vocab_size": 1024, "block_size": 512, "n_layer": 24, "n_head": 16, "n_embd": 1024}
GPT = {"target": "taming.modules.transformer.mingpt.GPT", "params": GPT_PARAMS}
COORDINATES = {
    "target": "taming.modules.misc.coord.CoordStage",
    "params": {"n_embed": 1024, "down_factor": 16},
}
CLASSES = {"target": "taming.modules.util.Labelator", "params": {"n_classes": 1000}}


def net2net(**params: Any) -> dict[str, Any]:
    """The `model` section of a project, with the stage of FacesHQ unless told otherwise."""
    return {
        "base_learning_rate": 4.5e-06,
        "target": "taming.models.cond_transformer.Net2NetTransformer",
        "params": {
            "cond_stage_key": "coord",
            "transformer_config": GPT,
            "first_stage_config": VQGAN,
            "cond_stage_config": COORDINATES,
        }
        | params,
    }


def write(folder: Path, model: dict[str, Any]) -> Path:
    path = folder / "2020-11-13-project.yaml"
    path.write_text(yaml.safe_dump({"model": model, "data": {"target": "main.Data"}}))
    return path


def test_a_coordinate_project(tmp_path: Path) -> None:
    project = read_project(write(tmp_path, net2net()))
    assert project.policy == TamingConfig(
        dim=1024,
        num_layers=24,
        num_heads=16,
        vocab_size=1024,
        block_size=512,
        grid=16,
        condition="coordinates",
        image_size=256,
        coordinate_levels=1024,
        coordinate_stride=16,
    )
    assert project.policy.num_slots == 511
    assert project.tokenizer == VQConfig(
        codebook_size=1024,
        codebook_dim=256,
        normalise=False,
        attention_levels=(4,),
        pixel_rule="taming",
    )


def test_a_class_project(tmp_path: Path) -> None:
    sizes = {"block_size": 256, "n_layer": 48, "n_head": 24, "n_embd": 1536}
    gpt = GPT | {"params": GPT_PARAMS | sizes}
    permuter = {
        "target": "taming.modules.transformer.permuter.ZCurve",
        "params": {"H": 16, "W": 16},
    }
    model = net2net(
        cond_stage_config=CLASSES, transformer_config=gpt, permuter_config=permuter, pkeep=0.9
    )
    policy = read_project(write(tmp_path, model)).policy
    assert policy is not None
    found = (policy.condition, policy.num_classes, policy.num_heads, policy.permuter)
    assert found == ("class", 1000, 24, "ZCurve")
    assert policy.num_slots == policy.block_size == 256


@pytest.mark.parametrize(
    "params",
    [
        {"cond_stage_config": "__is_unconditional__", "sos_token": 7},
        {"unconditional": True, "sos_token": 7},
    ],
)
def test_an_unconditional_project(params: dict[str, Any]) -> None:
    policy = parse_project(net2net(**params), "x.yaml").policy
    assert policy is not None
    assert (policy.condition, policy.sos_token) == ("none", 7)


def test_a_project_of_a_vqgan_alone(tmp_path: Path) -> None:
    project = read_project(write(tmp_path, VQGAN))
    assert project.policy is None
    assert project.tokenizer.codebook_size == 1024


def vqgan(**layers: Any) -> dict[str, Any]:
    return VQGAN | {"params": VQGAN_PARAMS | {"ddconfig": VQGAN_PARAMS["ddconfig"] | layers}}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"target": "taming.models.vqgan.GumbelVQ", "params": {}}, "model.target is .*GumbelVQ"),
        (net2net(cond_stage_config=VQGAN), "cond_stage_config.target is .*VQModel"),
        (net2net(cond_stage_config="__is_first_stage__"), "cond_stage_config is '__is_first"),
        (
            net2net(transformer_config=GPT | {"target": "taming.modules.transformer.CodeGPT"}),
            "transformer_config.target is .*CodeGPT",
        ),
        (
            net2net(transformer_config=GPT | {"params": GPT_PARAMS | {"vocab_size": 2048}}),
            "transformer_config.params.vocab_size is 2048, but the VQGAN has 1024",
        ),
        (
            net2net(transformer_config=GPT | {"params": GPT_PARAMS | {"n_head": "many"}}),
            "n_head should be of type int, found 'many'",
        ),
        (
            net2net(transformer_config=GPT | {"params": GPT_PARAMS | {"n_unmasked": 500}}),
            "n_unmasked 500 reaches past",
        ),
        (
            net2net(permuter_config={"target": "other.Hilbert"}),
            "permuter_config.target is not supported",
        ),
        (
            net2net(permuter_config={"target": "Random", "params": {"H": 8, "W": 8}}),
            "permuter_config.params.H is 8",
        ),
        (net2net(pkeep=0.0), "pkeep is 0.0: a policy trained on noise"),
        (net2net(downsample_cond_size=64), "downsample_cond_size is 64"),
        (vqgan(in_channels=1), "ddconfig.in_channels is 1, of which only 3"),
        (vqgan(double_z=True), "double_z is True"),
        (vqgan(ch=None), "ddconfig.ch is missing"),
        (vqgan(resolution=100), "resolution is 100"),
    ],
)
def test_what_is_not_supported_is_named(
    tmp_path: Path, model: dict[str, Any], message: str
) -> None:
    path = write(tmp_path, model)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_project(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["lightning: {trainer: {}}", "- 1", "a: [", ""])
def test_a_file_that_is_no_project_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "some.yaml"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=r"some\.yaml"):
        read_project(path)


def test_official_names_round_trip() -> None:
    policy = TamingGPT(make_config(**CONFIGS["coordinates, open"]))
    official = official_policy_tensors(policy.state_dict(), policy.config)
    mask = official["transformer.blocks.1.attn.mask"]
    assert mask.shape == (1, 1, 33, 33)
    assert mask[0, 0, 0].tolist() == [1.0] * 11 + [0.0] * 22
    assert "permuter.forward_shuffle_idx" in official
    ours = policy_tensors(official, policy.config, "x.ckpt")
    assert ours.keys() == policy.state_dict().keys()
    load_strict(policy, ours, "x.ckpt")


def test_another_permuter_than_the_files_is_refused() -> None:
    policy = TamingGPT(make_config(**CONFIGS["none"]))
    official = official_policy_tensors(policy.state_dict(), policy.config)
    for permuter in ("SpiralIn", "Identity"):
        other = make_config(**CONFIGS["none"] | {"permuter": permuter})
        with pytest.raises(CheckpointError, match=r"not the table of the permuter"):
            policy_tensors(official, other, "x.ckpt")


def test_strange_parts_of_a_file_are_refused() -> None:
    policy = TamingGPT(make_config(**CONFIGS["class"]))
    official = official_policy_tensors(policy.state_dict(), policy.config)
    with pytest.raises(CheckpointError, match=r"cond_stage_model\.x"):
        policy_tensors(official | {"cond_stage_model.x": torch.zeros(1)}, policy.config, "x.ckpt")
    with pytest.raises(CheckpointError, match="VQGAN's own file"):
        policy_tensors({"first_stage_model.x": torch.zeros(1)}, policy.config, "x.ckpt")
    with pytest.raises(CheckpointError, match="no VQGAN"):
        tokenizer_tensors(official, "x.ckpt")


def test_a_tokenizers_decoder_levels_are_reversed() -> None:
    names = {
        "encoder.down.1.block.0.norm1.weight": "encoder.conv_blocks.1.res.0.norm1.weight",
        "encoder.down.0.downsample.conv.bias": "encoder.conv_blocks.0.downsample.conv.bias",
        "decoder.up.0.block.2.conv1.weight": "decoder.conv_blocks.2.res.2.conv1.weight",
        "decoder.up.2.attn.1.q.weight": "decoder.conv_blocks.0.attn.1.q.weight",
        "decoder.mid.attn_1.k.bias": "decoder.mid.1.k.bias",
        "quantize.embedding.weight": "quantize.embedding.weight",
    }
    state = {name: torch.zeros(1) for name in (*names, "loss.discriminator.main.0.weight")}
    assert set(tokenizer_tensors(state, "vqgan.ckpt")) == set(names.values())
    inside = {f"first_stage_model.{name}": tensor for name, tensor in state.items()}
    inside["transformer.pos_emb"] = torch.zeros(1)
    assert set(tokenizer_tensors(inside, "x.ckpt")) == set(names.values())
    assert set(official_tokenizer_tensors(tokenizer_tensors(state, "x.ckpt"))) == set(names)


# The tokenizer's own differences.

SMALL: dict[str, Any] = {"channels": 32, "z_channels": 32, "codebook_size": 7, "codebook_dim": 4}


def test_codes_are_points_where_the_codebook_is_not_normalised() -> None:
    rows = torch.tensor([[1.0, 0, 0, 0], [5.0, 0, 0, 0]])
    latents = torch.tensor([4.0, 1.0, 0, 0]).view(1, 4, 1, 1)
    fields = SMALL | {"multipliers": (1,), "codebook_size": 2}
    for normalise, expected in ((False, 1), (True, 0)):
        tokenizer = VQTokenizer(VQConfig(**fields, normalise=normalise)).requires_grad_(False)
        tokenizer.quantize.embedding.weight.copy_(rows)
        assert tokenizer.nearest_codes(latents).item() == expected


def test_attention_is_at_the_given_levels() -> None:
    decoder = VQDecoder(VQConfig(**SMALL, multipliers=(1, 2, 2), attention_levels=(0, 1)))
    attended = {name.split(".")[2] for name in decoder.state_dict() if ".attn.2." in name}
    assert attended == {"1", "2"}  # the decoder begins at the coarsest level
    with pytest.raises(ConfigError, match="attention_levels"):
        VQConfig(**SMALL, multipliers=(1, 2), attention_levels=(2,))


def test_pixel_rules() -> None:
    images = torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.0, 2.0]).expand(1, 3, 1, 6)
    assert to_uint8(images)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255, 255]
    assert to_uint8(images, "taming")[0, 0, :, 0].tolist() == [0, 0, 127, 254, 255, 255]
    decoder = VQDecoder(VQConfig(**SMALL, multipliers=(1,), pixel_rule="taming")).eval()
    codes = torch.arange(4).view(1, 2, 2)
    assert torch.equal(decoder.pixels(codes), to_uint8(decoder(codes), "taming"))
    enlarged = F.interpolate(decoder(codes), size=(3, 3), mode="bicubic")
    assert torch.equal(decoder.pixels(codes, 3), to_uint8(enlarged, "taming"))
    with pytest.raises(ConfigError, match="pixel_rule"):
        VQConfig(pixel_rule="other")  # type: ignore[arg-type]
