"""The command line of a run in deployment files, and its way through the shells before it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence

from cluster.deploy.plan_document import LEARNER, REWARD_SERVER, SAMPLER, PlanDocument
from cluster.deploy.target import DeployOptions
from cluster.errors import ConfigError

ROLE_LABEL = "tessera-role"
"""Label of Ray nodes: the role whose workers run there."""
SPECIAL = "$`'&|;<>()*?[]{}~!#"
"""What a shell reads outside of quotes as more than itself, but for spaces and double quotes."""
OPTION_OF = {LEARNER: "learner", SAMPLER: "sampler", REWARD_SERVER: "reward"}
"""Role -> its section of learner.run's options. Pools are set in a preset, and so are theirs."""


def run_arguments(
    plan: PlanDocument,
    options: DeployOptions,
    run_dir: str,
    labels: Mapping[str, str],
    preset: str = "",
) -> list[str]:
    """Arguments of `python -m learner.run` that start the run or resume it.

    Args:
        run_dir: as the nodes see it.
        labels: role -> value of `tessera-role` on the nodes that are to run it.
        preset: where the nodes find the preset, if not by the plan's own name.

    Raises:
        ConfigError: a pool of reward servers does not select its nodes: options name no pools.
    """
    arguments = list(plan.arguments)
    if "--preset" not in arguments:
        arguments = ["--preset", plan.preset, *arguments]
    if preset:
        arguments[arguments.index("--preset") + 1] = preset
    arguments += ["--run-dir", run_dir, "--auto-resume"]
    if options.checkpoint_url:
        arguments += ["--output.checkpoint-url", options.checkpoint_url]
    for role, value in labels.items():
        if role in OPTION_OF:
            arguments += [f"--{OPTION_OF[role]}.labels", f"{ROLE_LABEL}={value}"]
        elif plan.role(role).labels.get(ROLE_LABEL) != value:
            pool = role.removeprefix("reward-")
            raise ConfigError(
                f"the servers of the pool {pool!r} might run on the nodes of other roles: write "
                f"reward_pools: {{{pool}: {{labels: {{{ROLE_LABEL}: {value}}}}}}} into the preset, "
                "a YAML file"
            )
    if options.plan is not None:  # a plan that was made here has them already
        arguments += options.run_arguments
    return arguments


def for_job_submit(arguments: Sequence[str]) -> str:
    """A command as text for `ray job submit -- TEXT` in a shell script.

    Two shells read it. Between them `ray job submit` joins the words by the rules of Windows'
    command lines (`subprocess.list2cmdline`): words with spaces get double quotes, and a double
    quote gets a backslash.

    Raises:
        ConfigError: an argument has a line break.
    """
    for argument in arguments:
        if any(letter in argument for letter in "\n\r\0"):
            raise ConfigError(f"an option of several lines is no option of a job: {argument!r}")
    return shlex.join(map(_for_second_shell, arguments))


def _for_second_shell(argument: str) -> str:
    """A word that the second shell reads as the argument."""
    quoted = not argument or " " in argument or "\t" in argument
    special = "$`" if quoted else SPECIAL
    # list2cmdline doubles backslashes before a double quote, and those before the end of a
    # quoted word
    own = r'(\\+)(?!["\\]|\Z)' if quoted else r'(\\+)(?!["\\])'
    doubled = re.sub(own, lambda found: found[1] * 2, argument)
    return "".join("\\" + letter if letter in special else letter for letter in doubled)
