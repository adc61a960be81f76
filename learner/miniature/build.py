"""Build the networks of a miniature from scratch: `python -m learner.miniature.build`.

Trains what one of the systems needs: tokenizer, policy, scorers and, for the default, the judge,
which has other seeds and architectures. Minutes on two cores. Deterministic in seed and number of
threads, on one kind of machine. A network is the same whatever is built beside it.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    import sys

    from cluster.program.start import run_command

    sys.exit(run_command("learner.miniature.build"))

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
import yaml
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cluster.errors import ConfigError, TesseraError
from cluster.io.locks import locked
from cluster.io.paths import output_path
from cluster.model_files.tensors import built_directory
from cluster.program.console import FAILED, INTERRUPTED, REFUSED, make_console
from cluster.program.invocation import command_of
from cluster.program.precision import start_computing
from cluster.program.streams import safe_streams
from learner.config import DEFAULT_PRESET, load_preset, merge, to_dict
from learner.miniature.systems.registry import SYSTEMS, system_of, system_of_preset
from learner.miniature.systems.system import Job, Network

NETWORKS = Path(__file__).parent / "networks"


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """Build the networks of a miniature."""

    system: Annotated[
        str, tyro.conf.arg(help=f"Whose networks to build: {', '.join(SYSTEMS)}.", metavar="NAME")
    ] = "llamagen"
    out: Path | None = None
    """Directory for the networks and a preset that uses them (PRESET.yaml). By default networks/,
    or, for networks that are not shipped, the place in ~/.cache/tessera ($TESSERA_WEIGHTS) where
    their preset looks for them."""
    seed: int = 0
    """Base of every network's seed."""
    judge_seed: int = 20250
    """Seed of the judge, fixed so that rebuilt networks share one judge."""
    scale: float = 1.0
    """Factor of the numbers of steps (below 1 for quick tests)."""
    num_threads: int = 2
    """Threads of torch; results depend on them."""

    @property
    def folder(self) -> Path:
        """Where the networks go.

        Raises:
            ConfigError: no such system, or no home directory to put them below.
        """
        if self.out is not None:
            return self.out
        system = system_of(self.system)
        return built_directory(system.name) if system.on_demand else Path("networks")


class Builder:
    """Trains the networks of a system in turn, each with its own random generator."""

    def __init__(self, config: BuildConfig, progress: Progress) -> None:
        """Raises ConfigError: no such system."""
        self.config, self.progress = config, progress
        self.system = system_of(config.system)

    def build(self, *, keep: bool = False, judge: bool = True) -> None:
        """Train and write the networks.

        Args:
            keep: leave out those whose files are there.
            judge: with those of the judge, which are the same for every seed.
        """
        start_computing()
        torch.set_num_threads(self.config.num_threads)
        for network in self.system.networks:
            there = keep and (self.config.folder / network.file).is_file()
            if not there and (judge or not network.of_judge):
                self._train(network)

    def _train(self, network: Network) -> None:
        config = self.config
        steps = max(1, int(network.steps * config.scale))
        task = self.progress.add_task(network.name, total=steps)
        job = Job(
            network=network,
            folder=config.folder,
            seed=config.judge_seed if network.of_judge else config.seed,
            steps=steps,
            tick=lambda: self.progress.advance(task),
        )
        job.file.parent.mkdir(parents=True, exist_ok=True)
        network.train(job)


def with_networks(folder: Path, preset: str = DEFAULT_PRESET) -> dict[str, Any]:
    """A miniature's preset as plain values, with the networks of a folder.

    Raises:
        ConfigError: no system has this preset.
    """
    places = system_of_preset(preset).places
    return merge(to_dict(load_preset(preset)), _inside(folder, places))


def _inside(folder: Path, places: Mapping[str, Any]) -> dict[str, Any]:
    """The same mapping, with paths below a folder."""
    return {
        name: _inside(folder, value) if isinstance(value, Mapping) else str(folder / value)
        for name, value in places.items()
    }


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    prog = command_of("learner.miniature.build")
    config = tyro.cli(BuildConfig, args=arguments, description=__doc__, prog=prog)
    try:
        for data in {network.data for network in system_of(config.system).networks}:
            data()  # before the directory is made: its package may be missing
        folder = output_path(config.folder, "--out")
        with locked(folder, f"--out {folder}"):
            return _build(replace(config, out=folder), in_place=config.out is None)
    except TesseraError as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED if isinstance(error, ConfigError) else FAILED


def _build(config: BuildConfig, *, in_place: bool) -> int:
    """
    Args:
        in_place: networks that are not shipped go where their preset looks for them.
    """
    folder = config.folder
    columns = (TextColumn("{task.description:>12}"), BarColumn(), MofNCompleteColumn())
    try:
        with (
            safe_streams(output_is_all=False),
            Progress(*columns, TimeElapsedColumn(), console=make_console()) as progress,
        ):
            builder = Builder(config, progress)
            builder.build()
    except KeyboardInterrupt:
        print(f"stopped: {folder} is not whole", file=sys.stderr)
        return INTERRUPTED
    name = builder.system.preset
    preset = folder / f"{name}.yaml"
    preset.write_text(yaml.safe_dump(with_networks(folder.absolute(), name), sort_keys=False))
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    make_console().print(
        f"wrote {size / 1e6:.1f} MB to {folder}; use them with\n"
        f"  {command_of('learner.run')} --preset "
        f"{name if in_place and builder.system.on_demand else preset}",
        highlight=False,
        soft_wrap=True,
    )
    return 0
