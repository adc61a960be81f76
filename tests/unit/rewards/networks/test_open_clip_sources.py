"""Files of open_clip's weights are scored as the tag they are of: by tables, and by small weights.

The tables walk every model and tag that open_clip publishes, against open_clip's own resolution;
no network is built. Weights are random, of towers of the true kinds at small sizes.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cluster.errors import CheckpointError, ConfigError
from cluster.messages import Condition
from cluster.model_files.tensors import locate
from cluster.model_files.torchvision_ops import ensure_torchvision
from cluster.preflight import Findings
from rewards.config import ClipTerm, RewardsConfig
from rewards.networks.features import FeaturesConfig, load_features
from rewards.networks.open_clip_configs import Settings, settings_of
from rewards.networks.open_clip_models import TextImageModel
from rewards.networks.open_clip_sources import find_source, published_settings
from rewards.preflight import check_rewards
from rewards.scorers.clip import ClipConfig, ClipReward
from rewards.scorers.hpsv2 import ARCHITECTURE, TUNED_FROM, HpsConfig, HpsReward, tag_of
from tests.file_rows import reads
from tests.fuzzing import check_reader

MINIATURE = "package://learner.miniature/networks/clip"
CONDITIONS = [Condition(text="a three"), Condition(text="a seven")]


def open_clip() -> Any:
    ensure_torchvision()
    import open_clip

    return open_clip


def published() -> dict[str, list[str]]:
    """Model -> tags, of all that open_clip publishes."""
    found: dict[str, list[str]] = {}
    for model, tag in open_clip().list_pretrained():
        found.setdefault(model, []).append(tag)
    return found


@pytest.fixture
def unbuilt(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """open_clip's `create_model` without networks or downloads: what it would have built with."""
    factory = open_clip().factory
    built: list[dict[str, Any]] = []

    def made(**config: Any) -> SimpleNamespace:
        built.append(config)
        return SimpleNamespace(
            visual=SimpleNamespace(image_size=config["vision_cfg"]["image_size"])
        )

    for name in ("CLIP", "CustomTextCLIP", "CoCa"):
        monkeypatch.setattr(factory, name, made)
    monkeypatch.setattr(factory, "download_pretrained", lambda *_, **__: "weights")
    monkeypatch.setattr(factory, "load_checkpoint", lambda *_, **__: None)
    monkeypatch.setattr(factory, "_set_model_device_and_precision", lambda *_: None)
    return built


@pytest.mark.filterwarnings("ignore:QuickGELU mismatch")
def test_a_file_of_any_tag_gets_what_open_clip_gives_the_tag(unbuilt: list[dict[str, Any]]) -> None:
    """All 160 or so pairs: mean, deviation, interpolation, way of resizing, activation."""
    pairs = [(model, tag) for model, tags in published().items() for tag in tags]
    assert len(pairs) > 150
    for model, tag in pairs:
        theirs = open_clip().create_model(model, pretrained=tag).visual.preprocess_cfg
        activation = unbuilt[-1].get("quick_gelu", False)
        trained = open_clip().get_pretrained_cfg(model, tag).get("quick_gelu", False)
        settings = published_settings(model, tag)
        options = {
            "force_preprocess_cfg": settings.preprocess,
            "force_quick_gelu": settings.quick_gelu,
        }
        ours = open_clip().create_model(model, load_weights=False, **options).visual.preprocess_cfg
        assert {k: _plain(v) for k, v in ours.items()} == {k: _plain(v) for k, v in theirs.items()}
        # Where open_clip only warns of a mismatch, the tag is right, and open_clip's model wrong.
        assert unbuilt[-1].get("quick_gelu", False) == (activation or trained), (model, tag)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value


