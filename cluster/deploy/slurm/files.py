"""Files of a Slurm job: `run.sbatch`, its settings above `job.sh`, and `beside`."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.deploy.checks import check, check_least, flag
from cluster.deploy.groups import store_of
from cluster.deploy.plan_document import PlanDocument
from cluster.deploy.run_command import run_arguments
from cluster.deploy.target import DeployOptions, Several, Target
from cluster.errors import ConfigError

HERE = Path(__file__).parent
SCRIPT, BESIDE = "run.sbatch", "beside"
TIME = re.compile(r"\d+(:\d\d?){0,2}|\d+-\d\d?(:\d\d?){0,2}")
NAME = re.compile(r"[\w.@+-]+(,[\w.@+-]+)*", re.ASCII)
DEVICE = re.compile(r"[\w.@:-]{1,15}", re.ASCII)
STATE = '"$HOME/.tessera"'
RUN_DIR = "$RUN_DIR"
CPUS_PER_GPU = 6
SYSTEM_BYTES = 4 << 30
"""Host memory for Ray's own processes and the driver's imports."""
SPARE_MEMORY = 1.25
WARNING_S, LONGEST_WARNING_S = 300, 65535  # Slurm's own bound
ITERATIONS_BEFORE_THE_END = 3
CHECKPOINT_BYTES_PER_S = 100e6
"""Of slow shared storage."""


@dataclass(frozen=True, kw_only=True)
class SlurmOptions(DeployOptions):
    """Write a Slurm job for one node or many, requeued before its time limit to resume."""

    gpus_per_node: int = 8
    """GPUs of a node."""
    nodes: int = 0
    """Number of nodes; 0: as many as the GPUs need, one without GPUs."""
    cpus_per_node: int = 0
    """CPUs of a node for the job; 0: as many as the plan's workers ask for, at least 6 a GPU."""
    time: str = "24:00:00"
    """Time limit of one start, as sbatch takes it."""
    partition: str = ""
    """Partition to run in; empty: Slurm's default."""
    account: str = ""
    """Account to charge; empty: Slurm's default."""
    setup: Several = ()
    """Lines of bash that every process runs first, each with its own --setup: "module load cuda",
    ". /shared/venv/bin/activate"."""
    step: str = ""
    """What starts processes in a container: "apptainer exec --nv /shared/tessera.sif", or options
    of srun (pyxis): "--container-image=/shared/tessera.sqsh --container-mounts=/shared"."""
    interface: str = ""
    """Network device between the nodes, such as ib0; empty: Ray's choice, the default route's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, gpus_per_node=1, nodes=0, cpus_per_node=0)
        _check("time", self.time, TIME, "a time as sbatch takes it: 24:00:00, 90 or 2-12")
        for field in ("partition", "account"):
            if value := getattr(self, field):
                _check(field, value, NAME, "a name of letters, digits and ._@+-")
        if self.interface:
            _check("interface", self.interface, DEVICE, "a network device, such as ib0")
        for line in self.setup:
            if "\n" in line:
                raise ValueError(f"--setup must be one line each, found {line!r:.80}")
        try:
            shlex.split(self.step)
        except ValueError as error:
            raise ValueError(
                f"--step is not one command line: {error}: {self.step!r:.80}"
            ) from None
        if self.nodes and self.nodes * self.gpus_per_node < self.gpus:
            raise ValueError(
                f"--nodes {self.nodes} with --gpus-per-node {self.gpus_per_node} have fewer GPUs "
                f"than --gpus {self.gpus}"
            )


def _check(field: str, value: str, pattern: re.Pattern[str], expected: str) -> None:
    check(flag(field), value, bool(pattern.fullmatch(value)), expected)


def number_of_nodes(plan: PlanDocument, options: SlurmOptions) -> int:
    """Nodes of the job, for the GPUs that the plan uses."""
    return options.nodes or max(math.ceil(plan.gpus / options.gpus_per_node), 1)


def gpus_of_a_node(plan: PlanDocument, options: SlurmOptions) -> int:
    """GPUs that the job asks of each node: what it needs, on all nodes the same."""
    return math.ceil(plan.gpus / number_of_nodes(plan, options))


def cpus_of_a_node(plan: PlanDocument, options: SlurmOptions) -> int:
    """CPUs that the job asks of each node, the driver's included."""
    if options.cpus_per_node:
        return options.cpus_per_node
    asked = sum(role.count * role.num_cpus for role in plan.roles)
    needed = math.ceil(asked / number_of_nodes(plan, options))
    return max(needed, CPUS_PER_GPU * gpus_of_a_node(plan, options), 2)


def memory_of_a_node(plan: PlanDocument, options: SlurmOptions) -> str:
    """Value of --mem. Which workers meet on a node of several is Ray's choice, so there all of its
    memory is taken."""
    if number_of_nodes(plan, options) > 1:
        return "0"
    workers = sum(role.count * role.memory_bytes for role in plan.roles)
    total = SPARE_MEMORY * workers + store_of(plan) + SYSTEM_BYTES
    return f"{math.ceil(total / 2**30)}G"


