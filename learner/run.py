"""The main job: `python -m learner.run --num-samplers 2`.

Loads the preset, starts the fleet, evaluates the base policy, trains, evaluates the tuned policy,
and writes everything into a run directory.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    import sys

    from cluster.program.start import run_command

    sys.exit(run_command("learner.run"))

import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Annotated

import tyro
from rich.console import Console

from cluster.errors import ConfigError, LockLostError, TesseraError
from cluster.open_fleet import open_fleet
from cluster.placement.nodes import Node
from cluster.preflight import Findings
from cluster.program import logs
from cluster.program.console import FAILED, INTERRUPTED, REFUSED, make_console
from cluster.program.help import answer_help, asks_help
from cluster.program.invocation import command_of
from cluster.program.precision import deterministic_environment
from cluster.program.signals import StopFlag, deferred_signals, signal_handler
from cluster.program.streams import safe_streams
from cluster.ray_session.session import check_ray, free_nodes, local_node
from learner.capacity.storage import store_need
from learner.checkpoints.resume import check_resume
from learner.checkpoints.store import CheckpointStore
from learner.config import (
    DEFAULT_PRESET,
    RunConfig,
    dump,
    load_preset,
    to_dict,
    validate,
)
from learner.experiment import Experiment
from learner.fleet_plan import fleet_plan
from learner.loggers.opening import open_loggers
from learner.monitoring.console import RunConsole
from learner.output import OutputConfig
from learner.preflight import listed, placement_lines, preflight
from learner.report import conclude, note_end
from learner.run_target import RunTarget, choose_run
from learner.runs.run_dir import RunDirectory
from learner.runs.starts import record_start
from rewards.scorers.user_reward_files import changed_since

logger = logging.getLogger(__name__)

ABOUT = (
    "Tune an autoregressive image policy with reinforcement learning. Without arguments: the "
    "miniature, real digits on the CPU, in a few minutes."
)
COMMON = {
    "what to run": ("--preset", "--iterations", "--seed", "--groups-per-iteration",
                    "--rollouts-per-group", "--max-staleness"),
    "where, and how": ("--run-dir", "--resume", "--auto-resume", "--from-step", "--dry-run",
                       "--inline"),
    "workers": ("--num-samplers", "--num-reward-servers", "--num-learners", "--sampler.num-gpus",
                "--reward.num-gpus", "--learner.num-gpus", "--ray.address"),
    "rewards": ("--rewards.clip.weight", "--rewards.hps.weight", "--rewards.loo-fid.weight",
                "--rewards.loo-fid.reference", "--rewards.extra"),
    "learning": ("--learner.lr", "--loss.kl-coef"),
    "what is kept": ("--evaluation.num-images", "--evaluation.every",
                     "--output.checkpoint-every"),
}  # fmt: skip
"""What --help shows; --help-all shows every option."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """Options of the command that are no settings of the run."""

    preset: str = DEFAULT_PRESET
    """Shipped preset by name, or a YAML file by path."""
    run_dir: str = ""
    """Run directory, by default a new one in runs/."""
    resume: bool = False
    """Resume the run in --run-dir, by default the newest, from its newest complete checkpoint. A
    lost directory is restored from --output.checkpoint-url."""
    auto_resume: bool = False
    """Resume the run in --run-dir, or start it if there is none; one command line for the first
    start and every requeue of a job."""
    from_step: int | None = None
    """Continue from the checkpoint of this step, with --resume. Later checkpoints are archived,
    later records removed."""
    inline: bool = False
    """Run every role in this process, without Ray."""
    dry_run: bool = False
    """Print problems, the configuration and the placement, and stop."""


@dataclass(frozen=True, kw_only=True)
class RemoteArguments:
    """The options that restoring a lost run directory needs."""

    output: OutputConfig = field(default_factory=OutputConfig)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Tune an autoregressive image policy with reinforcement learning.

    Without arguments: the miniature, real digits on the CPU, in a few minutes.
    """

    command: Annotated[Command, tyro.conf.arg(name="")] = field(default_factory=Command)
    run: Annotated[RunConfig, tyro.conf.arg(name="")] = field(default_factory=RunConfig)


