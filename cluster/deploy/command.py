"""The command `python -m cluster.deploy`: asks `learner.plan` for the plan of a preset, and writes
the files of a target."""

from __future__ import annotations

import shlex
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path

import tyro

from cluster.deploy.plan_document import PlanDocument, read_plan
from cluster.deploy.target import DeployOptions, Target
from cluster.deploy.targets import TARGETS
from cluster.errors import ConfigError, did_you_mean
from cluster.io.files import replacing
from cluster.program.console import exit_status
from cluster.program.invocation import command_of

MODULE = "cluster.deploy"
PLANNER = "learner.plan"
PLAN_TIMEOUT_S = 600.0
ABOUT = (
    "Write deployment files of a run, filled in from a preset and its plan (learner.plan). Files "
    "that are there stay, unless --force is given."
)
PRESET_FILES = (".yaml", ".yml")
UNCOMMENTED = (".json", ".md")
"""Kinds of files that get no head: they have no comments, or say it themselves."""
PLACES = ("out", "force", "plan", "preset_text", "run_arguments")
"""Options that are no part of the command in the head."""


def run(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    return exit_status(lambda: _run(given), refused=(ConfigError,))


def _run(arguments: Sequence[str]) -> None:
    target, options = parse(arguments)
    plan = plan_of(options)
    files = made_files(target, plan, options)
    for path, written in write_all(options.out, files, force=options.force).items():
        print(f"{'wrote' if written else 'as it was'}  {options.out / path}")
    if plan.gpus < options.gpus:
        print(f"the plan uses {plan.gpus} of {options.gpus} GPUs: more gain little (learner.plan)")
    print(target.next_steps(plan, options))


def made_files(target: Target, plan: PlanDocument, options: DeployOptions) -> dict[str, str]:
    """Relative path -> text of every file, with its head."""
    return {
        path: with_head(path, text, head(target, options, path))
        for path, text in target.files(plan, options).items()
    }


def parse(arguments: Sequence[str]) -> tuple[Target, DeployOptions]:
    """The chosen target and its options.

    Raises:
        ConfigError: an impossible value.
        SystemExit: --help, or an unknown option.
    """
    given = list(arguments)
    further: tuple[str, ...] = ()
    if "--" in given:
        at = given.index("--")
        given, further = given[:at], tuple(given[at + 1 :])
    if given[:1] in (["-h"], ["--help"]):
        print(usage())
        sys.exit(0)
    names = {target.name: target for target in TARGETS}
    if not given or given[0] not in names:
        asked = (
            f"no target {given[0]!r}: {did_you_mean(given[0], names)}" if given else "no target: "
        )
        raise ConfigError(f"{asked}name one of {', '.join(names)} first")
    target = names[given.pop(0)]
    try:
        options = tyro.cli(
            target.options,
            args=given,
            prog=f"{command_of(MODULE)} {target.name}",
            description=target.about,
        )
    except ValueError as error:  # of a dataclass's own check
        raise ConfigError(f"command line: {error}") from None
    return target, replace(options, run_arguments=further, preset_text=_preset_text(options))


def _preset_text(options: DeployOptions) -> str:
    if not options.preset.endswith(PRESET_FILES):
        return ""
    return _read(Path(options.preset), "--preset")


def _read(path: Path, option: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{option} {path}: {error}") from None


def usage() -> str:
    """The text of --help: the targets; each has a help of its own."""
    width = max(len(target.name) for target in TARGETS)
    lines = [f"  {target.name:{width}}  {target.about}" for target in TARGETS]
    command = command_of(MODULE)
    return "\n".join(
        [
            f"usage: {command} TARGET [OPTIONS] [-- OPTIONS OF learner.run]",
            "",
            *textwrap.wrap(ABOUT),
            "",
            *lines,
            "",
            f"{command} TARGET --help: its options",
        ]
    )


def plan_of(options: DeployOptions) -> PlanDocument:
    """The plan in the options' file, or one that `learner.plan` makes.

    Raises:
        ConfigError: no such file, an invalid plan, or what learner.plan refuses.
    """
    if options.plan is not None:
        plan = read_plan(_read(options.plan, "--plan"), f"--plan {options.plan}")
        if (plan.preset, plan.gpus) != (options.preset, options.gpus):
            raise ConfigError(
                f"--plan {options.plan} is of preset {plan.preset} and {plan.gpus} GPUs, but "
                f"--preset {options.preset} and --gpus {options.gpus} are asked for"
            )
        return plan
    command = plan_command(options)
    # In a process of its own: this package imports none of learner.
    ended = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=PLAN_TIMEOUT_S
    )
    if ended.returncode:
        why = ended.stderr.strip() or ended.stdout.strip()
        raise ConfigError(f"{shlex.join(['python', *command])} refused: {why}")
    return read_plan(ended.stdout, PLANNER)


def plan_command(options: DeployOptions) -> list[str]:
    """Arguments of Python that print the plan."""
    command = ["-m", PLANNER, "--json", "--preset", options.preset, "--gpus", str(options.gpus)]
    if options.gpu:
        command += ["--gpu", options.gpu]
    return [*command, *options.run_arguments]


def head(target: Target, options: DeployOptions, path: str) -> list[str]:
    """Lines that say where a file comes from, and what it was checked with."""
    made = f"Made by `{command_line(target, options)}`"
    if path.startswith(target.common):
        made = f"Made by `tessera deploy {target.name}`, the same for every plan"
    return [f"{made}, Tessera {version('tessera-rl')}.", target.checked]


def command_line(target: Target, options: DeployOptions) -> str:
    """The command that writes the same files, options at their defaults left out."""
    words = ["tessera", "deploy", target.name]
    for item in fields(options):
        value = getattr(options, item.name)
        if item.name in PLACES or value == item.default:
            continue
        flag = "--" + item.name.replace("_", "-")
        if isinstance(value, tuple):
            words += [word for each in value for word in (flag, each)]
        elif value is True:
            words.append(flag)
        else:
            words += [flag, str(value)]
    return shlex.join(words + (["--", *options.run_arguments] if options.run_arguments else []))


def with_head(path: str, text: str, lines: Sequence[str]) -> str:
    """A file's text below its head, as comments; a script's first line stays the first."""
    if path.endswith(UNCOMMENTED):
        return text
    comments = "".join(f"# {line}\n" for line in lines)
    if text.startswith("#!"):
        first, _, rest = text.partition("\n")
        return f"{first}\n{comments}{rest}"
    return comments + text


def write_all(out: Path, files: Mapping[str, str], *, force: bool) -> dict[str, bool]:
    """Write files that are not there or differ; nothing is written if one must not be.

    Returns:
        Path -> whether it was written.

    Raises:
        ConfigError: a file is there with another text, and `force` was not given.
    """
    differing = {path: text for path, text in files.items() if _found(out / path) != text}
    if there := [str(out / path) for path in differing if (out / path).exists() and not force]:
        raise ConfigError(
            f"{', '.join(there)} would be overwritten: give --force, or another --out"
        )
    for path, text in differing.items():
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        with replacing(out / path) as partial:
            partial.write_text(text, encoding="utf-8")
        if text.startswith("#!"):
            (out / path).chmod(0o755)
    return {path: path in differing for path in files}


def _found(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
