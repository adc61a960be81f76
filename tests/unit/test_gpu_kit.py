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

import pytest

from tests.bench.gpu.__main__ import chosen, parse
from tests.bench.gpu.checks import CHECKS, Check
from tests.bench.gpu.expected import EXPECTED, Expected, Verdict, card_of, expectation
from tests.bench.gpu.report import Report
from tests.bench.gpu.supervisor import ROOT, Ended, StartError, Supervisor
from tests.bench_runs import python_path_without

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
    ended, _ = run("one", "hangs", "last", seconds=2)
    assert [e.status for e in ended] == ["done", "failed", "skipped"]


def test_a_check_that_sets_what_holds_for_a_process_has_its_own() -> None:
    _, processes = run("one", "apart", "last")
    assert len(set(processes)) == 3


def test_nothing_runs_without_a_device() -> None:
    with pytest.raises(StartError, match="no such device"):
        run("broken")


def test_verdicts() -> None:
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


def test_checks_are_chosen_by_name_or_for_two_minutes() -> None:
    quick = chosen(parse(["--quick"]))
    assert 0 < len(quick) < len(CHECKS)
    assert [check.name for check in chosen(parse(["--only", "decode,card"]))] == ["card", "decode"]
    with pytest.raises(SystemExit, match="no check nothing"):
        chosen(parse(["--only", "nothing"]))


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
