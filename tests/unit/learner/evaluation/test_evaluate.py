"""`learner.evaluate` on the miniature, in this process."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.errors import StopRequestedError
from cluster.fleet import InlineFleet
from cluster.io.locks import locked
from cluster.messages import SamplingSpec
from cluster.program.console import INTERRUPTED, REFUSED
from learner.config import dump, load_preset
from learner.evaluate import main
from learner.evaluation import held_out
from learner.evaluation.kept import samples as kept_samples
from learner.evaluation.options import Job, parse
from learner.fleet_plan import sampling_plan
from tests.small_run import small_config
from tests.unit.helpers import request

PART = 40
OPTIONS = ["--preset", "miniature", "--inline", "--bootstrap", "20", "--num-images", "120"]
"""Of the tests; a base policy without guidance and with scale 2 are sampled."""
SCALES = ["--cfg-scales", "1", "2"]
KILLED = """
import sys, time
from learner.evaluate import main
from learner.evaluation.kept import samples
samples.PART = {part}
write = samples.KeptSamples.write

def write_and_wait(kept, number, arrays):
    write(kept, number, arrays)
    if number == 1:  # in the middle of the next part's file
        kept.file(2).with_name(f".{{kept.file(2).name}}.partial").write_bytes(b"PK")
        time.sleep(600)

samples.KeptSamples.write = write_and_wait
main(sys.argv[1:])
"""


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_samples, "PART", PART)


def figures(out: Path) -> dict[str, Any]:
    rows = json.loads((out / "results.json").read_text())["rows"]
    return {name: row["figures"] for name, row in rows.items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation that was not interrupted."""
    out = tmp_path_factory.mktemp("evaluation") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept_samples, "PART", PART)
        assert main([*OPTIONS, *SCALES, "--out", str(out), "--npz", "--png"]) == 0
    return out


