"""Cross-entropy on real tokens: where they come from, and what they do."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from actors.checkpoints.loading import PolicyConfig, TokenizerConfig, load_policy, load_tokenizer
from actors.decoding.decode import token_logprobs
from actors.models.taming import TamingConfig, TamingGPT
from actors.models.vq import VQTokenizer
from cluster.errors import CheckpointError, DataError
from cluster.messages import Condition, SamplingSpec
from learner.data.conditions import ConditionsConfig
from learner.data.datasets import image_captions, load_images, load_labels
from learner.training import real_tokens
from learner.training.optimizer import OptimizerConfig
from learner.training.real_tokens import RealTokens, RealTokensConfig, check_source, cross_entropy
from tests.fuzzing import check_reader
from tests.unit.helpers import TINY, tiny_policy
from tests.unit.learner_cases import batch_of, gradient, make, tiny_policy_file

TOKENS = np.random.default_rng(0).integers(0, TINY.vocab_size, (6, TINY.num_tokens))
CLASSES = np.array([0, 1, 2, 3, 0, 1])


@pytest.fixture
def npz(tmp_path: Path) -> str:
    np.savez(tmp_path / "real.npz", tokens=TOKENS, classes=CLASSES)
    return str(tmp_path / "real.npz")


def load(source: str, seed: int = 0, **changes: object) -> RealTokens:
    config = RealTokensConfig(weight=0.1, source=source, **changes)
    return RealTokens(config, tiny_policy(), TokenizerConfig(), seed)


def classes_of(real: RealTokens) -> list[int | None]:
    return [condition.class_index for condition in real.conditions]


def test_cross_entropy_by_hand() -> None:
    assert cross_entropy(torch.tensor([[-1.0, -2.0], [-3.0, -6.0]])) == 3.0


def test_tokens_of_npz_and_parquet(npz: str, tmp_path: Path) -> None:
    table = pa.table({"tokens": TOKENS.tolist(), "class_index": CLASSES})
    pq.write_table(table, tmp_path / "real.parquet")
    for source in (npz, str(tmp_path / "real.parquet")):
        real = load(source)
        np.testing.assert_array_equal(real.tokens, TOKENS)
        assert classes_of(real) == CLASSES.tolist()


def test_draws_are_a_function_of_seed_iteration_and_update(npz: str) -> None:
    tokens, conditions = load(npz, batch=4).draw(3, 1)
    again = load(npz, batch=4).draw(3, 1)
    np.testing.assert_array_equal(tokens, again[0])
    assert conditions == again[1]
    assert not np.array_equal(load(npz, batch=4).draw(3, 0)[0], tokens)
    assert not np.array_equal(load(npz, seed=1, batch=4).draw(3, 1)[0], tokens)
    for row, condition in zip(tokens, conditions):
        at = [index for index in range(6) if (TOKENS[index] == row).all()]
        assert CLASSES[at[0]] == condition.class_index


def test_digits_are_encoded_and_decode_to_themselves() -> None:
    """The tokens' images are near the real ones: the miniature's tokenizer reconstructs."""
    policy = load_policy(PolicyConfig())
    real = RealTokens(RealTokensConfig(weight=1.0), policy, TokenizerConfig())
    images, labels = load_images("digits:train"), load_labels("digits:train")
    assert classes_of(real) == labels.tolist()
    tokenizer = load_tokenizer(TokenizerConfig())
    with torch.inference_mode():
        pixels = tokenizer.pixels(policy.codes(torch.from_numpy(real.tokens[:50]))).numpy()
    error = np.abs(pixels.astype(float) - images[:50]).mean()
    shuffled = np.abs(pixels.astype(float) - images[50:100]).mean()
    assert error < 0.4 * shuffled


def test_images_are_encoded_on_the_policys_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the batches in which one would encode them by hand, so with the same tokens."""
    asked = []

    def noted(config: TokenizerConfig, *, device: torch.device) -> VQTokenizer:
        asked.append(device)
        return load_tokenizer(config, device=device)

    monkeypatch.setattr(real_tokens, "load_tokenizer", noted)
    policy = load_policy(PolicyConfig())
    real = RealTokens(RealTokensConfig(weight=1.0), policy, TokenizerConfig())
    assert asked == [next(policy.parameters()).device]
    tokenizer, images = load_tokenizer(TokenizerConfig()), load_images("digits:train")
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    codes = [tokenizer.encode(part) for part in pixels.split(real_tokens.ENCODED_AT_ONCE)]
    assert torch.equal(policy.codes(torch.from_numpy(real.tokens)), torch.cat(codes))