def test_models_whose_tags_agree_need_none(tmp_path: Path) -> None:
    """For 51 models a file used to get OpenAI's transform, which none of their tags has."""
    file = tmp_path / "weights.safetensors"
    file.touch()
    default = Settings(
        mean=open_clip().OPENAI_DATASET_MEAN,
        std=open_clip().OPENAI_DATASET_STD,
        interpolation="bicubic",
        resize_mode="shortest",
        fill_color=0,
        quick_gelu=False,
    )
    others, asked = [], []
    for model, tags in published().items():
        kinds = {published_settings(model, tag) for tag in tags}
        if all(kind.preprocess != default.preprocess for kind in kinds):
            others.append(model)
        if len(kinds) == 1:
            assert find_source(model, str(file)).settings in kinds
            continue
        asked.append(model)
        with pytest.raises(CheckpointError, match=r"does not tell .*set tag to the one"):
            find_source(model, str(file))
        for tag in tags:
            found = find_source(model, str(file), tag)
            assert found.settings == published_settings(model, tag)
            assert found.origin == f"of the tag {tag}"
    assert len(others) == 51
    assert {"ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-H-14", "ViT-bigG-14"} <= set(asked)
    assert not set(asked) & set(others)


def test_models_that_nobody_published_are_taken_as_open_clip_trains_them(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    file.touch()
    unpublished = set(open_clip().list_models()) - set(published())
    assert len(unpublished) > 20
    for model in unpublished:
        source = find_source(model, str(file))
        assert source.settings is not None
        assert source.settings.mean == open_clip().OPENAI_DATASET_MEAN
        assert "no weights of" in source.origin


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("ViT-B-16", "FILE", "datacomp_xl"),
            r"found 'datacomp_xl': did you mean 'datacomp_xl_s13",
        ),
        (("ViT-B-16-SigLIP", "FILE", "openai"), r"tag of ViT-B-16-SigLIP, .* there are webli"),
        (("ViT-L-14", "datacomp_xl_s13b_b90k", "openai"), "is no file: leave tag empty"),
        ((MINIATURE, "", "openai"), "comes with its own weights, .* found 'openai'"),
        (("ViT-B-16", "FILE", ""), r"QuickGELU.*or model to ViT-B-16-quickgelu"),
        (("ViT-H-14", "FILE", ""), r"laion2b_s32b_b79k.*: GELU, bicubic, shortest.*squash"),
        (("ViT-L-14", "FILE", ""), r"laion2b_s32b_b82k: GELU.* mean 0\.5,0\.5,0\.5"),
        (("local-dir:/nowhere", "", ""), "/nowhere: no such directory"),
    ],
)
def test_what_a_file_was_trained_with_must_be_known(
    options: tuple[str, str, str], message: str, tmp_path: Path
) -> None:
    (tmp_path / "w.pt").touch()
    model, pretrained, tag = options
    pretrained = str(tmp_path / "w.pt") if pretrained == "FILE" else pretrained
    with pytest.raises(CheckpointError, match=message):
        find_source(model, pretrained, tag)


def test_hpsv2_is_of_the_weights_it_was_tuned_from(tmp_path: Path) -> None:
    for pretrained in ("v2.0", "v2.1", str(tmp_path / "HPS_v2.1_compressed.pt")):
        assert tag_of(HpsConfig(model=ARCHITECTURE, pretrained=pretrained)) == TUNED_FROM
    assert tag_of(HpsConfig()) == ""
    assert not published_settings(ARCHITECTURE, TUNED_FROM).quick_gelu
    with pytest.raises(ConfigError, match="was tuned from is known, found 'dfn5b'"):
        HpsConfig(model=ARCHITECTURE, pretrained="v2.1", tag="dfn5b")
    with pytest.raises(ConfigError, match="package has a transform of its own"):
        HpsConfig(model=ARCHITECTURE, pretrained="x.pt", backend="package", tag="dfn5b")
    with pytest.raises(ConfigError, match="it is for clip"):
        FeaturesConfig(network="dinov2", tag="openai")