def test_the_figures_are_those_of_a_run(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the judge that evaluates during a run, on the same random numbers. The miniature's table
    divides covariances by N, the command and other judges by N - 1, as FID tools do."""
    config = small_config(evaluation={"num_images": 120})
    with InlineFleet(sampling_plan(config)) as fleet:
        real = held_out.real_images(config, fleet)
        of_table = held_out.evaluate_policy(config, fleet, config.sampling, real)
        monkeypatch.setattr(held_out, "OF_MINIATURE", ())
        expected = held_out.evaluate_policy(config, fleet, config.sampling, real)
    found = {name: figure["value"] for name, figure in figures(whole)["base"].items()}
    assert found.keys() - expected.keys() == {"vendi"}  # needs the classes
    of_covariances = {name for name in expected if name.endswith("fid")}
    assert of_covariances == {"fid", "second/fid"}
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-6), name
        assert (found[name] != of_table[name]) or name not in of_covariances


def test_results_are_complete_in_every_form(whole: Path) -> None:
    found = figures(whole)
    assert list(found) == ["base", "base, CFG 2"]
    fid = found["base"]["fid"]
    assert fid["low"] < fid["value"] < fid["high"]
    results = json.loads((whole / "results.json").read_text())
    assert results["bootstrap"] == 20
    assert results["rows"]["base, CFG 2"]["identity"]["sampling"]["cfg_scale"] == 2
    with (whole / "results.csv").open() as file:
        lines = {(line["row"], line["figure"]): line for line in csv.DictReader(file)}
    assert float(lines["base", "fid"]["value"]) == fid["value"]
    assert lines["base", "images"]["low"] == ""
    text = (whole / "results.md").read_text()
    assert "| FID ↓ |" in text
    assert f"--out {whole}" in text


def test_images_are_written_for_the_adm_evaluator(whole: Path) -> None:
    with np.load(whole / "images" / "base.npz") as file:
        images, classes = file["arr_0"], file["arr_1"]
    assert images.shape == (120, 8, 8, 3)
    assert sorted(classes.tolist()) == [*np.repeat(range(10), 12)]
    assert len(set(classes[:40].tolist())) > 5  # every range has many classes
    assert len(list((whole / "images" / "base").glob("*.png"))) == 120
    assert not list((whole / "images").glob(".*"))


def test_written_images_have_the_figures_of_their_samples(whole: Path, tmp_path: Path) -> None:
    """They are decoded again, and scored as given images, in another order."""
    images = str(whole / "images" / "base.npz")
    assert main([images, *OPTIONS, "--out", str(tmp_path / "again")]) == 0
    (found,) = figures(tmp_path / "again").values()
    expected = figures(whole)["base"]
    assert expected.keys() - found.keys() == {"entropy"}
    values = {name: figure["value"] for name, figure in found.items()}
    assert values == pytest.approx({n: expected[n]["value"] for n in values}, rel=1e-5)


def test_a_folder_has_no_classes_and_no_scores(whole: Path, tmp_path: Path) -> None:
    folder = str(whole / "images" / "base")
    assert main([folder, *OPTIONS, "--out", str(tmp_path / "again")]) == 0
    (found,) = figures(tmp_path / "again").values()
    expected = figures(whole)["base"]
    assert found["fid"]["value"] == pytest.approx(expected["fid"]["value"], rel=1e-5)
    assert not {"clip", "accuracy", "vendi", "entropy"} & found.keys()


def test_another_metric_costs_no_sampling(
    whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = figures(whole)
    monkeypatch.setattr("learner.evaluate.open_fleet", None)  # none is opened
    line = [*OPTIONS, *SCALES, "--out", str(whole), "--evaluation.neighbours", "3"]
    assert main(line) == 0
    after = figures(whole)
    assert after["base"]["fid"] == before["base"]["fid"]
    assert after["base"]["coverage"] != before["base"]["coverage"]
    line = ["--compare", "base", "base, CFG 2", "--out", str(whole), "--bootstrap", "1000"]
    assert main(line) == 0  # with as many neighbours
    compared = json.loads((whole / "comparison.json").read_text())["figures"]["coverage"]
    assert compared["first"]["value"] == after["base"]["coverage"]["value"]
    assert main([*OPTIONS, *SCALES, "--out", str(whole)]) == 0
    assert figures(whole) == before
    assert "FID ↓" in capsys.readouterr().out


def test_another_seed_does_not_mix(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*OPTIONS, "--out", str(whole), "--seed", "5", "--cfg-scales", "1"]) == REFUSED
    assert "holds samples of something else (seed: 0, not 5)" in capsys.readouterr().err


def test_a_killed_evaluation_continues_to_the_same_figures(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "killed"
    line = [*OPTIONS, *SCALES, "--out", str(out)]
    code = KILLED.format(part=PART)
    process = subprocess.Popen([sys.executable, "-c", code, *line], stderr=subprocess.DEVNULL)
    parts = out / "samples" / "base"
    try:
        deadline = time.monotonic() + 120
        while not (parts / ".part_000002.npz.partial").is_file():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    kept = {file: file.stat().st_mtime_ns for file in parts.glob("*.npz")}
    assert [file.name for file in sorted(kept)] == ["part_000000.npz", "part_000001.npz"]
    sampled = list[tuple[Any, ...]]()
    stream = InlineFleet.stream

    def counted(fleet: InlineFleet, requests: Any) -> Any:
        for group in stream(fleet, requests):
            sampled.append((*group.rollouts.request.key, group.rollouts.request.spec.cfg_scale))
            yield group

    monkeypatch.setattr(InlineFleet, "stream", counted)
    assert main(line) == 0
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    groups = [group for *_, group, scale in sampled if scale == 1]
    assert groups == [8, 9]  # of ten groups of 12 images; a part has four
    assert len(sampled) == 12
    assert figures(out) == figures(whole)


def test_a_stopped_evaluation_says_how_to_continue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = InlineFleet.stream

    def stopped(fleet: InlineFleet, requests: Any) -> Any:
        for number, group in enumerate(stream(fleet, requests)):
            if number == 5:
                raise StopRequestedError("stopped while sampling")
            yield group

    monkeypatch.setattr(InlineFleet, "stream", stopped)
    line = [*OPTIONS, "--cfg-scales", "1", "--out", str(tmp_path / "out")]
    assert main(line) == INTERRUPTED
    text = capsys.readouterr().out
    assert "stopped; 72 images are left, go on with\n  python -m learner.evaluate" in text
    assert " ".join(line) in text


def test_two_rows_are_compared_image_by_image(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["--compare", "base", "base, CFG 2", "--out", str(whole), "--bootstrap", "1000"]
    assert main(line) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "base, CFG 2 is better in" in text
    found = json.loads((whole / "comparison.json").read_text())
    clip = found["figures"]["clip"]
    assert clip["difference"]["paired"]
    assert clip["difference"]["value"] == pytest.approx(
        clip["second"]["value"] - clip["first"]["value"]
    )
    assert clip["p_value_holm"] >= clip["difference"]["p_value"]
    rows = [str(whole / "samples" / row) for row in ("base", "base-cfg-2")]
    assert main(["--compare", *rows]) == 0
    capsys.readouterr()
    assert main(["--compare", *rows, "--bootstrap", "100"]) == REFUSED
    assert "none could be significant: set at least 5" in capsys.readouterr().err
    with locked(whole, "a test"):
        assert main(line) == REFUSED
    assert str(whole) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ([], "what should be evaluated?"),
        (["--preset", "miniature", "digits:train"], "name what to evaluate before the options"),
        ([*OPTIONS, "--num-images", "0"], "evaluation.num_images is 0"),
        ([*OPTIONS, "--samplings", "top_k=x"], "top_k must be a number"),
        (["--compare", "a"], "--compare takes two rows, found 1"),
        (["--compare", "a", "b"], "expected the directory of an evaluation or of one of its rows"),
        (["runs/x", "--compare", "a", "b"], "--compare takes its two rows itself"),
        (
            ["--compare", "a", "b", "--evaluation.neighbours", "3", "--out", "c", "--seed", "1"],
            "--compare reads --out and --bootstrap alone; all else is as in the evaluations of its "
            "rows: leave --evaluation.neighbours 3 --seed 1 out",
        ),
        ([*OPTIONS, "--evaluation.images", "none.npz"], "none.npz: no such file"),
        ([*OPTIONS, "--num-images", "4"], "more than 5 images"),
        (["digits:train", *OPTIONS, "--step", "3"], "--step 3 is of a run's checkpoint"),
    ],
)
def test_bad_command_lines_start_nothing(
    line: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(line) == REFUSED
    assert message in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


def test_settings_of_training_do_not_matter(tmp_path: Path) -> None:
    """What a run needs for its own evaluations is no condition of this one."""
    training = {
        "evaluation": {"every": 2, "patience": 3},
        "output": {"keep_best": "fid", "checkpoint_every": 2, "keep_every": 4},
        "rewards": {"hps": {"pool": "large"}},
        "reward_pools": {"large": {"num_servers": 2}},
        "num_learners": 2,
    }
    preset = tmp_path / "preset.yaml"
    preset.write_text(dump(small_config(**training)))
    job = parse(["--preset", str(preset), "--inline", "--num-images", "50"])
    assert isinstance(job, Job)
    config = job.configs["base"]
    assert (config.evaluation.every, config.evaluation.num_images) == (0, 50)
    assert [role.name for role in sampling_plan(config).roles] == ["sampler", "reward-server"]
    assert sampling_plan(config).reward_server.scorers["rewards"] == ()


@pytest.mark.parametrize(("scale", "images", "groups"), [(1.0, 50, 5), (2.0, 50, 2), (1.0, 8, 32)])
def test_samplers_decode_no_more_rows_at_once_than_planned(
    scale: float, images: int, groups: int
) -> None:
    """256 rollouts in training: 32 groups of 8."""
    sampler = sampling_plan(load_preset("llamagen-b-256")).sampler
    guidance = "none" if scale == 1 else "guided"
    spec = SamplingSpec(cfg_scale=scale, guidance=guidance)
    assert sampler.groups_in_call(request(0, images, spec=spec).rows) == groups


def test_a_directory_of_something_else_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").touch()
    assert main([*OPTIONS, "--out", str(tmp_path)]) == REFUSED
    assert "holds something else (thesis.tex)" in capsys.readouterr().err
    assert main(["--compare", "a", "b", "--out", str(tmp_path)]) == REFUSED
    assert "holds something else (thesis.tex)" in capsys.readouterr().err
    assert main(["--compare", "a", "b", "--out", str(tmp_path / "thesis.tex")]) == REFUSED
    assert "thesis.tex is a file: name a directory" in capsys.readouterr().err


def test_a_dry_run_says_what_would_be_sampled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main([*OPTIONS, *SCALES, "--dry-run", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "base, CFG 2" in text
    assert "120 images of each policy" in text
    assert "--sampler.max-groups" not in text
    assert "the distribution reward lowers" not in text  # no reward is computed here
    assert not out.exists()
    line = ["llamagen-b-256", "--preset", "llamagen-b-256", "--cfg-scales", "1", "2", "--inline"]
    line += ["--num-images", "50000", "--dry-run", "--out", str(out)]
    assert main(line) == REFUSED  # its weights are not here
    text = capsys.readouterr().out
    assert load_preset("llamagen-b-256").policy.checkpoint in text
    assert "not bit for bit the same; --sampler.max-groups 1 makes it so" in text
    assert re.search(r"about [\d.]+ minutes of sampling on \w+, by arithmetic", text)
