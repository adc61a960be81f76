"""Building a reference: from every kind of source, with classes, in processes, going on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cluster.errors import DataError
from rewards.distribution.joint import class_table, joint_features
from rewards.images.sources import SampleImages, open_source
from rewards.networks.features import PixelFeatures
from rewards.reference import build as builder
from rewards.reference import main, read_stored, sums
from tests.unit.reference_sources import (
    CLASSES,
    COUNT,
    FEATURES,
    IMAGES,
    SOURCES,
    make_source,
    parquet,
    png,
)


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    np.savez(tmp_path / "samples.npz", arr_0=IMAGES, arr_1=CLASSES)
    return tmp_path / "samples.npz"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """ten images of each of three classes; in the order of the paths class by class."""
    for index, pixels in enumerate(IMAGES):
        place = tmp_path / "photos" / f"class_{index % 3}" / "more" / f"{index:02d}.PNG"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(png(pixels))
    return tmp_path / "photos"


def build(source: Path, out: Path, *options: str) -> int:
    arguments = ["--images", str(source), "--out", str(out), "--features.network", "pixels"]
    return main([*arguments, "--batch", "4", *options])


def assert_is_of(out: Path, features: np.ndarray) -> None:
    stored = read_stored(out, "pixels")
    assert (stored.images, stored.ddof) == (len(features), 1)
    np.testing.assert_allclose(stored.reference.mu, features.mean(0), rtol=1e-12)
    scale = np.abs(np.cov(features.T)).max()
    np.testing.assert_allclose(
        stored.reference.sigma, np.cov(features.T), rtol=0, atol=1e-12 * scale
    )


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_gives_the_same_reference(kind: str, tmp_path: Path) -> None:
    source = make_source(kind, tmp_path)
    assert build(source, tmp_path / "out" / "ref.npz") == 0
    assert_is_of(tmp_path / "out" / "ref.npz", FEATURES)
    assert os.listdir(tmp_path / "out") == ["ref.npz"]


def test_processes_change_nothing(tmp_path: Path, samples: Path) -> None:
    assert build(samples, tmp_path / "one.npz", "--labels") == 0
    assert build(samples, tmp_path / "two.npz", "--labels", "--workers", "2") == 0
    with np.load(tmp_path / "one.npz") as one, np.load(tmp_path / "two.npz") as two:
        for key in one.files:
            np.testing.assert_array_equal(one[key], two[key])


def test_images_of_many_sizes_and_modes(tmp_path: Path, capsys) -> None:
    """A gray, a palette and an RGBA image, JPEG, and sizes mixed: RGB as the FID tools load it.
    Pixels are compared of one size alone."""
    source = tmp_path / "photos"
    source.mkdir()
    gray = Image.fromarray(IMAGES[0]).convert("L")
    for name, image in {
        "a.png": gray,
        "b.png": Image.fromarray(IMAGES[1]).convert("P"),
        "c.png": Image.fromarray(IMAGES[2]).convert("RGBA"),
        "d.jpg": Image.fromarray(IMAGES[3]),
        "e.png": gray.transpose(Image.Transpose.ROTATE_90),
    }.items():
        image.save(source / name)
    shapes = [image.pixels.shape for image in open_source(str(source)).read(0, 5)]  # type: ignore[union-attr]
    assert shapes == [(3, 4, 3)] * 4 + [(4, 3, 3)]
    assert build(source, tmp_path / "ref.npz") == 1
    told = capsys.readouterr().err
    assert f"{source}/e.png is 4 x 3, but {source}/a.png is 3 x 4" in told
    assert "resize them, or choose a network" in told
    assert build(source, tmp_path / "ref.npz") == 1  # sums that go on remember the size
    assert "e.png is 4 x 3, but" in capsys.readouterr().err
    (source / "e.png").unlink()
    assert build(source, tmp_path / "ref.npz") == 0
    assert read_stored(tmp_path / "ref.npz").images == 4


@pytest.mark.parametrize("block", [1, 6, 1024])
def test_it_resumes_where_it_stopped(
    block: int, tmp_path: Path, samples: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(sums, "BLOCK", block)
    whole, out = tmp_path / "whole.npz", tmp_path / "ref.npz"
    options = ("--joint", "classes")
    assert build(samples, whole, *options) == 0
    read: list[int] = []
    extract = builder.extract

    def stopping(loaded, extractor, start):
        if start == 12 and not read.count(12):
            read.append(12)
            raise KeyboardInterrupt
        read.append(start)
        return extract(loaded, extractor, start)

    monkeypatch.setattr(builder, "extract", stopping)
    assert build(samples, out, *options) == 130
    assert "stopped; the same command resumes" in capsys.readouterr().err
    assert not out.exists()
    assert build(samples, out, *options) == 0
    assert "resuming at image 12" in capsys.readouterr().err
    assert read == [0, 4, 8, 12, 12, 16, 20, 24, 28]
    with np.load(whole) as one, np.load(out) as two:
        assert one.files == two.files
        for key in one.files:
            np.testing.assert_array_equal(one[key], two[key])
    assert not list(tmp_path.glob(".*"))


def test_sums_of_something_else_do_not_go_on(tmp_path: Path, samples: Path, capsys) -> None:
    out, partial = tmp_path / "ref.npz", tmp_path / ".ref.npz.partial.npz"
    np.savez(partial, key=np.array("other"), skipped=np.array(0))
    assert build(samples, out) == 0
    assert "not resuming from" in (told := capsys.readouterr().err)
    assert "of other images, labels, features or options" in told
    assert_is_of(out, FEATURES)
    partial.write_bytes(b"PK damaged")
    assert build(samples, out, "--overwrite") == 0
    assert "it is damaged" in capsys.readouterr().err


def test_unreadable_images_are_refused_by_name(tmp_path: Path, folder: Path, capsys) -> None:
    out, bad = tmp_path / "ref.npz", folder / "class_1" / "more" / "04.PNG"
    whole = bad.read_bytes()
    bad.write_bytes(whole[: len(whole) // 2])
    assert build(folder, out) == 1
    told = capsys.readouterr().err
    assert f"error: {bad}: cannot be read (" in told
    assert "--skip-unreadable" in told
    assert not out.exists()
    assert build(folder, out, "--skip-unreadable", "--labels") == 0
    said = capsys.readouterr().out
    assert f"left out 1 images that could not be read: {bad}" in said
    kept = np.concatenate([np.arange(k, COUNT, 3) for k in range(3)])
    assert_is_of(out, FEATURES[kept[kept != 4]])
    stored = read_stored(out)
    np.testing.assert_array_equal(stored.class_counts, [10, 9, 10])


def test_sums_without_some_images_go_on_only_if_asked(tmp_path: Path, capsys) -> None:
    """Otherwise an image would be missing that nobody agreed to leave out."""
    source, out = tmp_path / "p.parquet", tmp_path / "ref.npz"
    cells = [png(pixels) for pixels in IMAGES]
    parquet(source, [{"bytes": None if i in (1, 20) else cell} for i, cell in enumerate(cells)])
    assert build(source, out) == 1
    assert f"{source} row 1: cannot be read (no bytes in column 'image')" in capsys.readouterr().err
    config = builder.ReferenceConfig(
        images=str(source),
        out=out,
        features=builder.FeaturesConfig(network="pixels"),
        skip_unreadable=True,
    )
    plan = builder.prepare(config)
    sums = builder.ReferenceSums(plan.key, plan.conditions)
    sums.add(builder.extract([*plan.source.read(0, 4)], plan.extractor, 0))
    sums.save(plan.partial)
    assert build(source, out) == 1
    assert "were left out, which needs --skip-unreadable" in capsys.readouterr().err
    sums.save(plan.partial)
    assert build(source, out, "--skip-unreadable") == 0
    captured = capsys.readouterr()
    assert "resuming at image 4" in captured.err
    assert "left out 2 images" in captured.out


def test_nothing_readable_is_refused(tmp_path: Path, capsys) -> None:
    source = tmp_path / "p.parquet"
    parquet(source, [b"", png(IMAGES[0])[:30]])
    assert build(source, tmp_path / "ref.npz", "--skip-unreadable") == 1
    assert "a covariance needs at least 2 images, found 0" in capsys.readouterr().err


def test_images_that_the_network_refuses_are_named(tmp_path: Path, samples: Path, capsys) -> None:
    arguments = ["--images", str(samples), "--out", str(tmp_path / "ref.npz")]
    assert main(arguments) == 1  # the miniature's network takes 8 x 8
    told = capsys.readouterr().err
    assert f"{samples} image 0: this network takes (8, 8, 3) images, found (3, 4, 3)" in told


def test_features_that_are_not_finite_are_named(samples: Path) -> None:
    def broken(images: np.ndarray) -> np.ndarray:
        values = PixelFeatures()(images)
        values[2] = np.nan
        return values

    with pytest.raises(DataError, match=r"image 6: its features are not finite"):
        builder.extract([*SampleImages(samples).read(4, 8)], broken, 4)  # type: ignore[arg-type]


def test_few_images_are_noted(tmp_path: Path, capsys) -> None:
    np.save(tmp_path / "few.npy", IMAGES[:9])
    assert build(tmp_path / "few.npy", tmp_path / "ref.npz") == 0
    assert "9 images give no full covariance in 12 dimensions" in capsys.readouterr().out


# Classes and conditions


def test_classes_are_counted(tmp_path: Path, samples: Path, folder: Path) -> None:
    names = [f"class {index % 3}" for index in range(COUNT)]
    cells = [png(pixels) for pixels in IMAGES]
    parquet(tmp_path / "p.parquet", cells, CLASSES.tolist(), kind=names)
    for source, options in {
        samples: ["--labels"],
        folder: ["--labels"],
        tmp_path / "p.parquet": ["--labels"],
        tmp_path / "p.parquet ": ["--labels", "--label-column", "kind"],
    }.items():
        out = tmp_path / "ref.npz"
        place = Path(str(source).strip())
        assert build(place, out, *options, "--num-classes", "4", "--overwrite") == 0
        np.testing.assert_array_equal(read_stored(out).class_counts, [10, 10, 10, 0])


@pytest.mark.parametrize("dim", [0, 2])
def test_joint_moments(dim: int, tmp_path: Path, samples: Path) -> None:
    out = tmp_path / "ref.npz"
    assert build(samples, out, "--joint", "classes", "--joint-dim", str(dim)) == 0
    stored = read_stored(out, joint=True)
    embedded = class_table(3, dim)[CLASSES]
    np.testing.assert_array_equal(stored.class_table[CLASSES], embedded)
    traces = np.trace(np.cov(FEATURES.T)), np.trace(np.cov(embedded.T))
    assert stored.weight**2 * traces[1] == pytest.approx(traces[0])
    expected = joint_features(FEATURES, embedded, stored.weight)
    np.testing.assert_allclose(stored.reference.mu, expected.mean(0), atol=1e-12)
    np.testing.assert_allclose(stored.reference.sigma, np.cov(expected.T), atol=1e-12)
    assert_is_of(out, FEATURES)


def test_joint_moments_with_given_embeddings(tmp_path: Path, samples: Path) -> None:
    rows = np.random.default_rng(1).normal(size=(COUNT, 5)).astype(np.float32)
    np.save(tmp_path / "captions.npy", rows)
    out = tmp_path / "ref.npz"
    options = ["--joint", "embeddings", "--embeddings", str(tmp_path / "captions.npy")]
    assert build(samples, out, *options, "--joint-weight", "2") == 0
    stored = read_stored(out, joint=True)
    expected = joint_features(FEATURES, rows, 2.0)
    np.testing.assert_allclose(stored.reference.sigma, np.cov(expected.T), atol=1e-12)
    assert (stored.weight, stored.class_table) == (2.0, None)


# Refusals of the command line


def test_options_are_refused(tmp_path: Path, samples: Path, folder: Path, capsys) -> None:
    (tmp_path / "there.npz").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    stray = tmp_path / "stray"
    stray.mkdir()
    (stray / "a.png").write_bytes(png(IMAGES[0]))
    np.save(tmp_path / "rows.npy", np.zeros((4, 5)))
    (tmp_path / "bad.npy").write_bytes(b"no array")
    np.save(tmp_path / "plain.npy", IMAGES)
    ref = tmp_path / "ref.npz"
    rows = ["--joint", "embeddings", "--embeddings"]
    cases = [
        (samples, tmp_path / "ref.pt", [], "--out must be an .npz file"),
        (samples, tmp_path / "there.npz", [], "is there already: --overwrite replaces it"),
        (samples, ref, ["--batch", "0"], "--batch must be >= 1, found 0"),
        (samples, ref, ["--workers", "-1"], "--workers must be >= 0, found -1"),
        (samples, ref, rows[:2], "--joint embeddings and --embeddings FILE go together"),
        (samples, ref, [*rows, str(tmp_path / "rows.npy")], r"found shape (4, 5)"),
        (samples, ref, [*rows, str(samples)], "found an .npz file"),
        (samples, ref, [*rows, str(tmp_path / "bad.npy")], "not a readable .npy file"),
        (samples, ref, ["--labels", "--num-classes", "2"], "--num-classes 2, but class 2 is there"),
        (samples, ref, ["--joint", "classes", "--joint-dim", "3"], "embed into 1 to 2 dimensions"),
        (tmp_path / "empty", ref, [], "no images in it or below: it is empty"),
        (stray, ref, ["--labels"], "classes are the folders right below it, but a.png is in none"),
        (tmp_path / "plain.npy", ref, ["--labels"], "an .npy file has no classes"),
        (tmp_path / "no", ref, [], "no such file"),
    ]
    for source, out, options, message in cases:
        assert build(source, out, *options) == 2, options
        told = capsys.readouterr().err
        assert message in told
        assert told.startswith("error: ")
        assert told.count("\n") == 1


class Deadly(SampleImages):
    """Kills the process that reads it."""

    def read(self, start: int, stop: int):
        os._exit(9)


def test_a_lost_process_is_reported(tmp_path: Path, samples: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(builder, "open_source", lambda *_: Deadly(samples))
    assert build(samples, tmp_path / "ref.npz", "--workers", "1") == 1
    told = capsys.readouterr().err
    assert "a process was lost, most likely for want of memory: the same command resumes" in told


def test_a_terminated_command_continues(tmp_path: Path, capsys) -> None:
    """The real command, with a worker, ended by SIGTERM half-way."""
    images = np.random.default_rng(0).integers(0, 256, (6_000, 8, 8, 3), dtype=np.uint8)
    np.save(tmp_path / "s.npy", images)
    out = tmp_path / "ref.npz"
    options = ["--images", str(tmp_path / "s.npy"), "--out", str(out), "--batch", "20"]
    command = [sys.executable, "-m", "rewards.reference", *options]
    command += ["--workers", "1", "--save-every", "0.05"]
    root = Path(__file__).parents[4]
    process = subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, text=True)
    partial = tmp_path / ".ref.npz.partial.npz"
    limit = time.monotonic() + 120
    while not partial.exists() and time.monotonic() < limit and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    told = process.communicate(timeout=120)[1]
    assert process.returncode == 130, told
    assert "stopped; the same command resumes" in told
    assert "Traceback" not in told
    with np.load(partial) as file:
        cursor = int(file["cursor"])
        assert 0 < cursor < 6_000
    assert main(options) == 0
    assert f"resuming at image {cursor}" in capsys.readouterr().err
    assert read_stored(out).images == 6_000
