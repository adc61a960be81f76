"""`tests.bench.gpu`: checks that fail, hang or end their process, and packages that are not there.

`test_benches.py` runs all its checks.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import tests.bench.gpu.__main__ as kit
from actors.checkpoints.sources import planned_policy, planned_tokenizer
from learner.capacity.budget import budget_of
from learner.capacity.cards import CARDS as KINDS
from learner.capacity.workload import Models
from learner.config import load_preset
from tests.bench.gpu import whole
from tests.bench.gpu.__main__ import MINUTES, chosen, parse
from tests.bench.gpu.checks import CHECKS, Check
from tests.bench.gpu.expected import CARDS, EXPECTED, Expected, Verdict, card_of, expectation
from tests.bench.gpu.report import Report
from tests.bench.gpu.scene import Scene
from tests.bench.gpu.supervisor import ROOT, Ended, StartError, Supervisor
from tests.bench_runs import python_path_without

PHASES = ("sample", "images", "learn", "publish")
WORKER = """
import json, os, signal, sys, time
given = json.loads(sys.argv[1])
pipe = os.fdopen(given["events"], "w", buffering=1)
def tell(**event): print(json.dumps(event), file=pipe)
if given["checks"] == ["broken"]:
    sys.exit("no such device")
tell(kind="device", name="NVIDIA H200")
for index, name in enumerate(given["checks"]):
    tell(kind="start", index=index)
    tell(kind="figure", check=name, name="copy_tb_s", value=float(os.getpid()))
    if name == "dies":
        print("one last word", flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
    if name == "hangs":
        time.sleep(60)
    status = "failed" if name == "fails" else "done"
    tell(kind="end", index=index, status=status, reason="")
    if name == "poisons":
        sys.exit(3)
"""


def checks(*names: str, limit_s: float = 30) -> list[Check]:
    return [Check(n, "", limit_s, alone=n == "apart") for n in names]


def run(*names: str, limit_s: float = 30, seconds: float = 60) -> tuple[list[Ended], list[int]]:
    """How checks ended, and the process of each that began."""
    processes: list[int] = []

    def hear(event: dict) -> None:
        if event["kind"] == "figure":
            processes.append(int(event["value"]))

    deadline = time.monotonic() + seconds
    supervisor = Supervisor({"tiny": False}, deadline, hear, ("-c", WORKER))
    return list(supervisor.run(checks(*names, limit_s=limit_s))), processes


def test_a_check_that_fails_or_ends_the_process_does_not_stop_the_next() -> None:
    ended, processes = run("one", "fails", "dies", "poisons", "last")
    assert [e.check.name for e in ended] == ["one", "fails", "dies", "poisons", "last"]
    assert [e.status for e in ended] == ["done", "failed", "failed", "done", "done"]
    assert "SIGSEGV" in ended[2].reason
    assert "one last word" in ended[2].reason
    same = [processes[0] == other for other in processes]
    assert same == [True, True, True, False, False]
    assert processes[3] != processes[4]


def test_a_check_that_hangs_is_stopped() -> None:
    ended, processes = run("hangs", "last", limit_s=2)
    assert [e.status for e in ended] == ["failed", "done"]
    assert "longer than 2 s" in ended[0].reason
    with pytest.raises(ProcessLookupError):
        os.kill(processes[0], 0)


def test_what_the_time_does_not_suffice_for_is_skipped() -> None:
    ended, _ = run("one", "hangs", "last", seconds=1)
    assert [e.status for e in ended] == ["done", "skipped", "skipped"]
    assert "to finish it" in ended[1].reason
    report = Report(checks("one", "hangs", "last"))
    for each in ended:
        report.end(each)
    assert report.exit_status == 0


def test_a_check_that_sets_what_holds_for_a_process_has_its_own() -> None:
    _, processes = run("one", "apart", "last")
    assert len(set(processes)) == 3


def test_nothing_runs_without_a_device() -> None:
    with pytest.raises(StartError, match="no such device"):
        run("broken")


def test_a_hang_leaves_time_for_the_rest() -> None:
    """Where checks take a third of their limits."""
    limits = [check.limit_s for check in chosen(parse([]))]
    longest = max(limits[:-1])
    assert sum(limits) / 3 + longest * 2 / 3 <= 60 * MINUTES


def test_a_tool_that_hangs_or_does_not_start_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nexec sleep 60\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(kit, "SMI_S", 0.1)
    (line,) = kit.card_lines()
    assert "timed out" in line
    tool.write_bytes(b"\x7fELF")
    (line,) = kit.card_lines()
    assert "Exec format error" in line


def scene(folder: Path, figures: dict[str, float]) -> Scene:
    def tell(kind: str, **event: Any) -> None:
        if kind == "figure":
            figures[event["name"]] = event["value"]

    return Scene(tell, "cpu", tiny=True, quick=True, official="", folder=str(folder))


def test_tests_that_take_too_long_tell_how_far_they_came(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(whole, "TESTS_S", 0.1)
    with pytest.raises(RuntimeError, match="longer than"):
        whole.marked_tests(scene(tmp_path, {}))


def test_marked_tests_run_without_ray_and_hypothesis(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Files that need them are left out; a file that cannot be read stops no other."""
    path = python_path_without(tmp_path, "ray", "hypothesis")
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # hypothesis has one
    (broken := tmp_path / "test_broken.py").write_text("import no_such_package\n")
    needy = ["cluster/ray_backend/test_collective.py", "cluster/test_weights.py"]
    files = [f"tests/unit/{name}" for name in needy]
    monkeypatch.setattr(whole, "marked_files", lambda: [*files, str(broken)])
    figures = dict[str, float]()
    all_files = scene(tmp_path, figures)
    all_files.tiny = False
    whole.marked_tests(all_files)
    assert figures["tests_failed"] == 1


def test_workers_leave_nothing_behind(tmp_path: Path) -> None:
    place = scene(tmp_path, {}).folder()
    assert place.parent == tmp_path


def test_verdicts() -> None:
    assert card_of("NVIDIA GH200 480GB") == ""
    assert card_of("NVIDIA H100 80GB HBM3") == "H100"
    for figure in ("tests_passed", "hps_scores_vary"):  # nothing ran, or nothing was compared
        wanted = expectation(figure, "H200", EXPECTED)
        assert wanted is not None
        assert wanted.judge(0) is Verdict.WRONG
    assert expectation("copy_tb_s", card_of("NVIDIA H200"), EXPECTED) == Expected(
        low=4.0, miss=Verdict.SLOWER
    )
    assert expectation("copy_tb_s", card_of("cpu"), EXPECTED) is None
    assert Expected(high=1).judge(math.nan) is Verdict.WRONG
    report = Report(checks("a", "b"))
    report.hear({"kind": "device", "name": "NVIDIA H200"})
    report.hear({"kind": "figure", "check": "a", "name": "copy_tb_s", "value": 3.0})
    report.end(Ended(CHECKS[0], "done"))
    assert report.exit_status == 1  # b did not end
    report.end(Ended(Check("a", "", 1), "done"))
    assert (report.outcome(report._ended[1]), report.exit_status) == ("slower than expected", 0)
    report.hear({"kind": "figure", "check": "b", "name": "rows_24_k3", "value": 1.0})
    report.end(Ended(Check("b", "", 1), "done"))
    assert (report.outcome(report._ended[2]), report.exit_status) == ("wrong", 1)


def test_times_of_an_iteration_are_the_planners() -> None:
    config = load_preset("paper-fixed")
    models = Models(
        planned_policy(config.policy.source()), planned_tokenizer(config.tokenizer.source())
    )
    for card in CARDS:
        budget = budget_of(config, models, KINDS[card.lower()])
        planned = {phase.name: phase.seconds for phase in budget.phases}
        planned["publish"] += planned["load"]  # in one process
        found = {f"iteration_{name}_s": planned[name] for name in PHASES}
        for figure, seconds in {**found, "iteration_s": budget.seconds}.items():
            expected = expectation(figure, card, EXPECTED)
            assert expected is not None
            assert expected.high == pytest.approx(1.3 * seconds, rel=0.03), figure


def test_checks_are_chosen_by_name_or_for_two_minutes() -> None:
    quick = chosen(parse(["--quick"]))
    assert 0 < len(quick) < len(CHECKS)
    assert "public" not in {check.name for check in chosen(parse([]))}
    assert "public" in {check.name for check in chosen(parse(["--official", "DIR"]))}
    assert [check.name for check in chosen(parse(["--only", "decode,card"]))] == ["card", "decode"]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--only", "card,nothing"], "no check nothing: there are card, "),
        (["--device", "cpu", "--quick"], "--device cpu needs --tiny"),
    ],
)
def test_what_cannot_be_run_is_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str], error: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(arguments)
    assert ended.value.code == 2
    assert error in capsys.readouterr().err


def test_a_package_that_lacks_is_named_and_learning_needs_none_of_these(tmp_path: Path) -> None:
    path = python_path_without(
        tmp_path, "ray", "open_clip", "torchvision", "transformers", "timm", "sklearn", "pandas"
    )
    call = [sys.executable, "-m", "tests.bench.gpu", "--device", "cpu", "--tiny"]
    done = subprocess.run(
        [*call, "--only", "reproducible,scorers"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the package torchvision is not installed" in done.stdout
    assert "RESULT gpu.step_reproducible_same=1 expected=1" in done.stdout
    assert "1 passed, 1 skipped" in done.stdout
