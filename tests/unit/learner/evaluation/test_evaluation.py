"""Rows of an evaluation: their fleets, their directory, the images that are written of them."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cluster.errors import ConfigError
from cluster.model_files.tensors import anywhere
from cluster.preflight import Findings
from learner.config import RunConfig
from learner.evaluate import findings_of
from learner.evaluation.evaluation import Evaluation, Outputs, Work, config_of
from learner.evaluation.kept.images import write_images
from learner.evaluation.kept.samples import KeptSamples
from learner.evaluation.options import Job, parse
from learner.evaluation.preflight import check_evaluation
from learner.evaluation.rows import rows_of
from learner.evaluation.targets import Target
from rewards.metrics.evaluation import MetricSettings
from rewards.metrics.samples import Samples
from tests.small_run import small_config

TOKENS = 16  # of an image of the miniature


def evaluation(config: RunConfig, targets: list[Target], out: Path) -> Evaluation:
    rows = rows_of(targets, config, (1.0,))
    configs = {row.name: config_of(config, row.target) for row in rows}
    return Evaluation(config, rows, configs, out)


def test_rows_of_one_policy_and_two_tokenizers_have_a_fleet_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config()
    copy = shutil.copy(anywhere(config.tokenizer.checkpoint), tmp_path / "tokenizer.pt")
    targets = [
        Target(name="base", policy=config.policy),
        Target(
            name="other",
            policy=config.policy,
            tokenizer=replace(config.tokenizer, checkpoint=str(copy)),
        ),
        Target(name="again", policy=config.policy, tokenizer=config.tokenizer),
    ]
    opened, filled = list[RunConfig](), list[str]()

    @contextmanager
    def open_fleet(fleet: RunConfig, samples: bool) -> Iterator[RunConfig]:
        opened.append(fleet)
        yield fleet

    def fill(_: Evaluation, fleet: RunConfig, work: Work) -> None:
        assert fleet.tokenizer == work.config.tokenizer
        filled.append(work.row.name)

    monkeypatch.setattr(Evaluation, "_see_real", lambda *_: None)
    monkeypatch.setattr(Evaluation, "_fill", fill)
    evaluation(config, targets, tmp_path / "out").sample(open_fleet)  # type: ignore[arg-type]
    assert filled == ["base", "again", "other"]
    assert len(opened) == 2


def test_a_refused_evaluation_leaves_the_directory_as_it_was(tmp_path: Path) -> None:
    config = small_config()
    targets = [Target(name=name, policy=config.policy) for name in ("first", "second")]
    KeptSamples.begin(tmp_path / "samples" / "second", "second", {"seed": 7}, [50])
    with pytest.raises(ConfigError, match="seed: 7, not 0"):
        evaluation(config, targets, tmp_path)
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["second"]


def test_classes_that_are_not_configured_are_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    images = tmp_path / "images.npz"
    np.savez(images, arr_0=np.zeros((2, 8, 8, 3), np.uint8), arr_1=np.array([3, 99]))
    out = tmp_path / "out"
    with pytest.raises(Exception, match="class 99 of image 1 is none of the 10 conditions"):
        evaluation(small_config(), [Target(name="images", images=str(images))], out)
    assert not out.exists()


@pytest.mark.parametrize("scales", [("2", "1"), ("1", "2"), ("2",)])
def test_guidance_of_any_row_needs_a_null_condition(
    scales: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Policy(SimpleNamespace):
        def null_conditions(self, _: object) -> None:
            raise ConfigError("no null condition")

    monkeypatch.setattr("learner.evaluate.weightless_policy", lambda _: Policy(encode=list))
    job = parse(
        ["--preset", "miniature", "--inline", "--num-images", "50", "--cfg-scales", *scales]
    )
    assert isinstance(job, Job)
    assert any("no null condition" in str(each) for each in findings_of(job).problems)


def outputs(out: Path) -> dict[str, bytes]:
    files = (path for path in (out / "images").rglob("*") if path.is_file())
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def test_written_images_are_those_of_the_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after samples were removed and made again; those that are there are not decoded."""
    decoded = list[str]()

    def filled(seed: int, images: int) -> Evaluation:
        config = small_config(seed=seed, evaluation={"num_images": images})
        made = evaluation(config, [Target(name="base", policy=config.policy)], tmp_path)
        (work,) = made.work
        tokens = np.random.default_rng(seed).integers(0, 16, (images, TOKENS), np.int32)
        work.kept.write(0, {"tokens": tokens, "conditions": np.zeros(images, np.int64)})
        return made

    def written(config: RunConfig, kept: KeptSamples, *rest: Any) -> None:
        decoded.append(kept.folder.name)
        write_images(config, kept, *rest)

    monkeypatch.setattr("learner.evaluation.evaluation.write_images", written)
    both = Outputs(npz=True, png=True)
    first = filled(0, 20)
    first.write_images(both)
    before = outputs(tmp_path)
    assert len(before) == 20 + 3  # the .npz file and two digests
    first.write_images(both)
    assert decoded == ["base"]
    shutil.rmtree(tmp_path / "samples")
    second = filled(1, 10)
    second.write_images(both)
    after = outputs(tmp_path)
    assert decoded == ["base"] * 2
    assert len(after) == 10 + 3
    assert all(before[name] != data for name, data in after.items() if "npz" in name)
    next((tmp_path / "images" / "base").glob("*.png")).unlink()
    second.write_images(both)
    assert outputs(tmp_path) == after


def test_samples_of_one_row_at_a_time_are_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, seen = small_config(), list[weakref.ref]()
    targets = [Target(name=name, policy=config.policy) for name in ("first", "second")]

    def read(_: KeptSamples) -> Samples:
        assert all(each() is None for each in seen)
        samples = Samples(features={}, scores={"clip": np.arange(40, dtype=np.float32)})
        seen.append(weakref.ref(samples))
        return samples

    monkeypatch.setattr(KeptSamples, "read", read)
    found = evaluation(config, targets, tmp_path).results(MetricSettings(bootstrap=0), {})
    assert list(found.rows) == ["first", "second"]
    assert len(seen) == 2


def test_too_few_images_for_nearest_neighbours_are_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    images, out = tmp_path / "images.npz", tmp_path / "out"
    np.savez(images, arr_0=np.zeros((5, 8, 8, 3), np.uint8))
    with pytest.raises(ConfigError, match=r"images.npz: 5 images, expected more than 5"):
        evaluation(small_config(), [Target(name="images", images=str(images))], out)
    assert not out.exists()
    findings = Findings()
    check_evaluation(small_config(evaluation={"images": str(images)}), 8, findings)
    assert any(
        "evaluation.images: expected more than 5 images" in each for each in findings.problems
    )
