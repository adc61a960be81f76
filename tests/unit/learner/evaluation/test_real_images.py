"""Real images of an evaluation, from every kind of source."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cluster.errors import DataError
from cluster.messages import MAIN_SPACE
from learner.config import RunConfig
from learner.data import datasets
from learner.evaluation import real_images as module
from learner.evaluation.preflight import check_evaluation
from learner.evaluation.real_images import moments_of, real_images
from learner.preflight import Findings
from rewards.config import JudgeConfig
from rewards.metrics.samples import LOGITS, SPATIAL
from rewards.networks.features import FeaturesConfig
from rewards.reference.fetch import PUBLISHED
from tests.small_run import small_config

IMAGES = np.random.default_rng(0).integers(0, 256, (23, 8, 6, 3), np.uint8)
INCEPTION = {"features": {"network": "inception"}, "second": {"network": "clip"}}


class Judge:
    """The part of a fleet that real images need: a panel as of Inception, of few dimensions."""

    def __init__(self) -> None:
        self.most = 0
        """Images of the largest call."""

    def fingerprint(self, panel: str) -> str:
        return "judge-network"

    def serve_while(self, work: Callable[[], Any]) -> Any:
        return work()

    def features(self, batches: Iterable[Any], panel: str) -> dict[str, np.ndarray]:
        assert panel == "judge"
        images = [image for batch in batches for image in batch]
        self.most = max(self.most, len(images))
        found = np.array([image.mean((0, 1)) for image in images], np.float32)
        spaces = {MAIN_SPACE: found, "second": found[:, :2], SPATIAL: found**2, LOGITS: found}
        return spaces


def run_on(source: str | Path, **judge: Any) -> RunConfig:
    return small_config(evaluation={"images": str(source)}, judge=judge)


def read(source: str | Path, fleet: Judge | None = None, **judge: Any) -> Any:
    return real_images(run_on(source, **judge), fleet or Judge())  # type: ignore[arg-type]


DIM, SPATIAL_DIM = 48, 28


@pytest.fixture(autouse=True)
def small_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moments of as many dimensions as Inception's take seconds to check."""
    assert (module.FEATURES, module.SPATIAL_DIM) == (2048, 2023)
    monkeypatch.setattr(module, "FEATURES", DIM)
    monkeypatch.setattr(module, "SPATIAL_DIM", SPATIAL_DIM)


def adm_file(path: Path, dim: int = DIM, spatial: int = SPATIAL_DIM, **more: Any) -> Path:
    """A file as ADM's, with moments of a larger set than its images."""
    np.savez(
        path,
        mu=np.full(dim, 0.5),
        sigma=np.eye(dim),
        mu_s=np.zeros(spatial),
        sigma_s=2 * np.eye(spatial),
        **more,
    )
    return path


def folder(path: Path) -> Path:
    for number, image in enumerate(IMAGES):
        place = path / f"class{number % 2}" / f"{number:03}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place)
    return path


def parquet(path: Path) -> Path:
    folder(path / "folder")
    files = sorted((path / "folder").rglob("*.png"))
    column = [{"bytes": file.read_bytes()} for file in files]
    pq.write_table(pa.table({"image": column}), path / "images.parquet")
    return path / "images.parquet"


def npz(path: Path) -> Path:
    np.savez(path / "images.npz", arr_0=IMAGES)
    return path / "images.npz"


@pytest.mark.parametrize("make", [folder, parquet, npz])
def test_sources_of_images(make: Callable[[Path], Path], tmp_path: Path) -> None:
    source = make(tmp_path)
    found = read(source)
    assert not found.moments
    assert [*found.features] == [MAIN_SPACE, "second", SPATIAL]  # no logits of real images
    expected = IMAGES.mean((1, 2), dtype=np.float32)
    order = np.lexsort(found.features[MAIN_SPACE].T)
    theirs = expected[np.lexsort(expected.T)]
    np.testing.assert_allclose(found.features[MAIN_SPACE][order], theirs, rtol=1e-6)
    findings = Findings()
    config = run_on(source, features={"network": "clip"}, second={"network": "inception"})
    check_evaluation(config, 0, findings)
    assert not [line for line in findings.problems if line.startswith("evaluation.images")]


