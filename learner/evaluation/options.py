"""Options of `learner.evaluate`, and what a command line means: rows, configurations, directory."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from actors.checkpoints.loading import TokenizerConfig
from actors.sampler import SamplerResources
from cluster.errors import ConfigError
from cluster.io.paths import expand_user, output_path
from cluster.io.run_layout import CONFIG
from cluster.messages import SamplingSpec
from cluster.placement.config import PlacementConfig
from cluster.program.help import answer_help, asks_help
from cluster.program.invocation import command_of
from cluster.ray_session.session import RayConfig
from cluster.roles import QuotaConfig
from learner.config import DEFAULT_PRESET, RunConfig, load_preset, to_dict, validate
from learner.data.conditions import ConditionsConfig
from learner.evaluation.benchmarks.run import BenchmarkOptions, BenchmarkRun
from learner.evaluation.evaluation import config_of
from learner.evaluation.rows import Row, rows_of
from learner.evaluation.targets import PolicyOptions, Target, find_targets
from learner.output import EvaluationConfig, OutputConfig
from rewards.config import JudgeConfig, RewardServerResources
from rewards.metrics.evaluation import MetricSettings
from rewards.networks.features import FeaturesConfig

MODULE = "learner.evaluate"
ABOUT = (
    "Evaluate policies and images: FID, precision, recall, scores and more, with intervals. WHAT "
    "is a run directory, a checkpoint, a model by name or file, or images (.npz, folder); several "
    "are evaluated side by side, policies on the same random numbers. The same command continues "
    "one that was stopped or killed."
)
COMMON = {
    "what to evaluate, before the options": ("--preset", "--step", "--num-images"),
    "how policies are sampled": ("--cfg-scales", "--samplings", "--seed"),
    "where, and how": ("--out", "--npz", "--png", "--dry-run", "--inline"),
    "workers": ("--num-samplers", "--num-reward-servers", "--sampler.num-gpus",
                "--reward.num-gpus", "--ray.address"),
    "what is measured": ("--evaluation.images", "--evaluation.neighbours", "--bootstrap",
                         "--judge.clip.model"),
    "text to image": ("--benchmark", "--prompts"),
    "two rows": ("--compare",),
}  # fmt: skip
"""What --help shows; --help-all shows every option."""


@dataclass(frozen=True, kw_only=True)
class Command(PolicyOptions, BenchmarkOptions):
    """Options that are no settings of a run."""

    preset: str = ""
    """Shipped preset by name, or a YAML file by path. It says judge, conditions, tokenizer and real
    images. Default: the configuration of the run."""
    num_images: int | None = None
    """Images of each row, equally many of each condition (rounded up); as --evaluation.num-images.
    Default: the configuration's."""
    cfg_scales: tuple[float, ...] = ()
    """Guidance scales of every policy, 1 is none. Default: the configured sampling; of base
    policies also the scales of --evaluation.cfg-scales."""
    samplings: tuple[str, ...] = ()
    """Samplings of every policy, as in temperature=0.9,top_k=2000 top_p=0.95. The names are
    temperature, top_k and top_p; what is not named stays as configured."""
    out: str = ""
    """Directory of the results and of the kept samples. Default: evaluation/ in the run directory,
    else evaluations/NAME."""
    npz: bool = False
    """Write images/ROW.npz for the ADM evaluator. arr_0 (N, H, W, 3) uint8 holds the images, in a
    fixed random order, and arr_1 (N,) their classes."""
    png: bool = False
    """Write each image to images/ROW/."""
    bootstrap: int = MetricSettings().bootstrap
    """Resamples behind the 95 % intervals; 0: no intervals."""
    splits: int = MetricSettings().splits
    """Parts of the images whose Inception Scores are averaged; 10 of 50,000 images are the ADM
    evaluator's."""
    compare: tuple[str, ...] = ()
    """Compare two evaluated rows, with the settings that they were evaluated with. Each is a
    directory of kept samples (DIR/samples/ROW), an evaluation with one row, or with --out DIR the
    name of a row in it."""
    inline: bool = False
    """Run every role in this process, without Ray."""
    dry_run: bool = False
    """Print what would be sampled, problems and the placement, and stop."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a run's configuration that evaluations read."""

    num_samplers: int = 2
    """Number of samplers."""
    num_reward_servers: int = 1
    """Number of reward servers."""
    seed: int = 0
    """Seed of all random numbers."""
    reproducible: bool = False
    """Results that depend on settings and seed alone on GPUs too, of one kind."""
    timeout_s: float = 600.0
    """Longest wait for one answer of a worker, seconds."""
    heartbeat_s: float = 60.0
    """Seconds without a heartbeat after which a worker counts as lost; 0: only --timeout-s."""
    max_restarts: int = 3
    """Replacements of one worker within an hour before the evaluation stops."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    conditions: ConditionsConfig = field(default_factory=ConditionsConfig)
    sampling: SamplingSpec = field(default_factory=SamplingSpec)
    sampler: SamplerResources = field(default_factory=SamplerResources)
    reward: RewardServerResources = field(default_factory=RewardServerResources)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    quota: QuotaConfig = field(default_factory=QuotaConfig)

    @classmethod
    def of(cls, config: RunConfig) -> Settings:
        return cls(**{item.name: getattr(config, item.name) for item in fields(cls)})


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Evaluate policies and images."""

    command: Annotated[Command, tyro.conf.arg(name="")] = field(default_factory=Command)
    run: Annotated[Settings, tyro.conf.arg(name="")] = field(default_factory=Settings)
    late: tyro.conf.Positional[tuple[str, ...]] = ()
    """WHAT, before all options."""


