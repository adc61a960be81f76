"""Evaluation of policies and images: `python -m learner.evaluate runs/NAME`.

Samples base and tuned policy on the same random numbers on a fleet, keeps features and tokens, and
computes the figures with intervals. `--compare A B` compares two rows.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    import sys

    from cluster.program.start import run_command

    sys.exit(run_command("learner.evaluate"))

import logging
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from rich.console import Console

from actors.checkpoints.loading import weightless_policy
from actors.checkpoints.sources import planned_policy, planned_tokenizer
from actors.models.base import PolicyArchitecture
from actors.preflight import check_models, image_side
from cluster.errors import ConfigError, StopRequestedError, TesseraError
from cluster.fleet import Fleet
from cluster.io.locks import locked
from cluster.io.paths import output_path
from cluster.io.run_layout import CAPTIONS
from cluster.open_fleet import open_fleet
from cluster.placement.nodes import Node
from cluster.preflight import Findings
from cluster.program import logs
from cluster.program.console import FAILED, INTERRUPTED, REFUSED, make_console
from cluster.program.invocation import command_of
from cluster.program.precision import deterministic_environment
from cluster.program.signals import StopFlag, deferred_signals, signal_handler
from cluster.ray_session.session import check_ray, free_nodes, local_node
from learner.capacity.budget import budget_of
from learner.capacity.cards import DEFAULT_CARD, card_named, recognised, this_gpu
from learner.capacity.storage import sampling_need
from learner.capacity.workload import Models
from learner.config import RunConfig
from learner.evaluation.benchmarks.run import BenchmarkRun
from learner.evaluation.comparison import (
    compare_sides,
    find_side,
    show_comparison,
    write_comparison,
)
from learner.evaluation.evaluation import LOG, Evaluation, Outputs, check_out
from learner.evaluation.held_out import GROUP
from learner.evaluation.kept.samples import SAMPLES, kept_images
from learner.evaluation.options import MODULE, Command, Job, parse
from learner.evaluation.preflight import check_evaluation
from learner.evaluation.results import show
from learner.evaluation.rows import Row
from learner.fleet_plan import fleet_plan, sampling_plan, scoring_plan
from learner.preflight import check_conditions, listed, placement_lines
from rewards.metrics.evaluation import MetricSettings

logger = logging.getLogger(__name__)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    console = make_console()
    with logs.to_console(console), ExitStack() as owned:
        try:
            job = parse(arguments)
            if isinstance(job, Command):
                return _compare(job, console, owned)
            if job.config.reproducible:
                deterministic_environment()
            found = findings_of(job)
            if job.command.dry_run:
                return dry_run(job, found)
            found.enforce()
            check_out(job.out)
            owned.enter_context(locked(job.out, f"--out {job.out}"))
            check_out(job.out)  # again, now that it is locked
            evaluation = Evaluation(*_with_captions(job), job.out, job.benchmark)
        except (TesseraError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return REFUSED
        owned.enter_context(logs.to_file(job.out / LOG))
        for line in listed(found):
            logger.info(line)
        return carry_out(job, evaluation, console, arguments)


def findings_of(job: Job) -> Findings:
    """What is missing, of all rows."""
    found = Findings()
    side = 0
    waiting = [row for row in job.rows if row.spec]
    while waiting:
        config = job.configs[waiting[0].name]
        policies = [row for row in waiting if job.configs[row.name] == config]
        waiting = [row for row in waiting if row not in policies]
        policy, tokenizer = check_models(config.policy, config.tokenizer, found)
        side = side or image_side(policy, tokenizer)
        if job.benchmark is not None:
            _check_prompts(job.benchmark, config, policy, found)
        else:
            check_conditions(config, policy, found)
        guided = next((row for row in policies if row.spec and row.spec.guided_sampling), None)
        classes = policy is not None and policy.conditioning == "class" and not job.benchmark
        if guided is not None and policy is not None and classes:
            with found.of(f"{guided.name}"):
                module = weightless_policy(policy)
                module.null_conditions(module.encode(config.conditions.conditions()[:1]))
    check_evaluation(job.config, side, found)
    _check_counts(job, found)
    if any(row.spec for row in job.rows) and job.config.sampler.max_groups > 1:
        found.notes.append(
            f"sampler.max_groups is {job.config.sampler.max_groups}: which groups are decoded "
            "together depends on timing, so that an evaluation that was killed and continued is "
            "not bit for bit the same; --sampler.max-groups 1 makes it so"
        )
    for name in dict.fromkeys(row.spec.guidance_note for row in job.rows if row.spec):
        found.notes += [f"--cfg-scales: {name}"] if name else []
    if not job.command.inline:
        with found.of("ray"):
            check_ray(job.config.ray)
    found.problems = list(dict.fromkeys(found.problems))
    return found


def _check_counts(job: Job, found: Findings) -> None:
    """Whether there are images enough for the metrics."""
    if job.benchmark is not None:  # of scores alone
        return
    evaluation, splits = job.config.evaluation, job.command.splits
    images, k = evaluation.num_images, evaluation.neighbours
    if evaluation.images and images <= k:
        found.problem(
            "evaluation.num_images",
            f"more than {k} images, for {k} nearest neighbours",
            f"{images}",
            "set --num-images, or fewer --evaluation.neighbours",
        )
    networks = [features.network for features in job.config.judge.spaces().values()]
    if "inception" in networks and images < 2 * splits:
        found.problem(
            "evaluation.num_images",
            f"at least {2 * splits} images, for an Inception Score of {splits} splits",
            f"{images}",
            "set --num-images, or fewer --splits",
        )


def _check_prompts(
    benchmark: BenchmarkRun,
    config: RunConfig,
    policy: PolicyArchitecture | None,
    found: Findings,
) -> None:
    if policy is not None and policy.conditioning != "caption":
        found.problem(
            f"--benchmark {benchmark.name}",
            "a policy of captions",
            f"one of classes ({config.policy.checkpoint})",
            "evaluate a policy like that of --preset llamagen-t2i",
        )
        return
    with benchmark.written(config) as written:
        check_conditions(written, policy, found)


def carry_out(
    job: Job, evaluation: Evaluation, console: Console, arguments: list[str] | None
) -> int:
    """Sample what is missing, and show the results; returns the exit status."""
    stop, about = StopFlag(), _about(job, arguments)
    stop.begin()
    try:
        with signal_handler(stop.handle):
            evaluation.sample(
                lambda config, samples: _fleet(job, config, samples, stop, about["command"])
            )
        evaluation.write_images(Outputs(npz=job.command.npz, png=job.command.png))
        show(evaluation.results(_settings(job), about), console)
        evaluation.write_next()
        logger.info(f"results: {job.out}")
    except (StopRequestedError, KeyboardInterrupt):
        logger.info(f"stopped; {evaluation.left} images are left, go on with\n  {about['command']}")
        return INTERRUPTED
    except (TesseraError, OSError) as error:
        logger.error(f"error: {error}")
        return FAILED
    return 0


def _with_captions(job: Job) -> tuple[RunConfig, Sequence[Row], Mapping[str, RunConfig]]:
    """Configurations with captions encoded, where they need it."""
    if job.benchmark is not None:
        job.benchmark.write_texts(job.benchmark.texts_file(job.out))
    conditions = job.config.conditions.encoded(job.out / CAPTIONS)
    configs = {name: replace(config, conditions=conditions) for name, config in job.configs.items()}
    return replace(job.config, conditions=conditions), job.rows, configs


def group_size(job: Job, config: RunConfig) -> int:
    """Images of the largest request."""
    if job.benchmark is not None:
        return job.benchmark.count
    images, conditions = config.evaluation.num_images, len(config.conditions.conditions())
    return min(GROUP, -(-images // min(images, conditions)))


@contextmanager
def _fleet(
    job: Job, config: RunConfig, samples: bool, stop: StopFlag, again: str
) -> Iterator[Fleet]:
    plan = sampling_plan(config) if samples else scoring_plan(config)
    need = sampling_need(config, plan)
    ray = None if job.command.inline else config.ray
    with ExitStack() as opened:
        with deferred_signals() if ray else ExitStack():
            fleet = opened.enter_context(open_fleet(plan, need, job.out, stop, ray, again))
        yield fleet


def _settings(job: Job) -> MetricSettings:
    return MetricSettings(
        neighbours=job.config.evaluation.neighbours,
        splits=job.command.splits,
        bootstrap=job.command.bootstrap,
        seed=job.config.seed,
    )


def _about(job: Job, arguments: list[str] | None) -> dict[str, Any]:
    """What the results say of themselves, beside the figures."""
    given = sys.argv[1:] if arguments is None else arguments
    config = job.config
    return {
        "command": f"{command_of(MODULE)} {shlex.join(given)}",
        "tessera": version("tessera-rl"),
        **(job.benchmark.about if job.benchmark else {}),
        "real images": config.evaluation.images or "none",
        "images of each policy": config.evaluation.num_images,
        "neighbours": config.evaluation.neighbours,
        "splits": job.command.splits,
        "bootstrap": job.command.bootstrap,
        "seed": config.seed,
    }


def dry_run(job: Job, found: Findings) -> int:
    """Print rows, problems and placement; returns the exit status."""
    config = job.config
    print(f"results: {job.out}")
    for row in job.rows:
        checkpoint = job.configs[row.name].policy.checkpoint if row.spec else row.target.images
        done = kept_images(job.out / SAMPLES / row.folder)
        print(f"  {row.name}: {checkpoint}{f', {done} images are there' if done else ''}")
    real = f", against {config.evaluation.images}" if config.evaluation.images else ""
    print(f"{config.evaluation.num_images} images of each policy{real}")
    if estimate := sampling_estimate(job):
        print(estimate)
    for line in listed(found):
        print(line)
    print("workers:")
    for line in placement_lines(sampling_plan(config), _nodes(job)):
        print(f"  {line}")
    try:
        found.enforce()
        check_out(job.out)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED
    return 0


def sampling_estimate(job: Job) -> str:
    """Time of sampling on GPUs, by arithmetic; empty if there is nothing to estimate."""
    hours, card = 0.0, recognised(*this_gpu()) or card_named(DEFAULT_CARD)
    for row in job.rows:
        config = job.configs[row.name]
        if row.spec is None or not config.sampler.num_gpus:
            continue
        size, images = group_size(job, config), config.evaluation.num_images
        groups = fleet_plan(config).sampler.groups_in_call(size * row.spec.rows)
        try:
            alone = replace(  # one iteration of all images
                config,
                sampling=row.spec,
                sampler=replace(config.sampler, max_groups=1 << (groups.bit_length() - 1)),
                learner=replace(config.learner, num_gpus=0.0),
                groups_per_iteration=-(-images // size),
                rollouts_per_group=size,
            )
            models = Models(
                planned_policy(config.policy.source()), planned_tokenizer(config.tokenizer.source())
            )
            hours += budget_of(alone, models, card).sampling / 3600
        except (TesseraError, ValueError):  # of models that are not here: among the problems
            return ""
    if not hours:
        return ""
    return (
        f"about {60 * hours:.2g} minutes of sampling on {card.name}, by arithmetic, not measured; "
        "the judge's networks are not counted, and may take longer"
    )


def _nodes(job: Job) -> list[Node]:
    try:
        return [local_node()] if job.command.inline else free_nodes(job.config.ray)
    except TesseraError:  # is among the problems
        return [local_node()]


def _compare(command: Command, console: Console, owned: ExitStack) -> int:
    """--compare: from kept samples alone."""
    if len(command.compare) != 2:
        raise ConfigError(f"--compare takes two rows, found {len(command.compare)}")
    out = output_path(command.out, "--out") if command.out else None
    if out is not None:
        check_out(out)
    first, second = (find_side(name, out) for name in command.compare)
    if out is not None:
        owned.enter_context(locked(out, f"--out {out}"))
        check_out(out)  # again, now that it is locked
    comparison = compare_sides(first, second, command.bootstrap)
    show_comparison(comparison, console)
    if out is not None:
        write_comparison(out, comparison)
        console.print(f"comparison: {out}")
    return 0
