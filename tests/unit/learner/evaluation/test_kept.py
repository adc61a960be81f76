"""Kept samples: parts, their order, what they are of, and damage."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cluster.errors import ConfigError, DataError, StorageError
from cluster.messages import Condition, FeatureRow, GroupScores
from learner.evaluation.kept.identity import (
    differences,
    digest_of,
    identity_of,
    judge_identity,
)
from learner.evaluation.kept.images import NpzSink
from learner.evaluation.kept.real import read_real, real_identity, write_real
from learner.evaluation.kept.samples import KeptSamples, mixed, parts_of
from learner.evaluation.rows import rows_of
from learner.evaluation.sampling import GivenImages, score_missing
from learner.evaluation.targets import Target
from rewards.distribution.reference import Reference
from rewards.metrics.samples import RealImages
from tests.small_run import small_config
from tests.unit.helpers import request

IDENTITY: dict[str, Any] = {"policy": {"checkpoint": "a.pt", "sha256": "0" * 64}, "seed": 0}


def part(first: int, count: int) -> dict[str, np.ndarray]:
    numbers = np.arange(first, first + count)
    return {
        "features/features": numbers[:, None].repeat(2, 1).astype(np.float32),
        "scores/clip": numbers.astype(np.float32),
        "entropies": numbers.astype(np.float64),
        "conditions": numbers // 4,
        "tokens": np.zeros((count, 3), np.int32),
    }


@pytest.mark.parametrize(
    ("sizes", "parts"),
    [
        ([50, 50, 50], [range(2), range(2, 3)]),
        ([100], [range(1)]),
        ([150, 10, 90], [range(1), range(1, 3)]),
        ([], []),
    ],
)
def test_parts_are_whole_requests(sizes: list[int], parts: list[range]) -> None:
    assert parts_of(sizes, 100) == parts


def test_samples_continue_where_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("learner.evaluation.kept.samples.PART", 4)
    kept = KeptSamples.begin(tmp_path, "base", IDENTITY, [4, 4, 2])
    assert (len(kept), kept.done, kept.missing()) == (10, 0, [0, 1, 2])
    kept.write(1, part(4, 4))
    monkeypatch.setattr("learner.evaluation.kept.samples.PART", 1000)  # of a later version
    again = KeptSamples.begin(tmp_path, "base", IDENTITY, [4, 4, 2])
    assert (again.done, again.missing()) == (4, [0, 2])
    with pytest.raises(ConfigError, match="6 of 10 images are not sampled yet"):
        KeptSamples.open(tmp_path)
    again.write(0, part(0, 4))
    again.write(2, part(8, 2))
    samples = KeptSamples.open(tmp_path).read()
    order = np.argsort(mixed(10)).tolist()
    assert samples.scores["clip"].tolist() == order
    assert samples.features["features"][:, 1].tolist() == order
    assert samples.conditions is not None
    assert samples.conditions.tolist() == [number // 4 for number in order]
    assert [len(tokens) for tokens in again.tokens()] == [4, 4, 2]


def test_given_images_stay_in_their_order(tmp_path: Path) -> None:
    kept = KeptSamples.begin(tmp_path, "x.npz", IDENTITY, [3])
    kept.write(0, {"features/features": np.arange(6.0).reshape(3, 2), "classes": np.arange(3)})
    samples = kept.read()
    assert samples.features["features"].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert (samples.entropies, samples.conditions) == (None, None)
    with pytest.raises(DataError, match="no tokens: its images were not sampled"):
        list(kept.tokens())


def test_the_order_of_samples_never_changes() -> None:
    """Inception Scores depend on it, and so do comparisons with earlier results."""
    assert mixed(8).tolist() == [2, 4, 3, 6, 5, 0, 1, 7]
    assert sorted(mixed(1000)) == [*range(1000)]


def test_samples_of_something_else_are_refused(tmp_path: Path) -> None:
    KeptSamples.begin(tmp_path, "base", IDENTITY, [4])
    moved = {"policy": {"checkpoint": "b.pt", "sha256": "0" * 64}, "seed": 0}
    KeptSamples.begin(tmp_path, "base", moved, [4])
    other = {"policy": {"checkpoint": "a.pt", "sha256": "1" * 64}, "seed": 7}
    with pytest.raises(ConfigError) as error:
        KeptSamples.begin(tmp_path, "base", other, [4])
    assert "policy.sha256: 0000000000000000..., not 1111111111111111...; seed: 0, not 7" in str(
        error.value
    )


@pytest.mark.parametrize("damage", ["cut", "another", "gone"])
def test_damaged_parts_say_what_to_do(tmp_path: Path, damage: str) -> None:
    kept = KeptSamples.begin(tmp_path, "base", IDENTITY, [4])
    kept.write(0, part(0, 4))
    file = kept.file(0)
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:200])
    elif damage == "another":
        kept.write(0, part(0, 3))
    else:
        file.write_bytes(b"")
    with pytest.raises(DataError, match=r"part_000000.npz: damaged .*remove it"):
        kept.read()


@pytest.mark.parametrize(
    "change",
    [
        {"features/features": np.ones((2, 1), np.float32)},
        {"entropies": np.ones(2, np.float32)},
        {"scores/hps": np.ones(2, np.float32)},
        {"scores/clip": None},
    ],
)
def test_parts_hold_the_same_arrays(
    change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that does not is never read as numbers."""
    monkeypatch.setattr("learner.evaluation.kept.samples.PART", 2)
    kept = KeptSamples.begin(tmp_path, "base", IDENTITY, [2, 2])
    kept.write(0, part(0, 2))
    arrays = {name: v for name, v in (part(2, 2) | change).items() if v is not None}
    kept.write(1, arrays)
    with pytest.raises(DataError, match=r"part_000001.npz: damaged \(expected arrays as in part_0"):
        kept.read()