def parse(arguments: list[str] | None = None) -> tuple[Command, RunConfig, RunTarget]:
    """Parse the command line; returns also the validated configuration and the run directory.

    Raises:
        ConfigError: unknown preset, impossible value, nothing to resume.
        SystemExit: --help, or an unknown option (the message names the nearest one).
    """
    command, _ = tyro.cli(
        Command,
        args=arguments,
        default=Command(preset=""),
        return_unknown_args=True,
        add_help=False,
    )
    preset = command.preset  # empty, where none is named
    command = replace(command, preset=preset or DEFAULT_PRESET)
    if asks_help(arguments):
        options = Command(), load_preset(command.preset)
        arguments = answer_help(arguments, command_of("learner.run"), ABOUT, COMMON, *options)
    if command.from_step is not None and not command.resume:
        raise ConfigError("--from-step is an option of --resume: add --resume")
    remote, _ = tyro.cli(RemoteArguments, args=arguments, return_unknown_args=True, add_help=False)
    target = choose_run(
        command.run_dir,
        resume=command.resume,
        auto_resume=command.auto_resume,
        url=remote.output.checkpoint_url,
    )
    config = with_flags(arguments, command, target.saved or load_preset(command.preset))
    config = replace(config, rewards=config.rewards.with_files())
    if target.saved:
        check_resume(target.saved, config)
        if preset:  # a named preset must be the run's
            named = with_flags(arguments, command, load_preset(preset))
            kept = replace(named.rewards, files=target.saved.rewards.files)
            check_resume(target.saved, replace(named, rewards=kept))
    return command, config, target


def with_flags(arguments: list[str] | None, command: Command, base: RunConfig) -> RunConfig:
    """`base` with the options of the command line.

    Raises:
        ConfigError: an impossible value.
        SystemExit: an unknown option.
    """
    try:
        parsed = tyro.cli(
            Arguments,
            args=arguments,
            default=Arguments(command=command, run=base),
            prog=command_of("learner.run"),
        )
    except ValueError as error:  # of a dataclass's own check
        raise ConfigError(f"command line: {error}") from None
    return validate(to_dict(parsed.run), "command line")


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    console = make_console()
    with logs.to_console(console):
        return _main(arguments, console)