SMALL: dict[str, dict[str, Any]] = {
    "ViT-B-16": {"vision_cfg": {"layers": 1, "width": 64, "image_size": 32}},
    "ViT-L-14-336": {"vision_cfg": {"layers": 1, "width": 64, "image_size": 28}},
    "ViT-L-14-CLIPA": {
        "vision_cfg": {"layers": 1, "width": 64, "head_width": 32, "image_size": 28}
    },
    "ViT-B-16-SigLIP": {"vision_cfg": {"timm_model_name": "test_vit", "image_size": 160}},
    "PE-Core-T-16-384": {"vision_cfg": {"timm_model_name": "test_vit", "image_size": 160}},
    "MobileCLIP-S1": {"vision_cfg": {"timm_model_name": "test_vit", "image_size": 160}},
}
"""Models of the kinds that differ, with a small image tower; the text tower is made small, too."""


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """A directory with a tokenizer of transformers."""
    ensure_torchvision()
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = {
        word: index for index, word in enumerate(("<pad>", "<unk>", "<sep>", "a", "three", "seven"))
    }
    inner = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = {"pad_token": "<pad>", "unk_token": "<unk>", "sep_token": "<sep>"}
    made = PreTrainedTokenizerFast(tokenizer_object=inner, **marks)
    made.save_pretrained(tmp_path / "words")
    return tmp_path / "words"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, words: Path) -> None:
    """open_clip's named models at small sizes; tokenizers of the hub are one on the disk."""
    configs = open_clip().factory._MODEL_CONFIGS
    for model, change in SMALL.items():
        config = copy.deepcopy(configs[model])
        config["vision_cfg"] |= change["vision_cfg"]
        config["text_cfg"] |= {"layers": 1, "width": 64, "heads": 2, "vocab_size": 49408}
        if "hf_tokenizer_name" in config["text_cfg"]:
            config["text_cfg"]["hf_tokenizer_name"] = str(words)
        if config["vision_cfg"].get("timm_proj") == "none":
            config["vision_cfg"] |= {"timm_proj": "linear", "timm_pool": "token"}
        config["embed_dim"] = 64
        monkeypatch.setitem(configs, model, config)


def images() -> np.ndarray:
    """Not square and not flat, so that interpolation and way of resizing are seen."""
    return np.random.default_rng(0).integers(0, 256, (2, 50, 70, 3), np.uint8)


def plain_scores(model: str, tag: str, state: dict[str, torch.Tensor]) -> np.ndarray:
    """As open_clip's own example scores the weights of a tag."""
    from PIL import Image

    made, _, _ = open_clip().create_model_and_transforms(model)
    assert not made.load_state_dict(state).missing_keys
    merged = open_clip().transform.merge_preprocess_dict(
        made.visual.preprocess_cfg, open_clip().get_pretrained_cfg(model, tag)
    )
    merged["size"] = made.visual.image_size
    config = open_clip().transform.PreprocessCfg(**merged)
    transform = open_clip().transform.image_transform_v2(config, is_train=False)
    tokens = open_clip().get_tokenizer(model)([condition.text for condition in CONDITIONS])
    with torch.no_grad():
        pixels = torch.stack([transform(Image.fromarray(image)) for image in images()])
        pictures = made.eval().encode_image(pixels)
        return torch.cosine_similarity(pictures, made.encode_text(tokens)).numpy()


@pytest.fixture
def weights(small: None, tmp_path: Path) -> Any:
    def written(model: str) -> tuple[Path, dict[str, torch.Tensor]]:
        torch.manual_seed(0)
        network = open_clip().create_model(model)
        for name, parameter in network.named_parameters():  # so that the activation matters
            if "mlp" in name and parameter.ndim == 2:
                parameter.data.normal_(std=0.3)
        state = {name: value.clone().contiguous() for name, value in network.state_dict().items()}
        folder = tmp_path / model
        folder.mkdir()
        save_file(state, folder / "downloaded.safetensors")
        return folder / "downloaded.safetensors", state

    return written