def test_samples_in_other_requests_are_refused(tmp_path: Path) -> None:
    KeptSamples.begin(tmp_path, "base", IDENTITY, [4, 4])
    with pytest.raises(ConfigError, match="images of each request: those of another version"):
        KeptSamples.begin(tmp_path, "base", IDENTITY, [8])


def test_a_waiting_file_has_its_space_before_it_is_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk would end a process that writes to a mapping."""
    requests = [request(0, 64), request(1, 64)]
    images = np.full((64, 32, 32, 3), 7, np.uint8)
    with NpzSink(tmp_path / "a.npz", requests) as sink:
        sink.write(0, requests[0], images[:1])
        state = (tmp_path / ".a.waiting.npy").stat()
        assert state.st_blocks * 512 >= state.st_size

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with (
        pytest.raises(StorageError, match=r"b.npz could not be written: No space left"),
        NpzSink(tmp_path / "b.npz", requests) as sink,
    ):
        sink.write(0, requests[0], images)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros(4), "found float64"),
        (np.zeros(3, np.int64), r"found int64 of shape \(3,\)"),
        (np.array([None] * 4), "not a readable array"),
    ],
)
def test_classes_that_cannot_be_read_are_an_error(
    labels: np.ndarray, message: str, tmp_path: Path
) -> None:
    """And never no classes."""
    path, images = tmp_path / "images.npz", np.zeros((4, 8, 8, 3), np.uint8)
    np.savez(path, arr_0=images, arr_1=labels)
    with pytest.raises(DataError, match=message):
        GivenImages.open(str(path))
    np.savez(path, arr_0=images)
    assert GivenImages.open(str(path)).classes is None


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_given_images_are_scored_by_class_and_kept_in_their_places(
    save: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ADM's files hold the classes in random order. Compressed ones are read in theirs alone."""
    monkeypatch.setattr("learner.evaluation.kept.samples.PART", 40)
    classes = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 12))
    images = np.broadcast_to(np.arange(120, dtype=np.uint8)[:, None, None, None], (120, 8, 8, 3))
    save(tmp_path / "a.npz", arr_0=images, arr_1=classes)
    given = GivenImages.open(str(tmp_path / "a.npz"))
    assert (len(given.sizes()) == 10) == (save is np.savez)

    class Judge:
        def score_images(self, pairs: Iterable[Any]) -> Iterator[GroupScores]:
            for asked, pixels in pairs:
                values = pixels[:, 0, 0, 0].astype(np.float32)
                assert (classes[values.astype(int)] == asked.condition.class_index).all()
                yield GroupScores(
                    key=asked.key,
                    scores={"clip": values},
                    features={"features": values[:, None]},
                    errors=(None,) * len(values),
                )

    kept = KeptSamples.begin(tmp_path / "kept", "a.npz", IDENTITY, given.sizes())
    score_missing(small_config(), Judge(), given, kept, lambda _: None)  # type: ignore[arg-type]
    kept.file(1).unlink()  # reads past the first
    score_missing(small_config(), Judge(), given, kept, lambda _: None)  # type: ignore[arg-type]
    samples = kept.read()
    assert samples.scores["clip"].tolist() == [*range(120)]
    assert samples.classes is not None
    assert samples.classes.tolist() == classes.tolist()


def test_a_damaged_manifest_says_what_to_do(tmp_path: Path) -> None:
    KeptSamples.begin(tmp_path, "base", IDENTITY, [4])
    for text in ("{", '{"format": 9}', '{"format": 1, "name": "a", "part": 0}'):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(DataError, match="not a readable manifest"):
            KeptSamples.open(tmp_path)
    with pytest.raises(ConfigError, match="no kept samples here"):
        KeptSamples.open(tmp_path / "none")


