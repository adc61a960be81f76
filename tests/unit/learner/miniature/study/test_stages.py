"""The stages of an arm on disk: skipped where they are, continued after a crash at any point,
refused where settings, networks or the code's results have changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.errors import ConfigError, DataError
from learner.miniature.arms import collect
from learner.miniature.study import stages
from learner.miniature.study.names import BASE, BOTH
from learner.miniature.study.plan import plan_of
from learner.miniature.study.results import to_csv
from learner.miniature.study.stages import Job, evaluate_arm, train_arm
from tests.unit.learner.miniature.study.tiny import tiny_job


def run(jobs: list[Job]) -> str:
    """All stages in this process; the text of the CSV."""
    for job in jobs:
        if job.arm.name != BASE:
            train_arm(job)
    for job in jobs:
        evaluate_arm(job)
    return to_csv(collect(jobs))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Job], str]:
    out = tmp_path_factory.mktemp("study")
    jobs = [tiny_job(out, arm) for arm in (BASE, BOTH)]
    return jobs, run(jobs)


class CrashError(Exception):
    """Stands for the end of the process."""


def test_a_crash_anywhere_changes_nothing(
    tmp_path: Path, done: tuple[list[Job], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each start crashes one step later: before the trained arm is complete, and before and within
    its evaluations."""
    jobs = [tiny_job(tmp_path, arm) for arm in (BASE, BOTH)]
    steps = 0

    def crash_at(limit: int) -> None:
        nonlocal steps
        steps = 0

        def dumps(value: object, **options: object) -> str:
            nonlocal steps
            steps += 1
            if steps > limit:
                raise CrashError
            return real(value, **options)

        monkeypatch.setattr(stages, "dumps", dumps)

    real = stages.dumps
    for limit in (3, 4, 1, 1):  # the arm without its record; the whole arm; an evaluation each
        crash_at(limit)
        with pytest.raises(CrashError):
            run(jobs)
    crash_at(1)
    assert run(jobs) == done[1]


def test_what_is_done_is_skipped(
    done: tuple[list[Job], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "InlineFleet", None)  # nothing is computed
    assert run(done[0]) == done[1]
    plan = plan_of(done[0])
    assert [(line.count, line.done) for line in plan.lines] == [(1, 1), (1, 1), (3, 3)]
    assert plan.seconds == 0
    other = plan_of([*done[0], tiny_job(done[0][0].out, "LOO-FID only")])
    assert other.seconds == pytest.approx(plan.lines[1].seconds + 4)  # as long as the other arm


def test_three_spaces_and_all_policies(done: tuple[list[Job], str]) -> None:
    lines = done[1].splitlines()
    figures = [f"{s}{n}" for s in ("", "second/", "clip/")
               for n in ("fid", "coverage", "density", "precision", "recall")]  # fmt: skip
    for policy in ("base", '"base, CFG 2"', BOTH):
        found = {line.rpartition(",")[0] for line in lines}
        for metric in (*figures, "accuracy", "clip", "entropy"):
            assert f"llamagen,1,{policy},{metric}" in found


def test_other_settings_are_refused(done: tuple[list[Job], str]) -> None:
    job = done[0][1]
    other = Job(out=job.out, part=job.part, seed=job.seed, arm=job.arm, iterations=5)
    with pytest.raises(ConfigError, match="other settings: iterations was 3, expected 5: remove"):
        train_arm(other)


def test_other_networks_are_refused_and_evaluated_anew(
    done: tuple[list[Job], str], tmp_path: Path
) -> None:
    base, job = done[0]
    tokenizer = job.networks / "tokenizer.safetensors"
    content = tokenizer.read_bytes()
    try:
        tokenizer.write_bytes(content + b" ")
        with pytest.raises(ConfigError, match=r"<networks>/tokenizer.safetensors was '\w{64}'"):
            train_arm(job)
        assert plan_of([base]).lines[-1].done == 0
    finally:
        tokenizer.write_bytes(content)


def test_another_version_of_the_code_must_compute_the_same(
    done: tuple[list[Job], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = done[0][1]
    monkeypatch.setattr(stages, "code_version", lambda: "new")
    assert plan_of([job]).lines[-1].done == 0  # evaluations are made again
    metrics = job.tuned / "metrics.jsonl"
    content = metrics.read_text()
    first, *rest = content.splitlines(keepends=True)
    changed = json.loads(first)
    changed["loss/grad_norm"] += 1e-7
    metrics.write_text(json.dumps(changed) + "\n" + "".join(rest))
    with pytest.raises(ConfigError, match=r"another version .* loss/grad_norm of iteration 1 was"):
        train_arm(job)
    metrics.write_text(content)
    train_arm(job)
    record = json.loads((job.tuned / "record.json").read_text())
    assert record["code"][1:] == ["new"]
    monkeypatch.setattr(stages, "_train", None)  # it is not repeated a second time
    train_arm(job)


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, BOTH)
    job.tuned.mkdir(parents=True)
    (job.tuned / "record.json").write_text("{")
    with pytest.raises(DataError, match=r"record.json is damaged: remove it"):
        train_arm(job)