def test_tokens_are_put_into_the_order_of_the_policy() -> None:
    """taming may visit the grid in another order than raster."""
    policy = TamingGPT(
        TamingConfig(
            dim=16,
            num_layers=1,
            num_heads=2,
            vocab_size=64,
            block_size=16,
            grid=4,
            num_classes=10,
            permuter="SpiralOut",
        )
    )
    raster = RealTokens(
        RealTokensConfig(weight=1.0), load_policy(PolicyConfig()), TokenizerConfig()
    )
    ours = RealTokens(RealTokensConfig(weight=1.0), policy, TokenizerConfig())
    assert not np.array_equal(ours.tokens, raster.tokens)
    back = policy.codes(torch.from_numpy(ours.tokens)).flatten(1).numpy()
    np.testing.assert_array_equal(back, raster.tokens)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"tokens": TOKENS[:, :4], "classes": CLASSES}, r"shape \(6, 4\), expected \(N, 9\)"),
        ({"tokens": TOKENS, "classes": CLASSES[:3]}, "6 images, but classes of shape"),
        ({"tokens": TOKENS + 15, "classes": CLASSES}, "expected 0 to 19"),
        ({"tokens": TOKENS / 1, "classes": CLASSES}, "tokens must be integers, .* float64"),
        ({"tokens": TOKENS, "classes": CLASSES + 0.5}, "classes must be integers, .* float64"),
        # number num_classes is the unconditional token of classifier-free guidance
        ({"tokens": TOKENS, "classes": CLASSES + TINY.num_classes - 3}, "classes"),
        ({"tokens": TOKENS, "classes": CLASSES - 1}, "class"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(tmp_path: Path, arrays: dict, message: str) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(DataError, match=message):
        load(str(tmp_path / "bad.npz"))


def test_a_folder_in_place_of_a_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no such file .*, which is a folder"):
        load(str(tmp_path))


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(DataError, match="8 x 8 pixels give 16 tokens, but the policy draws 9"):
        load("digits:train")


def test_learning_from_them_raises_their_likelihood(npz: str, tmp_path: Path) -> None:
    """Beside advantages of zero, it is all there is to learn."""
    learner = make(
        tiny_policy_file(tmp_path),
        real=RealTokensConfig(weight=1.0, source=npz, batch=12),
        optimizer=OptimizerConfig(lr=1e-2, microbatch=5, schedule="constant"),
    )
    found = []
    for iteration in range(8):
        batch = batch_of(learner, iteration)
        flat = dataclasses.replace(batch, advantages=np.zeros_like(batch.advantages))
        found.append(learner.step(flat).metrics["loss/real_ce"])
    assert found[-1] < 0.8 * found[0]


def test_its_gradient_adds_to_the_others(npz: str, tmp_path: Path) -> None:
    file = tiny_policy_file(tmp_path)
    real = RealTokensConfig(weight=0.5, source=npz, batch=4)
    learner, plain, policy = make(file, real=real), make(file), tiny_policy().requires_grad_(True)
    batch = batch_of(learner)
    together = gradient(learner, batch)
    tokens, conditions = RealTokens(real, policy, TokenizerConfig()).draw(0, 0)
    given = policy.encode(conditions)
    logprobs = token_logprobs(policy, torch.from_numpy(tokens), given, SamplingSpec())[0]
    alone = torch.autograd.grad(-logprobs.mean() * 0.5, list(policy.parameters()))
    expected = gradient(plain, batch) + torch.cat([part.flatten() for part in alone])
    torch.testing.assert_close(together, expected, rtol=0, atol=1e-6)


def test_what_a_file_is_decides(tmp_path: Path) -> None:
    """Not its suffix; labels that are missing are no classes."""
    np.savez(tmp_path / "real.npz", tokens=TOKENS, classes=CLASSES)
    (tmp_path / "real.npz").rename(tmp_path / "REAL.NPZ")
    table = pa.table({"tokens": TOKENS.tolist(), "class_index": CLASSES})
    pq.write_table(table, tmp_path / "REAL.Parquet")
    for name in ("REAL.NPZ", "REAL.Parquet"):
        check_source(str(tmp_path / name))
        np.testing.assert_array_equal(load(str(tmp_path / name)).tokens, TOKENS)
    table = pa.table({"tokens": TOKENS.tolist(), "class_index": [*CLASSES[1:].tolist(), None]})
    pq.write_table(table, tmp_path / "nulls.parquet")
    with pytest.raises(DataError, match="class_index must be integers, all rows, found float64"):
        load(str(tmp_path / "nulls.parquet"))
    (tmp_path / "page.npz").write_text("<html>")
    for read in (check_source, load):
        with pytest.raises(DataError, match=r"a web page|not a readable file"):
            read(str(tmp_path / "page.npz"))


NETWORKS = "package://learner.miniature/networks"
TEXTS = ["a one", "a two, wide", "a one", "a six", "a two, wide", "a six"]
KNOWN = [Condition(text=text, features=np.zeros((2, 4))) for text in ("a six", *TEXTS[:2])]


def captioned(folder: Path, kind: str, **columns: object) -> str:
    path = folder / f"captioned.{kind}"
    if kind == "npz":
        np.savez(path, **columns)
    else:
        names = {"captions": "caption"}
        table = {names.get(key, key): list(value) for key, value in columns.items()}
        pq.write_table(pa.table(table), path)
    return str(path)


def load_captioned(source: str) -> RealTokens:
    check_source(source, captioned=True)
    config = RealTokensConfig(weight=0.1, source=source, batch=4)
    return RealTokens(config, tiny_policy(), TokenizerConfig(), captions=KNOWN)


@pytest.mark.parametrize("kind", ["npz", "parquet"])
def test_captions_of_a_file_are_the_runs(kind: str, tmp_path: Path) -> None:
    """With their features, one object for equal ones."""
    real = load_captioned(captioned(tmp_path, kind, tokens=TOKENS, captions=TEXTS))
    assert [each.text for each in real.conditions] == TEXTS
    assert {id(each) for each in real.conditions} == {id(each) for each in KNOWN}
    tokens, asked = real.draw(2, 0)
    for row, condition in zip(tokens, asked):
        assert condition.text in [TEXTS[at] for at in range(6) if (TOKENS[at] == row).all()]


@pytest.mark.parametrize(
    ("kind", "columns", "message"),
    [
        ("npz", {"tokens": TOKENS, "classes": CLASSES}, "found no captions"),
        ("parquet", {"tokens": TOKENS, "class_index": CLASSES}, "found no caption"),
        ("npz", {"arr_0": TOKENS, "arr_1": CLASSES}, "found no captions"),
        (
            "npz",
            {"tokens": TOKENS, "captions": CLASSES},
            "must be text, all rows, found 0 of",
        ),
        ("parquet", {"tokens": TOKENS, "captions": [*TEXTS[:5], None]}, "found None of image 5"),
        ("npz", {"tokens": TOKENS, "captions": TEXTS[:3]}, "6 images, but captions of shape"),
        ("npz", {"tokens": TOKENS, "captions": [*TEXTS[:5], "a ten"]}, "image 5, 'a ten', is none"),
    ],
)
def test_captions_that_do_not_fit_are_named(
    kind: str, columns: dict, message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        load_captioned(captioned(tmp_path, kind, **columns))


def test_captions_of_the_digits() -> None:
    """Those that the miniature's file of captions has features of; MNIST has none."""
    asked = ConditionsConfig(captions=f"{NETWORKS}/captions/captions.parquet")
    policy = load_policy(PolicyConfig(checkpoint=f"{NETWORKS}/captions/policy.safetensors"))
    check_source("digits:train", captioned=True)
    config = RealTokensConfig(weight=1.0, batch=200)
    real = RealTokens(config, policy, TokenizerConfig(), captions=asked.conditions())
    assert [each.text for each in real.conditions] == image_captions("digits:train")
    tokens, drawn = real.draw(0, 0)
    with torch.inference_mode():
        right, wrong = (
            token_logprobs(policy, torch.from_numpy(tokens), policy.encode(given), SamplingSpec())[
                0
            ].mean()
            for given in (drawn, drawn[::-1])
        )
    assert right > wrong + 0.1
    with pytest.raises(DataError, match="images without captions"):
        check_source("mnist:train", captioned=True)


@pytest.mark.parametrize("kind", ["npz", "parquet"])
def test_damaged_tokens(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"real.{kind}"
    if kind == "npz":
        np.savez(path, tokens=TOKENS, classes=CLASSES)
    else:
        pq.write_table(pa.table({"tokens": TOKENS.tolist(), "class_index": CLASSES}), path)

    def read(given: Path) -> RealTokens:
        check_source(str(given))
        return load(str(given))

    def good(found: object) -> bool:
        assert isinstance(found, RealTokens)
        same = np.array_equal(found.tokens, TOKENS) and classes_of(found) == CLASSES.tolist()
        return same or kind == "parquet"  # which has no checksum

    check_reader(path, read, 150, good=good)