def test_everything_that_samples_depend_on_is_in_their_identity() -> None:
    config = small_config()
    (row, guided, *_) = rows_of([Target(name="base", policy=config.policy)], config)
    identity = identity_of(config, row)
    assert differences(identity, identity_of(config, row)) == []
    assert len(identity["policy"]["sha256"]) == 64
    assert identity["judge_files"]["features.checkpoint"]
    changes: dict[str, dict[str, Any]] = {
        "seed": {"seed": 1},
        "num_images": {"evaluation": {"num_images": 50}},
        "image_size": {"evaluation": {"image_size": 4}},
        "conditions": {"conditions": {"classes": [0, 1]}},
        "dtype": {"sampler": {"dtype": "bfloat16"}},
        "kernels": {"sampler": {"kernels": "torch"}},
        "device": {"sampler": {"num_gpus": 0.5}},
        "judge_device": {"reward": {"num_gpus": 0.5}},
        "reproducible": {"reproducible": True},
        "judge.clip.precision": {"judge": {"clip": {"precision": "bf16"}}},
    }
    for field, change in changes.items():
        (found,) = differences(identity, identity_of(small_config(**change), row))
        assert found.startswith(f"{field}: ")
    assert differences(identity, identity_of(config, guided)) == [
        "sampling.cfg_scale: 1.0, not 1.5", "sampling.guidance: 'none', not 'guided'",
    ]  # fmt: skip


def test_folders_are_known_by_the_contents_of_their_images(tmp_path: Path) -> None:
    """At any depth, as images to evaluate and as real images; BMPs keep their size."""
    folder = tmp_path / "images"
    (folder / "cats").mkdir(parents=True)
    file = folder / "cats" / "0.bmp"
    pixels = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    Image.fromarray(pixels).save(file)
    config = small_config(evaluation={"images": str(folder)})
    (row,) = rows_of([Target(name="images", images=str(folder))], config)
    of_each = [identity_of(config, row), real_identity(config)]
    size, times = file.stat().st_size, (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    os.utime(file, ns=(times[0], times[1] + 10**9))
    assert [identity_of(config, row), real_identity(config)] == of_each
    Image.fromarray(255 - pixels).save(file)
    os.utime(file, ns=times)
    assert file.stat().st_size == size
    changed = [identity_of(config, row), real_identity(config)]
    names = [
        [line.partition(":")[0] for line in differences(before, after)]
        for before, after in zip(of_each, changed)
    ]
    assert names == [["images.digest"], ["sha256"]]


def test_folders_of_parquet_files_are_known_by_their_contents(tmp_path: Path) -> None:
    config = small_config(evaluation={"images": str(tmp_path)})
    digests = set[str]()
    for content in (b"PAR1 a PAR1", b"PAR1 b PAR1"):
        (tmp_path / "train-0.parquet").write_bytes(content)
        digests.add(real_identity(config)["sha256"])
    assert len(digests) == 2
    assert "" not in digests


def test_checkpoints_named_without_a_directory_are_known_by_their_contents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = small_config(judge={"features": {"checkpoint": "judge.safetensors"}})
    assert "features.checkpoint" not in judge_identity(config)["judge_files"]
    digests = set[str]()
    for content in (b"one", b"another"):
        (tmp_path / "judge.safetensors").write_bytes(content)
        digests.add(judge_identity(config)["judge_files"]["features.checkpoint"])
    assert len(digests) == 2


def test_conditions_are_their_texts_classes_and_features() -> None:
    one = Condition(text="a", class_index=0)
    features = Condition(text="a", class_index=0, features=np.zeros((1, 2), np.float32))
    row = Condition(text="a", class_index=0, features=FeatureRow(path="p", row=0, digest=1))
    moved = Condition(text="a", class_index=0, features=FeatureRow(path="q", row=9, digest=1))
    digests = [digest_of([each]) for each in (one, features, row, Condition(text="a"))]
    assert len(set(digests)) == 4
    assert digest_of([moved]) == digest_of([row])
    assert digest_of([one, one]) != digest_of([one])


def test_real_images_are_kept_and_compared(tmp_path: Path) -> None:
    config = small_config()
    identity = real_identity(config)
    assert read_real(tmp_path, identity) is None
    reference = Reference(np.zeros(2), np.eye(2), "print", "file.npz", 7)
    real = RealImages({"features": np.ones((3, 2), np.float32)}, {"second": reference})
    write_real(tmp_path, identity, real)
    found = read_real(tmp_path, identity)
    assert found is not None
    assert found.features["features"].tolist() == [[1, 1]] * 3
    again = found.moments["second"]
    assert (again.fingerprint, again.source, again.images) == ("print", "file.npz", 7)
    assert (again.sigma == np.eye(2)).all()
    other = real_identity(small_config(evaluation={"images": "digits:train"}))
    with pytest.raises(ConfigError, match="images: 'digits:held-out', not 'digits:train'"):
        read_real(tmp_path, other)
    (tmp_path / "real" / "real.npz").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"real: damaged .*remove"):
        read_real(tmp_path, identity)