@reads("rewards/README.md", "open_clip checkpoint, `.safetensors` or `.pt`, `.pth`, `.bin`")
@pytest.mark.parametrize(
    ("model", "tag"),
    [
        ("ViT-L-14-CLIPA", "datacomp1b"),
        ("ViT-B-16-SigLIP", "webli"),
        ("PE-Core-T-16-384", "meta"),
        ("MobileCLIP-S1", "datacompdr"),
    ],
)
def test_a_file_scores_as_its_tag(
    model: str, tag: str, weights: Any, caplog: pytest.LogCaptureFixture
) -> None:
    file, state = weights(model)
    with caplog.at_level("INFO", logger="rewards.networks.open_clip_models"):
        scores = ClipReward(ClipConfig(model=model, pretrained=str(file)))(images(), CONDITIONS)
    np.testing.assert_allclose(scores, plain_scores(model, tag, state), atol=1e-5)
    assert f"of its published weights ({tag})" in caplog.text
    torch.save({"state_dict": state}, file.with_suffix(".pt"))
    again = ClipReward(ClipConfig(model=model, pretrained=str(file.with_suffix(".pt"))))
    np.testing.assert_array_equal(again(images(), CONDITIONS), scores)


def test_the_activation_is_that_of_the_tags(weights: Any) -> None:
    """OpenAI's weights alone are published of ViT-L-14-336, and they have QuickGELU."""
    file, _ = weights("ViT-L-14-336")
    loaded = TextImageModel("ViT-L-14-336", str(file), "cpu", pack=False)
    blocks = (
        loaded.model.visual.transformer.resblocks[0].mlp,
        loaded.model.transformer.resblocks[0].mlp,
    )
    assert {type(mlp.gelu).__name__ for mlp in blocks} == {"QuickGELU"}

    file, _ = weights("ViT-B-16")
    scores, prints = {}, set()
    for tag in ("openai", "datacomp_xl_s13b_b90k", "laion2b_s34b_b88k"):
        config = ClipConfig(model="ViT-B-16", pretrained=str(file), tag=tag)
        scores[tag] = ClipReward(config)(images(), CONDITIONS)
        options = {"network": "clip", "model": "ViT-B-16", "checkpoint": str(file)}
        prints.add(load_features(FeaturesConfig(**options, tag=tag)).fingerprint)  # type: ignore[arg-type]
    assert np.abs(scores["openai"] - scores["datacomp_xl_s13b_b90k"]).max() > 1e-4
    np.testing.assert_array_equal(scores["datacomp_xl_s13b_b90k"], scores["laion2b_s34b_b88k"])
    assert len(prints) == 2


