"""MLflow. Where it keeps its records, and credentials, are the user's own settings of it
(MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME); without any, in mlflow.db in the working directory.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import socket
import time
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

import mlflow
import numpy as np
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunStatus
from mlflow.store.db.db_types import DATABASE_ENGINES

from cluster.errors import ConfigError
from cluster.io.paths import in_ray_package
from learner.config import RunConfig, dotted, to_dict
from learner.loggers.logger import EVALUATED, EVALUATION, SCALARS, Newest, Values, kind_of
from learner.runs.records import ITERATION
from learner.runs.run_dir import RunDirectory

logger = logging.getLogger(__name__)

EXPERIMENT = "tessera"
TRACKING_URI = "MLFLOW_TRACKING_URI"
FOR_DATABASES = ("sqlalchemy", "alembic")
PORTS = {"http": 80, "https": 443}
CONNECT_S = 10.0
PARAMS_AT_ONCE, LONGEST_PARAM = 100, 500
UNNAMED = re.compile(r"[^\w.\- :/]")
"""What names of MLflow's metrics must not contain."""


def check_store() -> None:
    """
    Raises:
        ConfigError: no server answers at the address, the database would vanish with its folder, or
            what a database needs is not installed.
    """
    uri = mlflow.get_tracking_uri()
    address = urlsplit(uri)
    if not os.environ.get(TRACKING_URI) and in_ray_package(Path.cwd()):
        raise ConfigError(
            f"expected {TRACKING_URI}, found none: a job's working directory vanishes with it; set "
            "it to a server, or to a database that stays (sqlite:////place/mlflow.db)"
        )
    missing = [name for name in FOR_DATABASES if importlib.util.find_spec(name) is None]
    if address.scheme.partition("+")[0] in DATABASE_ENGINES and missing:
        raise ConfigError(
            f"expected {' and '.join(FOR_DATABASES)} to be installed, which MLflow needs for a "
            f"database ({_without_password(uri)}), found no {' and no '.join(missing)}: pip "
            f"install 'tessera-rl[mlflow]', or set {TRACKING_URI} to a server"
        )
    if address.scheme not in PORTS or getproxies():
        return
    try:
        place = address.hostname or "", address.port or PORTS[address.scheme]
        socket.create_connection(place, CONNECT_S).close()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"expected a server of MLflow at {_without_password(uri)} ({TRACKING_URI}), found none "
            f"({error}): start it, or name a database (sqlite:///mlflow.db)"
        ) from error


class MLflow:
    """A run of MLflow.

    Args:
        run_id: of the MLflow run to continue; empty makes a new one.
        tags: of a new run.
    """

    def __init__(
        self, config: RunConfig, run: RunDirectory, run_id: str, tags: Mapping[str, str]
    ) -> None:
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        uri = mlflow.get_tracking_uri()
        try:
            self._client = MlflowClient()
            self.run_id = run_id or self._create(config, run.path.name, tags)
            self._client.update_run(self.run_id, status="RUNNING")
            self._there = dict(self._client.get_run(self.run_id).data.metrics)
        except Exception as error:  # of its store or its server: there is no common class
            raise ConfigError(
                f"output.loggers: MLflow at {_without_password(uri)} could not "
                f"{'continue' if run_id else 'begin'} the run ({_first_line(error)}): set "
                f"{TRACKING_URI} to a server or a database that is there"
            ) from error
        self._begun = bool(run_id)
        logger.info(f"MLflow: run {self.run_id} at {_without_password(uri)}")

    def _create(self, config: RunConfig, name: str, tags: Mapping[str, str]) -> str:
        experiment = os.environ.get("MLFLOW_EXPERIMENT_ID") or self._experiment()
        made = self._client.create_run(experiment, run_name=name, tags=dict(tags))
        params = iter(sorted(dotted(to_dict(config)).items()))
        while some := [Param(k, str(v)[:LONGEST_PARAM]) for k, v in islice(params, PARAMS_AT_ONCE)]:
            self._client.log_batch(made.info.run_id, params=some)
        return str(made.info.run_id)

    def _experiment(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
        found = self._client.get_experiment_by_name(name)
        return str(found.experiment_id if found else self._client.create_experiment(name))

    def begin(self, next_step: int) -> Newest:
        self._begun = True
        if ITERATION not in self._there:
            return {}
        newest = int(self._there[ITERATION])
        evaluated = int(self._there.get(EVALUATED, -1))
        return {SCALARS: newest, EVALUATION: evaluated, kind_of("gallery"): newest - 1}

    def scalars(self, values: Values, step: int) -> None:
        now = round(time.time() * 1000)
        metrics = [Metric(UNNAMED.sub("_", k), float(v), now, step) for k, v in values.items()]
        self._client.log_batch(self.run_id, metrics=metrics)

    def evaluation(self, figures: Values, step: int) -> None:
        named = {f"{EVALUATION}/{name}": value for name, value in figures.items()}
        self.scalars({**named, EVALUATED: step}, step)

    def histograms(self, values: Mapping[str, np.ndarray], step: int) -> None:
        """MLflow has none; the metrics have percentiles."""

    def images(self, name: str, image: np.ndarray, step: int) -> None:
        self._client.log_image(self.run_id, image, key=name, step=step, synchronous=True)

    def finish(self, table: Mapping[str, Values], files: Sequence[Path]) -> None:
        for policy, figures in table.items():
            self.scalars({f"table/{policy}/{name}": v for name, v in figures.items()}, 0)
        for file in files:
            self._client.log_artifact(self.run_id, str(file))

    def close(self, *, failed: bool) -> None:
        if not self._begun:
            self._client.delete_run(self.run_id)
            return
        status = RunStatus.FAILED if failed else RunStatus.FINISHED
        self._client.set_terminated(self.run_id, RunStatus.to_string(status))


def _without_password(uri: str) -> str:
    return re.sub(r"://[^/@\s]*@", "://", uri)


def _first_line(error: Exception) -> str:
    return _without_password(str(error).strip().partition("\n")[0]) or type(error).__name__