def _main(arguments: list[str] | None, console: Console) -> int:
    with ExitStack() as owned:
        try:
            command, config, target = parse(arguments)
            if config.reproducible:  # before the checks, which may look at the GPU
                deterministic_environment()
            found = preflight(config, begun=target.begun)
            if not command.inline:
                with found.of("ray"):
                    check_ray(config.ray)
            if command.dry_run:
                return dry_run(config, found, command.inline)
            found.enforce()
            stop = StopFlag()
            owned.enter_context(signal_handler(stop.handle))
            start = owned.enter_context(ExitStack())
            start.callback(stop.begin)
            if not command.inline:  # before any thread that Ray's handlers could interrupt
                start.enter_context(deferred_signals())
            run = owned.enter_context(target.acquire(config))
            if command.from_step is not None:  # before the fleet starts
                CheckpointStore(run, config).at(command.from_step)
        except (TesseraError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return REFUSED
        notes = listed(found)
        return carry_out(
            command, config, run, console, stop, start.close, notes, arguments, target.begun
        )


def carry_out(
    command: Command,
    config: RunConfig,
    run: RunDirectory,
    console: Console,
    stop: StopFlag,
    started: Callable[[], None],
    notes: Sequence[str] = (),
    arguments: Sequence[str] | None = None,
    begun: bool = False,
) -> int:
    """Start the fleet, run the experiment and write the report; returns the exit status.

    Args:
        started: called when the fleet has started.
        notes: lines to log first.
        arguments: of the command line, for the records; None: the process's.
        begun: the run resumes a checkpoint.
    """
    with (
        safe_streams(output_is_all=False),
        logs.to_file(run.log),
        RunConsole(config.iterations, console) as shown,
    ):
        try:
            for line in notes:
                logger.info(line)
            record(command, config, run, arguments)
            finished = run_on_fleet(command, config, run, shown, stop, started, begun)
            if finished:
                return 0
            conclude(run, "stopped")
            if not run.has_results():
                logger.info(run.exit_message())
            return INTERRUPTED
        except LockLostError as error:  # the directory is another process's now
            logger.error(f"error: {error}")
            return FAILED
        except TesseraError as error:
            logger.error(f"error: {error}")
            _conclude_failed(run, str(error))
            logger.info(run.exit_message())
            return FAILED
        except KeyboardInterrupt:
            conclude(run, "stopped", "at once", report=False)
            logger.info(f"stopped at once; {run.exit_message()}")
            return INTERRUPTED
        except Exception as error:
            logs.log_unexpected(error)  # first: the process may be killed meanwhile
            _conclude_failed(run, f"{type(error).__name__}: {error}")
            raise


def _conclude_failed(run: RunDirectory, detail: str) -> None:
    """As `conclude`; a signal leaves the report out, and the run has failed all the same."""
    try:
        conclude(run, "failed", detail)
    except KeyboardInterrupt:
        logger.info("the report was left out, as asked")


def run_on_fleet(
    command: Command,
    config: RunConfig,
    run: RunDirectory,
    console: RunConsole,
    stop: StopFlag,
    started: Callable[[], None],
    begun: bool,
) -> bool:
    """Open loggers and fleet, and run the experiment; returns whether it came to its end."""
    ray = None if command.inline else config.ray
    plan, need = fleet_plan(config), store_need(config)
    with (
        open_loggers(config, run, command.from_step, begun=begun) as loggers,
        open_fleet(plan, need, run.path, stop, ray) as fleet,
    ):
        started()
        finished = Experiment(
            config,
            run,
            fleet,
            console,
            stop,
            command.from_step,
            lambda: stop.checkpoint,
            loggers,
        ).run()
        if not finished:  # before fleet and loggers close: the process may be killed meanwhile
            note_end(run, "stopped")
        return finished


def record(
    command: Command, config: RunConfig, run: RunDirectory, arguments: Sequence[str] | None
) -> None:
    """Record a start, and log it."""
    logger.info(starting(command, config))
    for line in changed_since(config.rewards.files):
        logger.warning(f"note: {line}")
    nodes = [local_node()] if command.inline else nodes_of(config)
    record_start(run, arguments, fleet_plan(config), nodes, inline=command.inline)


def nodes_of(config: RunConfig) -> list[Node]:
    """Nodes of the cluster that a run joins; none if it does not answer, which the fleet's start
    explains."""
    try:
        return free_nodes(config.ray)
    except TesseraError:
        return []


def starting(command: Command, config: RunConfig) -> str:
    """The first log message: which roles are starting."""
    if command.inline:
        return "starting: every role in this process"
    plan = fleet_plan(config)
    samplers, servers = plan.sampler.count, sum(role.count for role in plan.servers)
    learners = plan.learner.count
    return (
        f"starting: {samplers} sampler{'s' * (samplers > 1)}, {servers} reward "
        f"server{'s' * (servers > 1)}, a moments server and "
        f"{f'{learners} learners' if learners > 1 else 'a learner'}, on Ray"
    )


def dry_run(config: RunConfig, found: Findings, inline: bool) -> int:
    """Print problems, configuration and placement; returns the exit status, which does not depend
    on the resources of this machine."""
    try:
        nodes = [local_node()] if inline else free_nodes(config.ray)
    except TesseraError:  # is among the problems
        nodes = [local_node()]
    for line in listed(found):
        print(f"# {line}")
    print(dump(config))
    where = str(nodes[0]) if len(nodes) == 1 else f"the {len(nodes)} nodes of the cluster"
    print(f"# placement on {where}")
    for line in placement_lines(fleet_plan(config), nodes):
        print(f"#   {line}")
    try:
        found.enforce()
    except ConfigError as error:  # again: the first lines have scrolled away
        print(f"error: {error}", file=sys.stderr)
        return REFUSED
    return 0
