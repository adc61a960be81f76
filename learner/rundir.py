"""The run directory: where everything that a run leaves behind is kept.

config.yaml  run.log  metrics.jsonl  exams.jsonl  evaluation.json  best.json  trace.json
report.html  checkpoints/step_*/  rollouts/*.parquet  gallery/*.png  tensorboard/
"""

from __future__ import annotations

import json
import secrets
import shutil
import time
from pathlib import Path

from cluster.errors import ConfigError, DataError
from cluster.files import replacing, writing
from learner.config import RunConfig, dump, parse_yaml
from learner.sealed import seal, unseal

CONFIG = "config.yaml"
LOG = "run.log"
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
        self.exams = self.path / "exams.jsonl"
        self.evaluation = self.path / "evaluation.json"
        self.best = self.path / "best.json"
        self.trace = self.path / "trace.json"
        self.report = self.path / "report.html"
        self.log = self.path / LOG

    @classmethod
    def create(cls, run_dir: str, config: RunConfig) -> RunDirectory:
        """Make a new run directory, and write the configuration into it.

        Args:
            run_dir: where; empty makes a new one under `default_root`.

        Raises:
            ConfigError: the directory already holds something.
        """
        path = Path(run_dir).expanduser() if run_dir else _new_name()
        for parent in path.absolute().parents:
            if parent.exists() and not parent.is_dir():
                raise ConfigError(
                    f"--run-dir {path} cannot be made, since {parent} is a file: name another "
                    "directory"
                )
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            if (path / CONFIG).is_file():
                raise ConfigError(
                    f"--run-dir {path} is not empty: add --resume to continue the run in it, or "
                    "name another directory"
                )
            what = "not empty, and holds no run" if path.is_dir() else "a file"
            raise ConfigError(f"--run-dir {path} is {what}: name another directory")
        run = cls(path)
        run._make_folders()
        run.write_config(config)
        return run

    @classmethod
    def adopt(cls, path: Path, sealed: bytes) -> RunDirectory:
        """Make the directory of a run again, from its configuration as a checkpoint keeps it.

        Raises:
            ConfigError: the configuration is damaged.
        """
        text, identity = unseal(sealed, "the checkpoint's configuration")
        parse_yaml(text, "the checkpoint's configuration")
        run = cls(path)
        run._make_folders()
        run._write_config(seal(text, identity))
        return run

    def _make_folders(self) -> None:
        for folder in (self.checkpoints, self.rollouts, self.gallery, self.tensorboard):
            with writing(folder):
                folder.mkdir(parents=True)

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
        made_first = (CONFIG, LOG)
        if not any(f.is_file() for f in self.path.rglob("*") if f.name not in made_first):
            shutil.rmtree(self.path)
            return "nothing was kept"
        return f"what was kept is in {self.path}"

    @property
    def config(self) -> Path:
        return self.path / CONFIG

    @property
    def identity(self) -> str:
        """Which run this is, also after its directory was renamed."""
        return self._read_config()[1]

    def read_config(self) -> RunConfig:
        """The run's configuration.

        Raises:
            ConfigError: the file is missing, or is not what the run wrote.
        """
        text, _ = self._read_config()
        return parse_yaml(text, str(self.config))

    def write_config(self, config: RunConfig) -> None:
        """Write it, under the run's identity (a new one, if there was none)."""
        identity = self.identity if self.config.is_file() else secrets.token_hex(8)
        self._write_config(seal(dump(config), identity))

    def _write_config(self, text: str) -> None:
        with writing(self.config), replacing(self.config, durable=True) as partial:
            partial.write_text(text, encoding="utf-8")

    def _read_config(self) -> tuple[str, str]:
        try:
            data = self.config.read_bytes()
        except OSError as error:
            raise ConfigError(f"{self.config} cannot be read: {error}") from error
        return unseal(data, str(self.config))

    def sealed_config(self) -> str:
        """The file as a checkpoint keeps it."""
        return seal(*self._read_config())

    def read_evaluation(self) -> dict[str, dict[str, float]]:
        """Rows of the table so far: name -> metrics.

        Raises:
            DataError: damaged.
        """
        if not self.evaluation.is_file():
            return {}
        try:
            rows = json.loads(self.evaluation.read_text(encoding="utf-8"))
            return {str(k): {n: _figure(v) for n, v in row.items()} for k, row in rows.items()}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise DataError(
                f"{self.evaluation}: not a table of exams ({error}): remove it, and --resume takes "
                "the exams of the tuned policy again"
            ) from error

    def write_evaluation(self, rows: dict[str, dict[str, float]]) -> None:
        with writing(self.evaluation), replacing(self.evaluation, durable=True) as partial:
            partial.write_text(json.dumps(rows, indent=2) + "\n")


def _figure(value: object) -> float:
    if not isinstance(value, float | int) or isinstance(value, bool):
        raise TypeError(f"a figure was expected, found {value!r}")
    return float(value)


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
