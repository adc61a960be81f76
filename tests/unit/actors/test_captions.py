"""Caption features: a T5 of random weights, made here, against transformers itself."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from actors import sample
from actors.captions import main
from actors.checkpoints.loading import TokenizerConfig
from actors.models.llamagen import LlamaGen, LlamaGenConfig
from actors.text import encoder as encoders
from actors.text.captions import read_captions
from actors.text.encoder import CaptionEncoder, check_captions, normalise_caption
from actors.text.features import (
    features_of,
    iterate_caption_features,
    read_caption_features,
    write_caption_features,
)
from cluster.errors import CheckpointError, ConfigError, DataError
from cluster.model_files.tensors import read_config, read_tensors, write_tensors
from cluster.model_files.torchvision_ops import ensure_torchvision

ensure_torchvision()
transformers = pytest.importorskip("transformers", reason="needs the extra t2i")

WORDS = ["a", "red", "cat", "dog", "on", "the", "mat", "and", "blue", "bird"]
TEXTS = ["a red cat", "the dog on the mat and a bird", "a", "blue bird on the red mat"]
WIDTH = 16


@pytest.fixture(scope="module")
def encoder_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with a tiny T5 and a tokenizer of whole words that ends captions with </s>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    folder = tmp_path_factory.mktemp("t5")
    vocabulary = {word: at for at, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=len(vocabulary), d_model=WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2
    )
    config.feed_forward_proj = "gated-gelu"
    model = transformers.T5EncoderModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.5)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def encoder(encoder_path: str) -> CaptionEncoder:
    return CaptionEncoder(encoder_path, batch=3)


def reference(encoder_path: str, texts: list[str], length: int = 120) -> list[np.ndarray]:
    """The official pipeline: padded to 120 on the right, masked, the real tokens' rows."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder_path)
    model = transformers.T5EncoderModel.from_pretrained(encoder_path).eval()
    tokens = tokenizer(
        texts, max_length=length, padding="max_length", truncation=True, return_tensors="pt"
    )
    assert tokens["input_ids"].shape == (len(texts), length)
    with torch.no_grad():
        hidden = model(tokens["input_ids"], attention_mask=tokens["attention_mask"])[0]
    counts = tokens["attention_mask"].sum(1).tolist()
    return [rows[:count].numpy() for rows, count in zip(hidden, counts)]


def test_weights_that_are_not_finite_are_named(encoder_path: str, tmp_path: Path) -> None:
    """In the file, or after the change to a type that cannot hold them."""
    folder = tmp_path / "t5"
    shutil.copytree(encoder_path, folder)
    file = folder / "model.safetensors"
    for value, dtype in ((float("nan"), "float32"), (1e5, "float16")):
        tensors = read_tensors(file)
        name = "encoder.block.0.layer.0.SelfAttention.q.weight"
        tensors[name][0, 0] = value
        save_file(dict(tensors), file, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=rf"encoder .*t5 in .* tensor '{name}' is not fi"):
            CaptionEncoder(str(folder), dtype=dtype)  # type: ignore[arg-type]


def test_features_are_those_of_transformers(encoder: CaptionEncoder, encoder_path: str) -> None:
    features = encoder(TEXTS)
    assert encoder.width == WIDTH
    assert [rows.shape for rows in features] == [(n + 1, WIDTH) for n in (3, 8, 1, 6)]
    for rows, wanted in zip(features, reference(encoder_path, TEXTS)):
        assert rows.dtype == np.float32
        assert np.abs(rows - wanted).max() <= 1e-5
        assert not rows.flags.writeable


def test_long_captions_keep_their_end_token(encoder: CaptionEncoder, encoder_path: str) -> None:
    long = " ".join(WORDS * 20)
    (rows,) = encoder([long])
    assert rows.shape == (120, WIDTH)
    wanted = reference(encoder_path, [" ".join((WORDS * 20)[:119])])[0]  # 119 words and </s>
    assert np.abs(rows - wanted).max() <= 1e-5
    assert CaptionEncoder(encoder_path, max_tokens=5)([long])[0].shape == (5, WIDTH)


