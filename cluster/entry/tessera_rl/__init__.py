"""The command `tessera`: every command of this program, from any directory.

It is a separate package because it must be found where other files have the names of the
four packages: in the working directory, which it searches last, or on PYTHONPATH.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

COMMANDS = {
    "run": ("learner.run", "tune a policy; without options, the miniature"),
    "evaluate": ("learner.evaluate", "figures of a run, a checkpoint, a model or images"),
    "status": ("cluster.status", "how a running job is: workers, iteration, newest metrics"),
    "scale": ("cluster.scale", "more or fewer workers in a running job"),
    "stop": ("cluster.stop", "end a running job at the next safe point"),
    "nodes": ("cluster.deploy.nodes", "nodes of a Ray cluster, or a wait for them"),
    "report": ("learner.report", "a page about a run, or about several side by side"),
    "sample": ("actors.sample", "images of a run's policy, or of a checkpoint"),
    "weights": ("actors.weights", "list, fetch, convert and export official checkpoints"),
    "captions": ("actors.captions", "text features of captions"),
    "reference": ("rewards.reference", "reference moments of a set of images"),
    "rollouts": ("learner.rollouts", "a run's rollouts by their rewards: images, tokens, logprobs"),
    "replay": ("learner.replay", "the learner on stored rollouts, to debug it without samplers"),
    "deploy": ("cluster.deploy", "files for KubeRay, Slurm and clouds, from a preset and its plan"),
    "plan": ("learner.plan", "memory of learner and sampler, before renting a GPU"),
}
REFUSED = 2


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    if not given or given[0] in ("-h", "--help", "help"):
        return _show(usage())
    if given[0] in ("-V", "--version"):
        return _show(f"tessera {version('tessera-rl')}")
    name, *rest = given
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean 'tessera {near[0]}'?" if near else "see 'tessera --help'"
        return _show(f"error: there is no command {name!r}: {hint}", REFUSED)
    hidden = import_own_packages()
    started = importlib.import_module("cluster.program.invocation")
    started.begin_by_name(_working_directory_last(), hidden=hidden)
    program = importlib.import_module("cluster.program.start")
    return int(program.run_command(COMMANDS[name][0], rest))


def _show(text: str, status: int = 0) -> int:
    """Print a text, or what is wrong, also to a closed pipe; returns the exit status."""
    import_own_packages()
    with importlib.import_module("cluster.program.streams").safe_streams(output_is_all=True):
        print(text, file=sys.stderr if status else sys.stdout)
    return status


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(
        ["usage: tessera COMMAND [OPTIONS]", "", *lines, "", "tessera COMMAND --help: its options"]
    )


def import_own_packages() -> bool:
    """Have the four packages imported from beside this one, also in Ray's workers; returns whether
    others of their names come before them."""
    home = next(
        folder
        for folder in Path(__file__).resolve().parents
        if (folder / "cluster" / "own_packages.py").is_file()
    )
    spec = importlib.util.spec_from_file_location(
        f"{__name__}.own_packages", home / "cluster" / "own_packages.py"
    )
    assert spec is not None
    assert spec.loader is not None
    own: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(own)
    return bool(own.import_own_packages(home))


def _working_directory_last() -> str:
    """Search the working directory for modules after everything else; returns it."""
    try:
        here = os.getcwd()
    except OSError:  # deleted meanwhile
        return ""
    asked = os.environ.get("PYTHONPATH", "").split(os.pathsep) if "PYTHONPATH" in os.environ else []
    if sys.path[:1] in ([""], [here]) and not {"", ".", here} & set(asked):  # by `python -m`
        del sys.path[0]
    sys.path.append(here)
    return here
