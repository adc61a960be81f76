"""Joint LOO-FID on captions: embeddings, references built by the command, and what does not fit."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from actors.text.features import read_caption_features, write_caption_features
from cluster.errors import ConfigError, DataError
from cluster.messages import MAIN_SPACE, Condition
from learner.rollouts.feature_space import RewardSpace
from rewards.distribution.joint import CaptionProjection, pooled
from rewards.distribution.reference import read_stored
from rewards.reference import main as build
from tests.small_run import moments_of_main, small_config

RNG = np.random.default_rng(5)
TEXTS = [f"caption {number}" for number in range(12)]
ROWS = [RNG.normal(size=(2 + number % 3, 6)).astype(np.float32) for number in range(12)]
PIXELS = RNG.integers(0, 256, (12, 8, 8, 3)).astype(np.uint8)


def encoded(pixels: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def images(path: Path, texts: Sequence[str] = TEXTS) -> Path:
    """A Parquet file of images with their captions."""
    column = [{"bytes": encoded(each), "path": None} for each in PIXELS]
    pq.write_table(pa.table({"image": column, "caption": list(texts)}), path)
    return path


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with images, features of their captions, and a joint reference of both."""
    monkeypatch.chdir(tmp_path)
    images(tmp_path / "images.parquet")
    write_caption_features(tmp_path / "f.parquet", TEXTS, ROWS, "t5-6-abc")
    assert built(tmp_path) == 0
    return tmp_path


def built(folder: Path, *options: str, captions: str = "f.parquet") -> int:
    given = ["--images", str(folder / "images.parquet"), "--out", str(folder / "r.npz")]
    joint = ["--joint", "captions", "--captions", str(folder / captions), "--overwrite"]
    return build([*given, *joint, "--features.network", "pixels", *options])


def config(folder: Path, captions: str = "f.parquet", **term: object):  # type: ignore[no-untyped-def]
    term = {"reference": str(folder / "r.npz"), "joint": True} | term
    rewards = {"loo_fid": term, "features": {"network": "pixels"}}
    return small_config(rewards=rewards, conditions={"captions": str(folder / captions)})


def test_the_projection_is_that_of_principal_components() -> None:
    """As numpy's SVD of the centred features; the directions of the last 1 % are left out."""
    rows = RNG.normal(size=(200, 5)) * np.array([3.0, 2.0, 1.0, 0.1, 1e-9])
    cov = np.cov(rows.T, ddof=0)
    found = CaptionProjection.of(rows.mean(0), cov)
    assert found.dim == 3
    expected = np.linalg.svd(rows - rows.mean(0), full_matrices=False)[2][:3].T
    assert np.abs(np.abs((found.directions * expected).sum(0)) - 1).max() < 1e-9
    assert np.allclose(found(rows).mean(0), 0)
    assert CaptionProjection.of(rows.mean(0), cov, 4).dim == 4
    with pytest.raises(DataError, match=r"vary in 4 directions .* joint_dim 5"):
        CaptionProjection.of(rows.mean(0), cov, 5)
    with pytest.raises(DataError, match="vary in 0 directions"):
        CaptionProjection.of(np.zeros(3), np.zeros((3, 3)))
    with pytest.raises(DataError, match="width 5, found shape"):
        found(rows[:, :4])


def test_a_run_embeds_its_captions_as_the_reference_does(files: Path) -> None:
    """The moments of real images with their captions, joined by the run's space, are the file's."""
    space, reference = moments_of_main(config(files))
    assert space.projection is not None
    assert space.projection.encoder == "t5-6-abc"
    conditions = read_caption_features(files / "f.parquet")
    joined = space(np.zeros((12, 64)), conditions)
    stored = read_stored(files / "r.npz", joint=True)
    width = joined.shape[1] - space.added
    assert np.abs(joined[:, width:].mean(0) - reference.mu[width:]).max() < 1e-5
    scale = reference.sigma[width:, width:]
    assert np.abs(np.cov(joined[:, width:].T) - scale).max() < 1e-5 * np.abs(scale).max()
    assert space.weight == stored.weight > 0
    direct = (pooled(ROWS[3]) - space.projection.mean) @ space.projection.directions
    assert np.allclose(joined[3, width:], space.weight * direct, atol=1e-6)


