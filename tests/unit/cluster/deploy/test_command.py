"""The command `python -m cluster.deploy`: the plan that it asks for, the files that it writes."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.deploy import main
from cluster.deploy.command import command_line, parse, plan_of, with_head, write_all
from cluster.deploy.targets import TARGETS
from cluster.errors import ConfigError
from tests.unit.cluster.deploy.plans import eight_gpus, text

GIVEN = ["kuberay", "--preset", "llamagen-b-256", "--gpus", "8", "--image", "example.org/t:1"]


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    path.write_text(text(eight_gpus()))
    return path


def test_files_are_written_once(
    plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    given = [*GIVEN, "--plan", str(plan), "--out", str(out)]
    assert main(given) == 0
    written = sorted(out.rglob("*.yaml"))
    assert capsys.readouterr().out.count("wrote") == len(written) > 5
    for file in written:
        assert file.read_text().startswith("# Made by `tessera deploy kuberay")
        assert "# Not run on" in file.read_text()
    assert main(given) == 0  # nothing differs
    assert "wrote" not in capsys.readouterr().out

    changed = [*given, "--retries", "5"]
    before = {file: file.read_bytes() for file in written}
    assert main(changed) == 2
    told = capsys.readouterr().err
    assert "rayjob.yaml" in told
    assert "would be overwritten: give --force, or another --out" in told
    assert {file: file.read_bytes() for file in written} == before
    assert main([*changed, "--force"]) == 0
    assert "backoffLimit: 5" in (out / "overlays/job-8-gpus/rayjob.yaml").read_text()


def test_a_plan_of_another_run_is_refused(plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [*GIVEN, "--plan", str(plan)]
    given[given.index("8")] = "16"
    assert main(given) == 2
    assert "is of preset llamagen-b-256 and 8 GPUs" in capsys.readouterr().err
    assert main([*GIVEN, "--plan", f"{plan}.not"]) == 2
    assert "No such file" in capsys.readouterr().err


def test_the_planner_is_asked_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def answer(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, text(eight_gpus()), "")

    monkeypatch.setattr(subprocess, "run", answer)
    _, options = parse([*GIVEN, "--gpu", "h200", "--", "--iterations", "9", "--name", "x"])
    assert plan_of(options).gpus == 8
    assert asked == [
        [sys.executable, "-m", "learner.plan", "--json", "--preset", "llamagen-b-256", "--gpus",
         "8", "--gpu", "h200", "--iterations", "9", "--name", "x"]
    ]  # fmt: skip


def test_what_the_planner_refuses_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 2, "", "error: no preset 'x'\n")

    monkeypatch.setattr(subprocess, "run", refuse)
    with pytest.raises(ConfigError, match="refused: error: no preset 'x'"):
        plan_of(parse(GIVEN)[1])


def test_the_command_in_the_head_makes_the_same_files() -> None:
    given = [*GIVEN, "--env-secret", "a", "--env-secret", "b", "--pod-monitor", "--retries", "0",
             "--checkpoint-url", "s3://b/x", "--", "--conditions.template",
             "a photo of {}"]  # fmt: skip
    target, options = parse(given)
    line = command_line(target, options)
    assert parse(shlex.split(line)[2:]) == (target, options)


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        ("a.yaml", "x: 1\n", "# one\n# two\nx: 1\n"),
        ("a.sh", "#!/bin/bash\nset -e\n", "#!/bin/bash\n# one\n# two\nset -e\n"),
        ("a.json", "{}\n", "{}\n"),
    ],
)
def test_the_head_is_a_comment(path: str, body: str, expected: str) -> None:
    assert with_head(path, body, ["one", "two"]) == expected


def test_a_script_can_be_executed(tmp_path: Path) -> None:
    write_all(tmp_path, {"run.sh": "#!/bin/sh\necho yes\n"}, force=False)
    assert subprocess.run([tmp_path / "run.sh"], capture_output=True, text=True).stdout == "yes\n"


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_every_target_says_what_has_not_run(target: Any) -> None:
    assert "not run" in target.checked.lower()
    assert target.about


def test_help_lists_the_targets(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    shown = capsys.readouterr().out
    assert [target.name for target in TARGETS if f"\n  {target.name} " not in shown] == []
    assert main(["kubrey"]) == 2
    assert "no target 'kubrey': did you mean 'kuberay'?" in capsys.readouterr().err
    assert main([]) == 2
