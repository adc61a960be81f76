"""The command; see the package."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tests.bench.gpu as package
from tests.bench.gpu.checks import BY_NAME, CHECKS, Check
from tests.bench.gpu.report import Report
from tests.bench.gpu.supervisor import StartError, Supervisor

MINUTES, QUICK_MINUTES = 7.0, 2.0
REFUSED = 2  # exit status, as argparse has it
SMI_S = 20.0  # longest time of nvidia-smi
QUERY = "name,driver_version,memory.total,power.limit,clocks.sm,clocks.max.sm,clocks.mem"


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 1 if something was wrong or failed, 2 if nothing could run, else 0."""
    options = parse(arguments)
    checks = chosen(options)
    if options.tiny:  # a process more takes longer than the checks
        checks = [dataclasses.replace(check, alone=False) for check in checks]
        checks.sort(key=lambda check: bool(check.environment))
    began = time.monotonic()
    deadline = began + 60 * (options.minutes or (QUICK_MINUTES if options.quick else MINUTES))
    report = Report(checks)
    for line in card_lines():
        print(line, flush=True)
    given = {name: getattr(options, name) for name in ("device", "tiny", "quick", "official")}
    with tempfile.TemporaryDirectory() as folder:  # workers are killed, and leave theirs behind
        supervisor = Supervisor({**given, "folder": folder}, deadline, report.hear)
        try:
            for ended in supervisor.run(checks):
                report.end(ended)
        except StartError as error:
            print(f"no check can run here: {error}", flush=True)
            return REFUSED
        except KeyboardInterrupt:
            print("interrupted", flush=True)
    report.summary(time.monotonic() - began)
    if options.out:
        options.out.write_text(json.dumps(report.as_json(), indent=1) + "\n")
    return report.exit_status


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.gpu",
        description=package.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="the most telling checks, 2 minutes")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try the checks")
    parser.add_argument("--only", default="", metavar="NAME[,NAME]", help="these checks alone")
    parser.add_argument("--minutes", type=float, default=0.0, help="longest time of all (7; 2)")
    parser.add_argument("--out", type=Path, help="write all figures there, as JSON")
    parser.add_argument(
        "--official", default="", metavar="DIR", help="checkout of FoundationVision/LlamaGen"
    )
    options = parser.parse_args(arguments)
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu needs --tiny: whole sizes take hours on a CPU")
    names = list(filter(None, options.only.split(",")))
    if unknown := [name for name in names if name not in BY_NAME]:
        parser.error(f"no check {', '.join(unknown)}: there are {', '.join(BY_NAME)}")
    return options


def chosen(options: argparse.Namespace) -> list[Check]:
    if not options.only:
        extra = bool(options.official) or options.tiny
        listed = [check for check in CHECKS if extra or not check.extra]
        return [check for check in listed if check.quick or not options.quick]
    return [check for check in CHECKS if check.name in options.only.split(",")]


def card_lines() -> list[str]:
    """The card, its driver, limits and clocks, where nvidia-smi tells them."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ["nvidia-smi: not found"]
    call = [tool, f"--query-gpu={QUERY}", "--format=csv"]
    try:
        found = subprocess.run(call, capture_output=True, text=True, timeout=SMI_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:  # a driver in trouble hangs it
        return [f"nvidia-smi: {error}"]
    return (found.stdout or found.stderr).splitlines()


if __name__ == "__main__" and (status := main()):
    sys.exit(status)