def test_features_do_not_depend_on_their_batch(encoder: CaptionEncoder, encoder_path: str) -> None:
    alone = CaptionEncoder(encoder_path, batch=1)(TEXTS)
    for one, other in zip(alone, encoder(TEXTS)):
        assert np.abs(one - other).max() <= 1e-5


def test_captions_are_encoded_once(encoder_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "CACHED", 2)
    encoder = CaptionEncoder(encoder_path, batch=4)
    first, again, _ = encoder(["a cat", "A  Cat", "a dog"])
    assert first is again
    assert encoder(["a cat"])[0] is first
    encoder(["a bird", "the mat"])  # only two are remembered: the cat is forgotten
    assert encoder(["a cat"])[0] is not first


def test_reduced_precision_comes_back_as_float32(encoder_path: str) -> None:
    (rows,) = CaptionEncoder(encoder_path, dtype=torch.bfloat16)(["a red cat"])
    assert rows.dtype == np.float32
    assert np.array_equal(torch.tensor(rows).bfloat16().float().numpy(), rows)


def test_raw_captions_are_left_as_they_are(encoder_path: str) -> None:
    raw = CaptionEncoder(encoder_path, normalise=False)
    clean = CaptionEncoder(encoder_path)
    assert np.array_equal(clean(["A RED Cat"])[0], clean(["a red cat"])[0])
    assert not np.array_equal(raw(["A RED Cat"])[0], raw(["a red cat"])[0])


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("  A Red\tCat \n", "a red cat"),
        ("salt &amp;amp; pepper", "salt pepper"),
        ("A cat—a “big” one—sleeps", 'a cat-a "big" one-sleeps'),
        ("the dog’s “ball”", 'the dog\'s "ball"'),
        ('"A quoted prompt"', "a quoted prompt"),
        ("cats (two), dogs/birds #art", "cats two , dogs birds art"),
        ("wait... what", "wait what"),
        ("this-is-my-cute-cat", "this is my cute cat"),
        ("one,two", "one, two"),
        ("A cat, a dog,", "a cat, a dog"),
        ("A cat. A dog.", "a cat. a dog."),
        ("***", ""),
    ],
)
def test_normalisation(text: str, clean: str) -> None:
    assert normalise_caption(text) == clean


def test_parquet_round_trip(tmp_path: Path, encoder: CaptionEncoder) -> None:
    path = tmp_path / "deep" / "features.parquet"
    texts = TEXTS * 40  # more than one row group
    write_caption_features(path, iter(texts), encoder.stream(texts))
    conditions = read_caption_features(path)
    assert [condition.text for condition in conditions] == texts
    for condition, rows in zip(conditions, encoder(texts)):
        assert condition.class_index is None
        features = features_of(condition)
        assert features is not None
        assert features.dtype == np.float32
        assert not features.flags.writeable
        assert np.array_equal(features, rows)
    assert pq.ParquetFile(path).num_row_groups > 1
    assert next(iterate_caption_features(path)).text == texts[0]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_half_precision_files_are_read(tmp_path: Path) -> None:
    halves = pa.array([np.arange(6, dtype=np.float16)], pa.list_(pa.float16()))
    table = pa.table({"shape": [[2, 3]], "caption": ["a"], "features": halves, "more": [1]})
    pq.write_table(table, tmp_path / "half.parquet")
    (condition,) = read_caption_features(tmp_path / "half.parquet")
    features = features_of(condition)
    assert features is not None
    assert features.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_features_fit_a_caption_conditional_policy(encoder: CaptionEncoder, tmp_path: Path) -> None:
    config = LlamaGenConfig(
        dim=32, num_layers=1, num_heads=2, grid=2, vocab_size=8, caption_dim=WIDTH
    )
    write_caption_features(tmp_path / "f.parquet", TEXTS, encoder(TEXTS))
    encoded = LlamaGen(config).encode(read_caption_features(tmp_path / "f.parquet"))
    assert encoded.mask is not None
    assert encoded.mask.sum(1).tolist() == [4, 9, 2, 7]