def warning_s(plan: PlanDocument) -> int:
    """Seconds before the time limit at which the run is asked to stop: for the iteration that is
    under way, and a checkpoint."""
    needed = ITERATIONS_BEFORE_THE_END * (plan.iteration_s or 0)
    needed += 60 + plan.checkpoint_bytes / CHECKPOINT_BYTES_PER_S
    return min(max(WARNING_S, math.ceil(needed / 60) * 60), LONGEST_WARNING_S)


def files(plan: PlanDocument, options: SlurmOptions) -> Mapping[str, str]:
    """The job's script and the one for commands beside it, by name.

    Raises:
        ConfigError: a worker needs more GPUs than a node has.
    """
    for role in plan.workers:
        if role.num_gpus > options.gpus_per_node:
            raise ConfigError(
                f"a {role.name} takes {role.num_gpus:g} GPUs, but --gpus-per-node is "
                f"{options.gpus_per_node}: no worker spans nodes"
            )
    body = (HERE / "job.sh").read_text(encoding="utf-8")
    beside = (HERE / "beside.sh").read_text(encoding="utf-8")
    return {
        SCRIPT: "\n".join(
            ["#!/usr/bin/env bash", directives(plan, options), settings(plan, options), body]
        ),
        BESIDE: beside.replace("set -euo pipefail\n", f"set -euo pipefail\nSTATE={STATE}\n", 1),
    }


def directives(plan: PlanDocument, options: SlurmOptions) -> str:
    """Lines for sbatch; its command line takes precedence."""
    wanted = {
        "job-name": options.name,
        "partition": options.partition,
        "account": options.account,
        "nodes": number_of_nodes(plan, options),
        "ntasks-per-node": 1,
        "cpus-per-task": cpus_of_a_node(plan, options),
        "gpus-per-node": gpus_of_a_node(plan, options),
        "mem": memory_of_a_node(plan, options),
        "time": options.time,
        "signal": f"B:USR1@{warning_s(plan)}",
        "output": f"{options.name}-%j.out",
        "open-mode": "append",
    }
    lines = [f"#SBATCH --{name}={value}\n" for name, value in wanted.items() if value]
    return "".join([*lines, "#SBATCH --requeue\n"])


def settings(plan: PlanDocument, options: SlurmOptions) -> str:
    """What a site may change."""
    run_dir = shlex.quote(options.run_dir) if options.run_dir else f'"$PWD/runs/{options.name}"'
    store = store_of(plan) if plan.object_store_bytes else ""
    setup = "".join(f"    {line}\n" for line in options.setup or (":",))
    return f"""\
# ---- settings ---------------------------------------------------------------------------------
# shellcheck disable=SC1091,SC2317  # files of the site; functions that steps and traps call
RUN_DIR={run_dir}  # on storage that all nodes share
# An array job is one run a seed: sbatch --array=0-4 {SCRIPT}
RUN_DIR+=${{SLURM_ARRAY_TASK_ID:+/seed-$SLURM_ARRAY_TASK_ID}}
ARGUMENTS=({_lines(run_arguments(plan, options, RUN_DIR, {}, options.preset_path))})
setup() {{ # every process runs this first, on its node
{setup}}}
STEP=({shlex.join(shlex.split(options.step))})  # a container: apptainer ..., or options of srun
INTERFACE={shlex.quote(options.interface)}  # network device between the nodes; empty: Ray's choice
STATE={STATE}  # for the job's token: a directory of yours that all nodes share
OBJECT_STORE_BYTES={store}  # of each node; empty: Ray's choice
JOIN_S=300  # longest wait for the nodes, seconds
"""


def _lines(words: Sequence[str]) -> str:
    """Words of a bash array, an option with its values a line."""
    text = ""
    for word in words:
        text += "\n    " if word.startswith("--") else " "
        text += f'"{RUN_DIR}"' if word == RUN_DIR else shlex.quote(word)
    return text + "\n"


def next_steps(plan: PlanDocument, options: SlurmOptions) -> str:
    """What to do with the files."""
    place = options.out
    return (
        f"submit    sbatch {place / SCRIPT}    (one run a seed: --array=0-4)\n"
        f"watch     {place / BESIDE} JOB python -m cluster.status\n"
        f"stop      {place / BESIDE} JOB python -m cluster.stop --checkpoint    (scancel loses "
        "what came after the newest checkpoint)"
    )


SLURM = Target(
    name="slurm",
    about="a Slurm job for one node or many",
    options=SlurmOptions,
    files=files,
    checked="Run with Slurm 22.05 on CPU nodes; not run with GPUs.",
    next_steps=next_steps,
)