def described(folder: Path, model: str, **model_cfg: Any) -> dict[str, Any]:
    """open_clip's configuration of a tag's weights, as its `push_to_hf_hub` writes it."""
    (tag, *_) = published()[model]
    known = open_clip().get_pretrained_cfg(model, tag)
    config = {
        "model_cfg": open_clip().get_model_config(model) | model_cfg,
        "preprocess_cfg": {
            key: known[key] for key in ("mean", "std", "interpolation", "resize_mode")
        },
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return config


@reads("rewards/README.md", "a directory with `open_clip_config.json` and weights")
@pytest.mark.parametrize("model", ["ViT-L-14-CLIPA", "ViT-B-16-SigLIP", "MobileCLIP-S1"])
def test_a_file_a_directory_and_a_file_in_a_directory_score_the_same(
    model: str, weights: Any, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, _ = weights(model)
    alone = ClipConfig(model=model, pretrained=str(file))
    directory = shutil.copytree(words, tmp_path / "directory")
    shutil.copy(file, directory / "open_clip_model.safetensors")
    described(directory, model)
    inside = ClipConfig(model=model, pretrained=str(directory / "open_clip_model.safetensors"))
    whole = ClipConfig(model=str(directory))
    prefixed = ClipConfig(model=f"local-dir:{directory}")
    hub = ClipConfig(model="hf-hub:owner/name")
    serve(directory, monkeypatch)
    scores = [
        ClipReward(config)(images(), CONDITIONS) for config in (alone, inside, whole, prefixed, hub)
    ]
    for other in scores[1:]:
        np.testing.assert_array_equal(other, scores[0])
    prints = {
        load_features(
            FeaturesConfig(network="clip", model=config.model, checkpoint=config.pretrained)
        ).fingerprint
        for config in (alone, inside, whole)
    }
    assert len(prints) == 1
    torch.testing.assert_close(
        torch.from_numpy(scores[0]), torch.from_numpy(plain_of(directory)), atol=1e-5, rtol=0
    )


def serve(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """open_clip's downloads from the hub come from a directory."""

    def fetched(model_id: str, filename: str | None = None, **_: Any) -> str:
        assert model_id == "owner/name"
        return str(directory / (filename or "open_clip_model.safetensors"))

    monkeypatch.setattr(open_clip().factory, "download_pretrained_from_hf", fetched)


def plain_of(directory: Path) -> np.ndarray:
    """open_clip's own loading of a directory."""
    from PIL import Image

    model, _, transform = open_clip().create_model_and_transforms(f"local-dir:{directory}")
    tokenizer = open_clip().get_tokenizer(f"local-dir:{directory}")
    with torch.no_grad():
        pixels = torch.stack([transform(Image.fromarray(image)) for image in images()])
        tokens = tokenizer([condition.text for condition in CONDITIONS])
        pictures = model.eval().encode_image(pixels)
        return torch.cosine_similarity(pictures, model.encode_text(tokens)).numpy()


def test_the_configuration_beside_a_file_goes_before_the_tags(weights: Any) -> None:
    """Weights that were tuned with another transform, or with the other activation."""
    file, _ = weights("ViT-B-16")
    with pytest.raises(CheckpointError, match="set tag"):
        find_source("ViT-B-16", str(file))
    described(file.parent, "ViT-B-16", quick_gelu=True)
    source = find_source("ViT-B-16", str(file))
    assert source.settings is not None
    assert source.settings.quick_gelu
    assert "beside the file" in source.origin
    described(file.parent, "ViT-B-16", embed_dim=32)
    with pytest.raises(CheckpointError, match=r"another model than .*embed_dim is 32 there, 64"):
        find_source("ViT-B-16", str(file))
    found = find_source("ViT-B-16", str(file), "laion2b_s34b_b88k")  # the user's word goes first
    assert found.settings == published_settings("ViT-B-16", "laion2b_s34b_b88k")
    described(file.parent, "ViT-B-16-quickgelu", quick_gelu=False)
    with pytest.raises(CheckpointError, match=r"has QuickGELU, but .* set model to ViT-B-16"):
        find_source("ViT-B-16-quickgelu", str(file))


@reads(
    "rewards/README.md",
    "open_clip checkpoint beside a `preprocessor_config.json`",
)
def test_transformers_configurations_beside_a_file(tmp_path: Path) -> None:
    """As CLIPImageProcessor and SiglipImageProcessor write them."""
    transformers = pytest.importorskip("transformers")
    (tmp_path / "w.safetensors").touch()
    file = str(tmp_path / "w.safetensors")
    processors = {
        "shortest": transformers.CLIPImageProcessorPil
        if hasattr(transformers, "CLIPImageProcessorPil")
        else transformers.CLIPImageProcessor,
        "squash": transformers.SiglipImageProcessorPil
        if hasattr(transformers, "SiglipImageProcessorPil")
        else transformers.SiglipImageProcessor,
    }
    for mode, processor in processors.items():
        processor(image_mean=[0.1, 0.2, 0.3], resample=2).save_pretrained(tmp_path)
        settings = find_source("ViT-B-16", file).settings
        assert settings is not None
        assert (settings.resize_mode, settings.interpolation) == (mode, "bilinear")
        assert settings.mean == (0.1, 0.2, 0.3)
        assert not settings.quick_gelu
    transformers.CLIPConfig().save_pretrained(tmp_path)  # OpenAI's: quick_gelu
    settings = find_source("ViT-B-16", file).settings
    assert settings is not None
    assert settings.quick_gelu
    (tmp_path / "preprocessor_config.json").write_text('{"size": {"longest_edge": 224}}')
    with pytest.raises(CheckpointError, match="set tag to the pretrained tag"):
        find_source("ViT-B-16", file)


def test_transformers_names_are_reported_and_refused_before_a_run(tmp_path: Path) -> None:
    """A file of CLIPModel or SiglipModel: other names for the same weights."""
    ensure_torchvision()
    transformers = pytest.importorskip("transformers")
    tiny = {"hidden_size": 24, "intermediate_size": 24, "num_hidden_layers": 1}
    sizes = {"text_config": tiny, "vision_config": tiny}
    saved = {
        "ViT-B-32-quickgelu": transformers.CLIPModel(transformers.CLIPConfig(**sizes)),
        "ViT-B-16-SigLIP": transformers.SiglipModel(transformers.SiglipConfig(**sizes)),
    }
    for model, network in saved.items():
        network.save_pretrained(tmp_path / model)
        file = str(tmp_path / model / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"names of transformers' models.*take open_clip"):
            TextImageModel(model, file, "cpu")
        findings = Findings()
        clip = ClipTerm(model=model, pretrained=file)
        check_rewards(RewardsConfig(clip=clip), (), 8, findings)
        (problem,) = findings.problems
        assert problem.startswith("rewards.clip.pretrained: ")
        assert "the names of transformers' models" in problem


def test_settings_are_open_clips() -> None:
    """Its defaults, which are known without importing it, and what it does with others."""
    transform = open_clip().transform
    for given in ({}, {"mean": [0.5], "std": None}, {"size": 3, "resize_mode": "squash"}):
        merged = transform.merge_preprocess_dict(transform.PreprocessCfg(), given)
        found = settings_of(given, quick_gelu=False).preprocess
        del merged["size"], merged["mode"]
        assert found == merged | {"mean": found["mean"], "std": found["std"]}
        assert found["mean"] == tuple(np.broadcast_to(merged["mean"], 3))
        assert found["std"] == tuple(merged["std"])


@reads("rewards/README.md", "HPSv2's `HPS_v2*.pt` and files of that layout")
def test_hpsv2_files_keep_the_transform_of_vit_h_14(
    weights: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written as HPSv2 does, {"state_dict": ..., "epoch": ...}; the architecture is small."""
    configs = open_clip().factory._MODEL_CONFIGS
    monkeypatch.setitem(configs, ARCHITECTURE, configs["ViT-B-16"])
    file, state = weights(ARCHITECTURE)
    torch.save({"epoch": 3, "name": "hps", "state_dict": state}, file.with_suffix(".pt"))
    scorer = HpsReward(HpsConfig(model=ARCHITECTURE, pretrained=str(file.with_suffix(".pt"))))
    black = scorer.preprocess(np.zeros((1, 224, 224, 3), np.uint8))[0, :, 0, 0]
    mean, std = (
        torch.tensor(of) for of in (open_clip().OPENAI_DATASET_MEAN, open_clip().OPENAI_DATASET_STD)
    )
    torch.testing.assert_close(black, -mean / std)
    assert type(scorer._model.model.transformer.resblocks[0].mlp.gelu).__name__ == "GELU"  # type: ignore[attr-defined]
    assert np.isfinite(scorer(images(), CONDITIONS)).all()


def test_files_of_earlier_programs(weights: Any) -> None:
    """OpenAI's state dicts tell three sizes, and SigLIP's files lack a bias of CLIP's."""
    file, state = weights("ViT-L-14-336")
    sizes = {
        name: torch.tensor(77) for name in ("input_resolution", "context_length", "vocab_size")
    }
    torch.save(
        state | sizes | {"logit_scale": state["logit_scale"].reshape(1)}, file.with_suffix(".pt")
    )
    scores = [
        ClipReward(ClipConfig(model="ViT-L-14-336", pretrained=str(name)))(images(), CONDITIONS)
        for name in (file, file.with_suffix(".pt"))
    ]
    np.testing.assert_array_equal(scores[0], scores[1])
    file, state = weights("ViT-B-16-SigLIP")
    del state["logit_bias"]
    save_file(state, file)
    ClipReward(ClipConfig(model="ViT-B-16-SigLIP", pretrained=str(file)))


def test_damaged_directories_are_refused_with_the_reason(tmp_path: Path) -> None:
    """Both files of a directory in open_clip's layout."""
    directory = shutil.copytree(locate(MINIATURE, directory=True), tmp_path / "clip")

    def read(_: Path) -> TextImageModel:
        return TextImageModel(str(directory), "", "cpu", pack=False)

    def good(model: object) -> bool:
        assert isinstance(model, TextImageModel)
        return all(value > 0 for value in model.preprocess_config["std"])

    check_reader(directory / "open_clip_config.json", read, 200, good=good)
    check_reader(directory / "open_clip_model.safetensors", read, 60)


def test_damaged_configurations_of_transformers(tmp_path: Path) -> None:
    """Both files, by bytes and by values."""
    (tmp_path / "w.safetensors").touch()
    clip: dict[str, Any] = {
        "preprocessor_config.json": {
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "resample": 3,
            "size": {"shortest_edge": 224},
            "do_center_crop": True,
        },
        "config.json": {
            "vision_config": {"hidden_act": "gelu"},
            "text_config": {"hidden_act": "gelu"},
        },
    }
    for name, config in clip.items():
        (tmp_path / name).write_text(json.dumps(config))

    def read(_: Path) -> object:
        return find_source("ViT-B-16", str(tmp_path / "w.safetensors")).settings

    def good(settings: object) -> bool:
        assert isinstance(settings, Settings)
        return all(0 <= value <= 1 for value in settings.mean) and min(settings.std) > 0

    for name, config in clip.items():
        check_reader(tmp_path / name, read, 250, good=good)
        for case in range(300):
            odd = other_value(config, random.Random(case))
            (tmp_path / name).write_text(json.dumps(odd))
            try:
                assert good(read(tmp_path))
            except CheckpointError:
                continue
        (tmp_path / name).write_text(json.dumps(config))


ODD = (None, True, -1, 0, 1, 3, 2**31, 1e308, float("nan"), "", "x", [], [8, 8], {}, {"a": 1})


def other_value(config: Any, draw: random.Random) -> Any:
    """A configuration with one value, somewhere, replaced or removed."""
    changed = copy.deepcopy(config)
    place = changed
    while True:
        key = draw.choice(sorted(place))
        if not isinstance(place[key], dict) or draw.random() < 0.1:
            break
        place = place[key]
    if draw.random() < 0.1:
        del place[key]
    else:
        place[key] = draw.choice(ODD)
    return changed


def test_configurations_with_other_values_are_refused_or_right(tmp_path: Path) -> None:
    directory = shutil.copytree(locate(MINIATURE, directory=True), tmp_path / "clip")
    file = directory / "open_clip_config.json"
    config = json.loads(file.read_text())
    config["preprocess_cfg"] |= {
        "resize_mode": "shortest",
        "fill_color": 0,
        "mode": "RGB",
        "size": 8,
    }
    config["model_cfg"] |= {"quick_gelu": False, "custom_text": False}
    taken = 0
    for case in range(600):
        file.write_text(json.dumps(other_value(config, random.Random(case))))
        try:
            scorer = ClipReward(ClipConfig(model=str(directory)))
        except CheckpointError:
            continue
        taken += 1
        scores = scorer(images(), CONDITIONS)
        assert np.isfinite(scores).all(), case
    assert 0 < taken < 300