def table(**changes: list) -> dict[str, list]:
    columns = {
        "caption": ["a", "b"],
        "features": [[1.0, 2.0], [3.0, 4.0]],
        "shape": [[1, 2], [1, 2]],
    }
    return columns | changes


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"caption": ["a"], "shape": [[1, 2]]}, "column 'features' is missing"),
        (table(caption=["a", None]), "column 'caption', row 1: found nothing"),
        (table(caption=[1, 2]), "column 'caption', row 0: found int, expected text"),
        (table(features=[[1.0, 2.0], [3.0]]), "column 'features', row 1: found 1 numbers"),
        (table(features=[[1.0, float("nan")], [3.0, 4.0]]), "row 0: found values that are not"),
        (table(features=[["x", "y"], ["z", "w"]]), "not of floats"),
        (table(features=["x", "y"]), "column 'features', row 0: found string"),
        (table(shape=[[1, 2], [2]]), r"column 'shape', row 1: found \[2\], expected \[n, D\]"),
        (table(shape=[[1, 2], [0, 2]]), r"row 1: found \[0, 2\]"),
        (table(shape=[[1, 2], [2, 1]]), "column 'shape', row 1: found width 1, but row 0 has"),
    ],
)
def test_unreadable_features_are_refused(
    tmp_path: Path, columns: dict[str, list], message: str
) -> None:
    path = tmp_path / "features.parquet"
    pq.write_table(pa.table(columns), path)
    with pytest.raises(DataError, match=message) as caught:
        read_caption_features(path)
    assert str(path) in str(caught.value)


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 but not really")
    for path in (tmp_path / "missing.parquet", broken):
        with pytest.raises(DataError, match=r"not a readable Parquet file"):
            read_caption_features(path)
    write_caption_features(tmp_path / "empty.parquet", [], [])
    with pytest.raises(DataError, match="holds no caption"):
        read_caption_features(tmp_path / "empty.parquet")


@pytest.mark.parametrize(
    ("texts", "features", "message"),
    [
        (["a", "b"], [np.ones((1, 2))], "column 'features', row 1: found nothing"),
        (["a"], [np.ones((1, 2)), np.ones((1, 2))], "column 'caption', row 1: found nothing"),
        (["a"], [np.ones(2)], r"row 0: found float64 of shape \(2,\)"),
        (["a"], [np.ones((1, 2), int)], "row 0: found int64"),
        (["a"], [np.full((1, 2), np.inf)], "row 0: found values that are not finite"),
    ],
)
def test_wrong_features_are_not_written(
    tmp_path: Path, texts: list[str], features: list[np.ndarray], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        write_caption_features(tmp_path / "features.parquet", texts, features)
    assert list(tmp_path.iterdir()) == []


def test_caption_files(tmp_path: Path) -> None:
    path = tmp_path / "captions.txt"
    path.write_bytes("\ufeffa cat\r\n\r\n  ein Bär \n".encode())
    assert read_captions(path) == ["a cat", "ein Bär"]
    path.write_text("\n \n")
    with pytest.raises(DataError, match="holds no caption"):
        read_captions(path)
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DataError, match="not a readable UTF-8 text file"):
        read_captions(path)