def test_repeated_conditions_are_read_once(files: Path) -> None:
    space, _ = moments_of_main(config(files))
    conditions = read_caption_features(files / "f.parquet")
    first = space(np.zeros((4, 2)), [conditions[1]] * 2 + [conditions[2]] * 2)
    (files / "f.parquet").unlink()
    again = space(np.zeros((2, 2)), [conditions[2], conditions[1]])
    assert np.array_equal(again, first[[2, 0]])


def test_what_does_not_fit_the_reference_is_refused(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_caption_features(files / "other.parquet", TEXTS, ROWS, "t5-6-xyz")
    with pytest.raises(ConfigError, match=r"encoder t5-6-abc, but .* encoded by t5-6-xyz"):
        moments_of_main(config(files, "other.parquet"))
    write_caption_features(files / "wide.parquet", TEXTS, [np.ones((2, 7), np.float32)] * 12)
    with pytest.raises(ConfigError, match=r"width 6, but those of .* have 7"):
        moments_of_main(config(files, "wide.parquet"))
    with pytest.raises(ConfigError, match=r"joint_dim [0-9]+, but rewards.loo_fid.joint_dim is 99"):
        moments_of_main(config(files, joint_dim=99))
    classes = small_config(rewards={"loo_fid": {"reference": str(files / "r.npz"), "joint": True}})
    with pytest.raises(ConfigError, match="joint moments of 0 classes"):
        moments_of_main(classes)
    space, _ = moments_of_main(config(files))
    with pytest.raises(DataError, match="'bare' has none"):
        space(np.zeros((1, 2)), [Condition(text="bare")])
    with pytest.raises(DataError, match="is a caption without a class"):
        RewardSpace(np.eye(3), weight=1.0)(np.zeros((1, 2)), [Condition(text="a cat")])
    swapped = [TEXTS[1], TEXTS[0], *TEXTS[2:]]
    write_caption_features(files / "swapped.parquet", swapped, ROWS)
    assert built(files, captions="swapped.parquet") == 2
    assert "row 0 is 'caption 1', but the image's own caption" in capsys.readouterr().err
    write_caption_features(files / "few.parquet", TEXTS[:5], ROWS[:5])
    assert built(files, captions="few.parquet") == 2
    assert "5 captions, expected 12" in capsys.readouterr().err
    assert built(files, captions="images.parquet") == 2
    assert "expected columns caption, features, shape" in capsys.readouterr().err
    assert built(files, "--joint-dim", "9") == 2
    assert "vary in 6 directions" in capsys.readouterr().err


def test_a_reference_of_classes_is_none_of_captions(files: Path) -> None:
    rows = files / "rows.npy"
    np.save(rows, np.eye(12))
    given = ["--images", str(files / "images.parquet"), "--out", str(files / "r.npz")]
    options = ["--joint", "embeddings", "--embeddings", str(rows), "--overwrite"]
    assert build([*given, *options, "--features.network", "pixels"]) == 0
    with pytest.raises(ConfigError, match="no joint moments of captions"):
        moments_of_main(config(files))


def test_real_digits_are_joined_with_their_measured_captions(tmp_path: Path) -> None:
    from learner.data.digit_captions import attributes_of, captions_of
    from learner.rollouts.feature_space import reference_conditions

    texts = sorted(set(captions_of(attributes_of("train"))))
    rows = [RNG.normal(size=(2, 4)).astype(np.float32) for _ in texts]
    write_caption_features(tmp_path / "f.parquet", texts, rows)
    run = config(tmp_path, reference="digits:train")
    found = reference_conditions(run, run.rewards.spaces()[MAIN_SPACE], 1000)
    assert [each.text for each in found] == captions_of(attributes_of("train"))
    write_caption_features(tmp_path / "f.parquet", texts[1:], rows[1:])
    with pytest.raises(DataError, match=rf"not among conditions.captions.*{texts[0]!r}"):
        reference_conditions(run, run.rewards.spaces()[MAIN_SPACE], 1000)