@dataclass(frozen=True, kw_only=True)
class Comparing:
    """Those of `Command` that --compare reads."""

    compare: tuple[str, ...] = ()
    out: str = Command.out
    bootstrap: int = Command.bootstrap


@dataclass(frozen=True)
class Job:
    """A parsed command line."""

    command: Command
    config: RunConfig
    rows: Sequence[Row]
    configs: Mapping[str, RunConfig]
    """By name of the row, with its policy."""
    out: Path
    benchmark: BenchmarkRun | None = None


def parse(arguments: list[str] | None) -> Command | Job:
    """Parse the command line; of --compare, only its options.

    Raises:
        ConfigError: nothing to evaluate, impossible values.
        SystemExit: --help, or an unknown option.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    end = next((at for at, word in enumerate(given) if word.startswith("-")), len(given))
    what, options = given[:end], given[end:]
    command, _ = tyro.cli(Command, args=options, return_unknown_args=True, add_help=False)
    prog = command_of(MODULE)
    if asks_help(given):
        base = Settings.of(load_preset(command.preset or DEFAULT_PRESET))
        options = answer_help(options, f"{prog} WHAT...", ABOUT, COMMON, Command(), base)
        tyro.cli(Arguments, args=options, default=Arguments(run=base), prog=prog)
    if command.compare:
        if what:
            raise ConfigError(f"--compare takes its two rows itself: leave {' '.join(what)} out")
        return _comparing(options)
    base_config, targets = find_targets(what, command.preset, command)
    parsed = _parsed(options, Arguments(command=command, run=Settings.of(base_config)), prog)
    out, benchmark = _out(parsed.command, what, targets), BenchmarkRun.of(parsed.command)
    config = _configured(base_config, parsed, benchmark, out)
    rows = rows_of(targets, config, parsed.command.cfg_scales, parsed.command.samplings)
    if benchmark is not None and (given := [row.name for row in rows if row.spec is None]):
        raise ConfigError(
            f"--benchmark {benchmark.name} samples policies, and {', '.join(given)} holds images: "
            "leave it out"
        )
    own = config.tokenizer == base_config.tokenizer  # else --tokenizer says another one
    configs = {row.name: config_of(config, row.target, own_tokenizer=own) for row in rows}
    return Job(parsed.command, config, rows, configs, out, benchmark)


def _comparing(options: list[str]) -> Command:
    """The options of --compare.

    Raises:
        ConfigError: others are there, which it would not read.
    """
    found, others = tyro.cli(Comparing, args=options, return_unknown_args=True, add_help=False)
    if others:
        raise ConfigError(
            "--compare reads --out and --bootstrap alone; all else is as in the evaluations of its "
            f"rows: leave {' '.join(others)} out, or evaluate them again with it"
        )
    return Command(compare=found.compare, out=found.out, bootstrap=found.bootstrap)


def _parsed(options: list[str], default: Arguments, prog: str) -> Arguments:
    try:
        parsed = tyro.cli(Arguments, args=options, default=default, prog=prog)
    except ValueError as error:  # of a dataclass's own check
        raise ConfigError(f"command line: {error}") from None
    if parsed.late:
        raise ConfigError(
            f"name what to evaluate before the options: {prog} {' '.join(parsed.late)} ..."
        )
    return parsed


def _configured(
    base: RunConfig, parsed: Arguments, benchmark: BenchmarkRun | None, out: Path
) -> RunConfig:
    """The configuration of an evaluation: without rewards and what learns."""
    settings = parsed.run
    shipped: dict[str, Any] = {
        name: replace(term, enabled=False, pool="")
        for name, term in base.rewards.scorers().items()
        if hasattr(base.rewards, name)
    }
    rewards = replace(
        base.rewards,
        **shipped,
        extra=(),
        files={},
        features=FeaturesConfig(network="pixels"),  # no network, which no reward needs here
        features_pool="",
        loo_fid=replace(base.rewards.loo_fid, weight=0.0),
        further={},
    )
    taken = {item.name: getattr(settings, item.name) for item in fields(settings)}
    taken["evaluation"] = replace(settings.evaluation, every=0, patience=0)  # of training
    changed = replace(base, **taken, rewards=rewards, reward_pools={}, output=OutputConfig())
    if (count := parsed.command.num_images) is not None:
        if benchmark is not None:
            raise ConfigError(
                "--num-images: a benchmark has as many as its prompts times "
                "--images-per-prompt: leave it out"
            )
        changed = replace(changed, evaluation=replace(changed.evaluation, num_images=count))
    if benchmark is not None:
        changed = benchmark.configured(changed, benchmark.texts_file(out))
    config = validate(to_dict(changed), "command line")
    if config.evaluation.num_images < 1:
        raise ConfigError("evaluation.num_images is 0: say how many with --num-images")
    return config


def _out(command: Command, what: Sequence[str], targets: Sequence[Target]) -> Path:
    if command.out:
        return output_path(command.out, "--out")
    first = expand_user(what[0]) if what else None
    if first is not None and (first / CONFIG).is_file():
        return first / "evaluation"
    name = Row(name=targets[0].name, target=targets[0]).folder
    return output_path(Path("evaluations") / name, "--out")
