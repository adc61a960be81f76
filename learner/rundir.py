"""The run directory: where everything that a run leaves behind is kept.

config.yaml  metrics.jsonl  evaluation.json  trace.json  report.html
checkpoints/step_*/  rollouts/*.parquet  gallery/*.png  tensorboard/
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

from cluster.errors import ConfigError
from cluster.files import replacing
from learner.config import RunConfig, dump, load_file

CONFIG = "config.yaml"
BEFORE_AFTER = "before_after.png"
RAY_PACKAGES = "runtime_resources"


class RunDirectory:
    """Paths of a run, and its configuration."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.checkpoints = self.path / "checkpoints"
        self.rollouts = self.path / "rollouts"
        self.gallery = self.path / "gallery"
        self.tensorboard = self.path / "tensorboard"
        self.metrics = self.path / "metrics.jsonl"
        self.evaluation = self.path / "evaluation.json"
        self.trace = self.path / "trace.json"
        self.report = self.path / "report.html"

    @classmethod
    def create(cls, run_dir: str, config: RunConfig) -> RunDirectory:
        """Make a new run directory, and write the configuration into it.

        Args:
            run_dir: where; empty makes a new one under `default_root`.

        Raises:
            ConfigError: the directory already holds something.
        """
        path = Path(run_dir).expanduser() if run_dir else _new_name()
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            if (path / CONFIG).is_file():
                raise ConfigError(
                    f"--run-dir {path} is not empty: add --resume to continue the run in it, or "
                    "name another directory"
                )
            what = "not empty, and holds no run" if path.is_dir() else "a file"
            raise ConfigError(f"--run-dir {path} is {what}: name another directory")
        run = cls(path)
        for folder in (run.checkpoints, run.rollouts, run.gallery, run.tensorboard):
            folder.mkdir(parents=True)
        run.write_config(config)
        return run

    @classmethod
    def existing(cls, run_dir: str) -> RunDirectory:
        """The run to resume: the named one, else the newest under the default root.

        Raises:
            ConfigError: there is none.
        """
        if run_dir:
            path = Path(run_dir).expanduser()
        else:
            runs = sorted(default_root().glob(f"*/{CONFIG}"), key=lambda file: file.stat().st_mtime)
            if not runs:
                raise ConfigError(f"nothing to resume: no run under {default_root().absolute()}")
            path = runs[-1].parent
        if not (path / CONFIG).is_file():
            raise ConfigError(f"nothing to resume: {path.absolute()} has no {CONFIG}")
        return cls(path)

    def farewell(self) -> str:
        """What a run that ends early leaves, in a sentence. A run that has not kept anything worth
        having leaves nothing, so that no later --resume finds it."""
        if any(self.checkpoints.glob("step_*")) or self.evaluation.is_file():
            return (
                f"what was kept is in {self.path}; go on with\n"
                f"  python -m learner.run --resume --run-dir {self.path}"
            )
        if not any(file.is_file() for file in self.path.rglob("*") if file.name != CONFIG):
            shutil.rmtree(self.path)
            return "nothing was kept"
        return f"what was kept is in {self.path}"

    def read_config(self) -> RunConfig:
        return load_file(self.path / CONFIG)

    def write_config(self, config: RunConfig) -> None:
        (self.path / CONFIG).write_text(dump(config))

    def read_evaluation(self) -> dict[str, dict[str, float]]:
        """Rows of the table so far: name -> metrics."""
        return json.loads(self.evaluation.read_text()) if self.evaluation.is_file() else {}

    def write_evaluation(self, rows: dict[str, dict[str, float]]) -> None:
        with replacing(self.evaluation) as partial:
            partial.write_text(json.dumps(rows, indent=2) + "\n")


def default_root() -> Path:
    """`runs/` here; but not inside a package that Ray unpacked for a job and deletes after it."""
    here = Path.cwd()
    return Path.home() / "tessera-runs" if RAY_PACKAGES in here.parts else here / "runs"


def _new_name() -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    path, number = default_root() / stamp, 1
    while path.exists():
        number += 1
        path = default_root() / f"{stamp}-{number}"
    return path
