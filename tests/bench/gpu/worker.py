"""A worker of `tests.bench.gpu`: runs the checks that its argument names, one after another."""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from typing import Any

from tests.bench.gpu.checks import BY_NAME, Check
from tests.bench.gpu.scene import Scene, SkippedError

FRAMES = 4  # of a traceback, from its end
OWN = ("actors", "cluster", "learner", "rewards", "tests")
POISONED = 3  # exit status


def main() -> int:
    given = json.loads(sys.argv[1])
    pipe = os.fdopen(given.pop("events"), "w", buffering=1)

    def tell(kind: str, **more: Any) -> None:
        pipe.write(json.dumps({"kind": kind, **more}) + "\n")

    names = given.pop("checks")
    scene = Scene(tell=tell, **given)
    scene.begin()
    for index, name in enumerate(names):
        tell("start", index=index)
        scene.check = name
        status, reason = attempt(BY_NAME[name], scene)
        healthy = scene.clean_up()
        tell("end", index=index, status=status, reason=reason)
        if not healthy:  # a CUDA error: every later call would fail
            return POISONED
    return 0


def attempt(check: Check, scene: Scene) -> tuple[str, str]:
    """Run a check; returns how it ended (done, failed, skipped) and why."""
    module, _, function = check.function.partition(":")
    try:
        getattr(importlib.import_module(f"tests.bench.gpu.{module}"), function)(scene)
    except SkippedError as error:
        return "skipped", str(error)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in OWN:
            return "failed", last_lines(error)
        return "skipped", f"the package {package} is not installed"
    except Exception as error:
        return "failed", last_lines(error)
    return "done", ""


def last_lines(error: BaseException) -> str:
    """The end of a traceback."""
    frames = traceback.extract_tb(error.__traceback__)[-FRAMES:]
    lines = [f"{frame.filename}:{frame.lineno} {frame.name}: {frame.line}" for frame in frames]
    message = "".join(traceback.format_exception_only(error)).strip()
    return "\n".join([*lines, message[-2000:]])


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # threads of libraries must not keep it