def test_images_of_several_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [(8, 6), (8, 6), (10, 4), (8, 6)]
    for number, (height, width) in enumerate(sizes):
        pixels = np.full((height, width, 3), 10 * number, np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    found = read(tmp_path)
    assert found.features[MAIN_SPACE][:, 0].tolist() == [0, 10, 20, 30]
    shapes = [len(batch) for batch in datasets.open_images(str(tmp_path)).batches(3)]
    assert shapes == [3, 1]
    monkeypatch.setattr(datasets, "MOST_BYTES", 2 * 8 * 6 * 3)
    shapes = [len(batch) for batch in datasets.open_images(str(tmp_path)).batches(3)]
    assert shapes == [2, 2]


def test_an_image_that_cannot_be_read(tmp_path: Path) -> None:
    folder(tmp_path)
    (tmp_path / "class0" / "000.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"000\.png: cannot be read"):
        read(tmp_path)


def test_more_images_than_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Moments are of all, features of evenly spaced ones."""
    monkeypatch.setattr(module, "MOST", 5)
    monkeypatch.setattr(module, "FEATURE_BATCH", 4)
    fleet = Judge()
    found = read(npz(tmp_path), fleet)
    assert fleet.most == 4
    expected = IMAGES.mean((1, 2), dtype=np.float32)
    np.testing.assert_allclose(found.features[MAIN_SPACE], expected[[0, 6, 11, 16, 22]], rtol=1e-6)
    assert [*found.features] == [MAIN_SPACE, "second"]
    assert [*found.moments] == [MAIN_SPACE, "second", SPATIAL]
    main = found.moments[MAIN_SPACE]
    assert main.images == 23
    np.testing.assert_allclose(main.mu, expected.mean(0), rtol=1e-6)
    np.testing.assert_allclose(main.sigma, np.cov(expected, rowvar=False), rtol=1e-5)


def test_the_moments_of_an_adm_file(tmp_path: Path) -> None:
    """They are of FID's Inception, and its images give the features of every space."""
    file = adm_file(tmp_path / "virtual.npz", arr_0=IMAGES, arr_1=np.zeros(23, int))
    found = read(file, **INCEPTION)
    assert {space: each.dim for space, each in found.moments.items()} == {
        MAIN_SPACE: DIM,
        SPATIAL: SPATIAL_DIM,
    }
    assert [*found.features] == [MAIN_SPACE, "second"]
    assert len(found.features["second"]) == 23
    other = read(file)  # a judge of other networks
    assert not other.moments
    assert len(other.features[SPATIAL]) == 23


def test_a_published_reference_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TESSERA_WEIGHTS", str(tmp_path))
    findings = Findings()
    check_evaluation(run_on("imagenet64", **INCEPTION), 0, findings)
    (problem,) = (line for line in findings.problems if line.startswith("evaluation"))
    assert "rewards.reference fetch imagenet64" in problem
    assert findings.downloads[-1].name == "VIRTUAL_imagenet64_labeled.npz"
    adm_file(PUBLISHED["imagenet64"].place(), arr_0=IMAGES)
    found = read("imagenet64", **INCEPTION)
    assert found.moments[MAIN_SPACE].mu[0] == 0.5
    assert len(found.features[MAIN_SPACE]) == 23


def test_moments_alone(tmp_path: Path) -> None:
    file = adm_file(tmp_path / "moments.npz")
    found = read(file, **INCEPTION)
    assert [*found.moments] == [MAIN_SPACE, SPATIAL]
    assert not found.features
    findings = Findings()
    check_evaluation(run_on(file, **INCEPTION), 0, findings)
    assert "holds moments alone" in "".join(findings.notes)
    with pytest.raises(DataError, match="no images, and the judge's networks are convnet and"):
        read(file)


def test_figures_that_moments_alone_do_not_give(tmp_path: Path) -> None:
    """Neither the best checkpoint nor the guard waits for them in vain."""
    file = tmp_path / "moments.npz"
    np.savez(file, mu=np.zeros(DIM), sigma=np.eye(DIM))  # no mu_s, sigma_s

    shared = {"features": {"network": "inception", "checkpoint": ""}}

    def found(figure: str, **changes: Any) -> Findings:
        evaluation = {"images": str(file), "every": 2, **changes}
        config = small_config(
            evaluation=evaluation, judge=INCEPTION | shared, output={"keep_best": figure},
            rewards=shared,
        )  # fmt: skip
        findings = Findings()
        check_evaluation(config, 0, findings)
        return findings

    for figure in ("second/fid", "sfid", "recall"):
        problems = found(figure).problems
        assert any(line.startswith("output.keep_best: expected a figure that") for line in problems)
    fine = found("fid")
    assert not [line for line in fine.problems if line.startswith("output.keep_best")]
    assert "evaluation.hacking never acts: it watches second/fid" in "".join(fine.notes)
    assert "evaluation.hacking watches" in "".join(found("fid", hacking="stop").problems)
    assert "evaluation.hacking" not in "".join(found("fid", hacking="off").notes)
    assert "never acts" not in "".join(found("fid", images="digits:held-out").notes)


def test_an_inception_score_of_few_images_is_of_one_split() -> None:
    for images, told in ((19, True), (20, False)):
        config = small_config(evaluation={"images": "", "num_images": images}, judge=INCEPTION)
        findings = Findings()
        check_evaluation(config, 8, findings)
        assert ("Inception Score is of 1 split" in "".join(findings.notes)) == told


def test_no_real_images() -> None:
    found = read("")
    assert not found.features
    assert not found.moments
    findings = Findings()
    check_evaluation(run_on(""), 8, findings)
    assert findings.problems == []


def test_moments_of_other_weights(tmp_path: Path) -> None:
    """A file that says what made it is compared with the judge's network as it is."""
    file = adm_file(tmp_path / "own.npz", fingerprint=np.array("inception-0123-tensorflow299"))
    found = r"'inception-0123-tensorflow299', but the judge's are 'judge-network'"
    with pytest.raises(DataError, match=found):
        read(file, **INCEPTION)
    judge = JudgeConfig(features=FeaturesConfig(network="torchvision-inception"))
    with pytest.raises(DataError, match="the judge's networks are torchvision-inception"):
        moments_of(str(file), judge)


def test_spatial_moments_of_another_evaluator(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="mu_s: expected 28 dimensions"):
        read(adm_file(tmp_path / "odd.npz", spatial=7), **INCEPTION)
