"""The learner on a run's stored rollouts, without samplers: `python -m learner.replay RUN`.

It starts from the base policy or from a checkpoint, takes the same GRPO steps in this process, and
prints its metrics beside the recorded ones. With the run's settings and one learner on a CPU they
are equal bit for bit.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    import sys

    from cluster.program.start import run_command

    sys.exit(run_command("learner.replay"))

import csv
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.box import SIMPLE_HEAD
from rich.table import Table

from cluster.errors import ConfigError, TesseraError, did_you_mean
from cluster.io.files import replacing
from cluster.io.locks import locked_file
from cluster.io.paths import output_path
from cluster.io.run_layout import step_name
from cluster.io.strict_json import dumps
from cluster.program.console import FAILED, INTERRUPTED, REFUSED, make_console
from cluster.program.help import answer_help, asks_help
from cluster.program.invocation import command_of
from cluster.program.precision import deterministic_environment
from learner.checkpoints.checkpoint import check_identity
from learner.config import DEFAULT_PRESET, load_preset
from learner.replayed import Replay, Replayed, Settings
from learner.runs.records import ITERATION
from learner.runs.run_dir import RunDirectory

MODULE = "learner.replay"
ABOUT = (
    "The learner on the stored rollouts of a run, without samplers: the same steps in this "
    "process, recorded metrics beside replayed ones. RUN is a run's directory, or its name under "
    "runs/. Other settings of the learner than the run's (--learner.lr) show their effect."
)
COMMON = {
    "what to replay": ("--iterations", "--from-step"),
    "what to show": ("--metrics", "--check", "--out"),
    "other settings than the run's": ("--learner.lr", "--learner.microbatch", "--learner.precision",
                                      "--learner.num-gpus", "--loss.clip-low", "--loss.clip-high",
                                      "--loss.kl-coef", "--loss.ratio-to", "--entropy.controller",
                                      "--real.weight"),
}  # fmt: skip
"""What --help shows; --help-all shows every option."""
COLUMNS = (ITERATION, "metric", "recorded", "replayed")
APPROXIMATE = (
    "note: with these, only iteration {first} is what a run would have done there. Rollouts and "
    "rewards of later ones are those of the recorded policy, and the replayed one learns from them "
    "off-policy"
)
CAUSES = (
    "They should be equal on the machine and with the versions of the run. Where loss/lr differs, "
    "--resume changed `iterations`, which stretches the schedule; else a file of real tokens "
    "(real.source) may have changed"
)


@dataclass(frozen=True, kw_only=True)
class Command:
    """Options that are no settings of the learner."""

    iterations: str = ""
    """Iterations to replay, as in 1-5, with all between the start and them. Default: all that were
    kept."""
    from_step: int | None = None
    """Start from the checkpoint of this step; 0: the base policy. Default: the newest checkpoint
    before --iterations, else the base policy."""
    metrics: tuple[str, ...] = ()
    """Metrics to show of every iteration; default: those that differ."""
    check: bool = False
    """Exit with status 1 if a replayed number differs from the recorded one, or an iteration has
    neither recorded numbers nor weights; refused where equality is not promised."""
    out: Path | None = None
    """New file for all numbers, .json or .csv."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The learner on the stored rollouts of a run, without samplers."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Directory of the run, or its name under runs/."""
    command: Annotated[Command, tyro.conf.arg(name="")] = field(default_factory=Command)
    settings: Annotated[Settings, tyro.conf.arg(name="")] = field(default_factory=Settings)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    status = REFUSED
    try:
        run, command, settings = parse(arguments)
        plan = Replay.prepare(run, settings, command.iterations, command.from_step)
        check(plan, command)
        status = FAILED
        return carry_out(plan, command)
    except (TesseraError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED if isinstance(error, ConfigError) else status
    except KeyboardInterrupt:
        print("stopped; --out was not written", file=sys.stderr)
        return INTERRUPTED


def parse(arguments: list[str] | None) -> tuple[RunDirectory, Command, Settings]:
    """Raises ConfigError for impossible values, SystemExit for --help and unknown options."""
    prog = command_of(MODULE)
    if asks_help(arguments):
        options = Command(), Settings.of(load_preset(DEFAULT_PRESET))
        arguments = answer_help(arguments, f"{prog} RUN", ABOUT, COMMON, *options)
    try:
        given = tyro.cli(Arguments, args=arguments, prog=prog)  # which run
        run = RunDirectory.existing(given.run)
        default = Arguments(run=given.run, settings=Settings.of(run.read_config()))
        given = tyro.cli(Arguments, args=arguments, prog=prog, default=default)
    except ConfigError:
        raise
    except ValueError as error:  # of a dataclass's own check
        raise ConfigError(f"command line: {error}") from None
    command = given.command
    if command.out is not None:
        command = replace(command, out=new_file(command.out))
    return run, command, given.settings


def new_file(given: Path) -> Path:
    """The file to write.

    Raises:
        ConfigError: it exists, or has another suffix.
    """
    path = output_path(given, "--out")
    if path.suffix.lower() not in (".json", ".csv"):
        raise ConfigError(f"--out must be a .json or a .csv file, found {path}")
    if path.exists():
        raise ConfigError(f"--out {path} is there already: name another file")
    return path


def check(plan: Replay, command: Command) -> None:
    """
    Raises:
        ConfigError: equality cannot be checked, or no GPU is here.
        CheckpointError: the checkpoint is another run's.
    """
    if command.check and plan.not_promised:
        raise ConfigError(f"--check: {plan.not_promised}")
    if plan.config.learner.num_gpus and not torch.cuda.is_available():
        raise ConfigError(
            "the run's learner computes on a GPU, and none is usable here: --learner.num-gpus 0 "
            "replays on the CPU, which rounds otherwise"
        )
    if plan.config.reproducible:
        deterministic_environment()
    if plan.start is not None:
        check_identity(plan.start, plan.run.identity, plan.run.read_config())


def carry_out(plan: Replay, command: Command) -> int:
    """Replay, show and write; returns the exit status."""
    start = f"checkpoint {step_name(plan.first)}" if plan.start else "the base policy"
    print(f"replaying {plan.run.path} from {start}")
    if plan.changed:
        print(f"settings that are not the run's: {', '.join(plan.changed)}")
        print(APPROXIMATE.format(first=plan.first + plan.batches.base))
    elif plan.not_promised:
        print(f"note: {plan.not_promised}")
    done, began = list[Replayed](), time.monotonic()
    with ExitStack() as stack:
        if command.out is not None:
            stack.enter_context(locked_file(command.out, f"--out {command.out}"))
        for each in plan:
            done.append(each)
            show(each, command.metrics)
        if command.out is not None:
            write(plan, done, command.out)
    conclude(plan, done, time.monotonic() - began)
    return FAILED if command.check and not all(each.equal for each in done) else 0


def conclude(plan: Replay, done: list[Replayed], seconds: float) -> None:
    """Print the outcome."""
    off = [each.number for each in done if each.comparable and not each.equal]
    blank = [each.number for each in done if not each.comparable]
    weights = sum(each.weights is not None for each in done)
    outcome = [f"{len(off)} iterations differ, from {off[0]} on"] if off else []
    if blank:
        outcome.append(f"{len(blank)} iterations not comparable, from {blank[0]} on")
    elif not off:
        outcome.append("equal bit for bit")
    print(
        f"{len(done)} iterations, {sum(len(each.values) for each in done)} numbers"
        f"{f', weights after {weights} of them' if weights else ''}: {', '.join(outcome)}"
        f" ({seconds / len(done):.2g} s an iteration)"
    )
    if unrecorded := dict.fromkeys(name for each in done for name in each.unrecorded):
        print(f"not compared, since the records lack them: {', '.join(unrecorded)}")
    if off and not plan.not_promised:
        print(CAUSES)


def show(each: Replayed, metrics: tuple[str, ...]) -> None:
    """Print one iteration.

    Raises:
        ConfigError: a metric that the learner does not report.
    """
    for name in metrics:
        if name not in each.values:
            hint, there = did_you_mean(name, each.values), ", ".join(each.values)
            raise ConfigError(f"--metrics: the learner has no {name!r}: {hint}there are {there}")
    equal = len(each.values) - len(each.differing)
    text = f"iteration {each.number}: {equal} of {len(each.values)} numbers equal"
    if each.weights is not None:
        off = f"differ by {each.weights:.3g} at most" if each.weights else "are equal"
        text += f"; weights after it {off}"
    print(text if each.comparable else f"iteration {each.number}: not comparable")
    table = Table(box=SIMPLE_HEAD)
    table.add_column("metric")
    for heading in ("recorded", "replayed", "difference"):
        table.add_column(heading, justify="right")
    for name in metrics or each.differing:
        pair = each.values[name]
        difference = pair[1] - pair[0]
        shown = f"{difference:+.3g}" if difference else "0"
        table.add_row(name, *(f"{value:.9g}" for value in pair), shown)
    if table.row_count:
        make_console().print(table)


def write(plan: Replay, done: list[Replayed], out: Path) -> None:
    """Write all numbers."""
    rows: list[dict[str, Any]] = [
        dict(zip(COLUMNS, (each.number, name, *pair)))
        for each in done
        for name, pair in each.values.items()
    ]
    with replacing(out) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        if out.suffix.lower() == ".csv":
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
            return
        content = {
            "run": str(plan.run.path),
            "from_step": plan.first,
            "changed": plan.changed,
            "weights_off": {str(d.number): d.weights for d in done if d.weights is not None},
            "numbers": rows,
        }
        file.write(dumps(content, indent=1) + "\n")