def test_command(tmp_path: Path, encoder_path: str, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "captions.txt", tmp_path / "features.parquet"
    source.write_text("\n".join(TEXTS))
    arguments = [str(source), str(target), "--encoder", encoder_path, "--device", "cpu"]
    assert main(arguments) == 0
    assert f"4 captions, features of width {WIDTH}" in capsys.readouterr().out
    wanted = CaptionEncoder(encoder_path)(TEXTS)
    found = [features_of(condition) for condition in read_caption_features(target)]
    assert all(np.array_equal(one, other) for one, other in zip(found, wanted))
    assert main(arguments) == 2
    assert "features.parquet exists" in capsys.readouterr().err


LONG = " ".join(WORDS * 20)
UNREAD = {
    LONG: "has 201 tokens, but the model reads 120: shorten it, or set --long-captions to truncate",
    "一只猫": "is unknown to the encoder, whole (1 unknown tokens)",
    "zebra, zebras": "is unknown to the encoder, whole",
    "[***]": "has nothing left after the encoder's cleaning",
    "\u200b": "is unknown to the encoder, whole",
}


@pytest.mark.parametrize("text", UNREAD)
def test_captions_that_are_not_read_as_written_are_counted_and_refused(
    tmp_path: Path, encoder_path: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "captions.txt", tmp_path / "features.parquet"
    source.write_text("\n".join(["a red cat", text, "a", text]), encoding="utf-8")
    arguments = [str(source), str(target), "--encoder", encoder_path, "--device", "cpu"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "2 of 4 are not read as written; the first is number 2" in error
    assert UNREAD[text] in error
    assert encoder_path in error
    assert not target.exists()
    assert main([*arguments, "--long-captions", "truncate"]) == (0 if text == LONG else 2)


def test_what_flan_t5s_kind_of_vocabulary_knows() -> None:
    """Pieces of sentencepiece: Chinese is the mark of a word and one unknown token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    pieces = ["<pad>", "</s>", "<unk>", "\u2581", "\u2581a", "\u2581cat", ","]
    unigram = models.Unigram([(piece, -1.0) for piece in pieces], unk_id=2, byte_fallback=False)
    made = Tokenizer(unigram)
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    texts = ["a cat", "一只猫", "一只, a", ",", " ", ""]
    found = encoders.tokenizer_readings(tokenizer, texts, 120)
    assert [(r.known, r.unknown, r.empty) for r in found] == [
        (2, 0, False),
        (0, 1, False),
        (1, 1, False),
        (0, 0, False),
        (0, 0, True),
        (0, 0, True),
    ]


def test_what_is_cut_or_known_in_parts_is_said(
    encoder: CaptionEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    check_captions("here", ["a cat", "a zebra", LONG, "a unicorn"], encoder, "truncate")
    cut, partly = caplog.messages
    assert "1 of 4 captions are cut at what the encoder reads; the first is number 3" in cut
    assert "2 of 4 captions are unknown to it in parts; the first is number 2: 'a zebra'" in partly
    caplog.clear()
    check_captions("here", TEXTS, encoder, "error")
    assert not caplog.messages


def small_policy() -> LlamaGenConfig:
    """Of captions, for the miniature's tokenizer."""
    return LlamaGenConfig(
        dim=32,
        num_layers=1,
        num_heads=2,
        grid=4,
        vocab_size=read_config(TokenizerConfig().checkpoint)["codebook_size"],
        caption_dim=WIDTH,
        caption_tokens=5,
    )


def test_sampling_and_runs_refuse_what_the_encoder_does_not_read(
    tmp_path: Path, encoder_path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from learner.data.captions import check_encoder
    from learner.data.conditions import ConditionsConfig

    config = small_policy()
    policy, text = tmp_path / "policy.safetensors", tmp_path / "captions.tsv"
    write_tensors(policy, LlamaGen(config).state_dict(), config.to_dict())
    text.write_text("Prompt\tNote\n" + "\n".join(f"{t}\tx" for t in TEXTS), encoding="utf-8")
    options = ["--checkpoint", policy, "--captions", text, "--encoder", encoder_path]
    options += ["--tokenizer", TokenizerConfig().checkpoint, "--out", tmp_path / "out"]
    assert sample.main(list(map(str, options))) == 2
    error = capsys.readouterr().err
    assert "2 of 4 are not read as written; the first is number 2" in error
    assert "has 9 tokens, but the model reads 5" in error
    text.write_text("Prompt\n一只猫\n", encoding="utf-8")
    for act in (
        lambda: check_encoder(encoder_path, ["一只猫"], "truncate"),
        lambda: ConditionsConfig(
            captions=str(text), encoder=encoder_path, long_captions="truncate"
        ).encoded(tmp_path / "encoded.parquet"),
    ):
        with pytest.raises(DataError, match=r"1 of 1 are not read .* unknown to the encoder"):
            act()
    with pytest.raises(DataError, match=r"set conditions\.long_captions to truncate"):
        check_encoder(encoder_path, [LONG], "error")


def test_captions_are_sampled_from_text_as_from_features(tmp_path: Path, encoder_path: str) -> None:
    config = small_policy()
    torch.manual_seed(0)
    policy = tmp_path / "policy.safetensors"
    write_tensors(policy, LlamaGen(config).state_dict(), config.to_dict())
    text, features = tmp_path / "captions.txt", tmp_path / "features.parquet"
    text.write_text("\n".join(TEXTS))
    write_caption_features(features, TEXTS, CaptionEncoder(encoder_path, max_tokens=5)(TEXTS))
    images = []
    for source in (text, features):
        npz = tmp_path / f"{source.stem}.npz"
        options = ["--checkpoint", policy, "--captions", source, "--encoder", encoder_path]
        options += ["--long-captions", "truncate"]  # the policy reads 5 tokens
        options += ["--tokenizer", TokenizerConfig().checkpoint]
        options += ["--out", tmp_path / source.stem, "--npz", npz, "--device", "cpu"]
        assert sample.main(list(map(str, options))) == 0
        images.append(np.load(npz)["arr_0"])
    assert images[0].shape[0] == 16
    assert np.array_equal(*images)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--encoder", "/nowhere/t5"], "encoder /nowhere/t5: neither a directory"),
        (["--batch", "0"], "must be >= 1"),
        (["--device", "toaster"], "device 'toaster' is not available here"),
    ],
)
def test_command_refuses_in_one_line(
    tmp_path: Path,
    encoder_path: str,
    extra: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, target = tmp_path / "captions.txt", tmp_path / "features.parquet"
    source.write_text("a cat")
    assert main([str(source), str(target), "--encoder", encoder_path, *extra]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("error: ") == 1
    assert not target.exists()


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"pip install 'tessera-rl\[t2i\]'"):
        CaptionEncoder("anything")


def test_an_incomplete_encoder_is_refused(encoder_path: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in Path(encoder_path).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["encoder.block.1.layer.0.SelfAttention.q.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="1 tensors are missing, the first is 'encoder"):
        CaptionEncoder(str(tmp_path))


def test_a_run_may_encode_its_captions_itself(encoder_path: str, tmp_path: Path) -> None:
    from learner.data.conditions import ConditionsConfig

    (tmp_path / "captions.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    config = ConditionsConfig(captions=str(tmp_path / "captions.txt"), encoder=encoder_path)
    encoded = config.encoded(tmp_path / "encoded.parquet")
    assert (encoded.captions, encoded.encoder) == (str(tmp_path / "encoded.parquet"), "")
    found = encoded.conditions()
    for condition, text, wanted in zip(found, TEXTS, reference(encoder_path, TEXTS), strict=True):
        assert condition.text == text
        assert np.abs(features_of(condition) - wanted).max() <= 1e-5
    written = (tmp_path / "encoded.parquet").stat().st_mtime_ns
    assert config.encoded(tmp_path / "encoded.parquet") == encoded
    assert (tmp_path / "encoded.parquet").stat().st_mtime_ns == written  # encoded once
    assert encoded.encoded(tmp_path / "again.parquet") is encoded
