"""Loggers: each step once, whatever happened to the run; a tool that fails or hangs holds up
nothing; offline, by what each tool itself reads back."""

from __future__ import annotations

import logging
import struct
import threading
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import wandb
from mlflow import MlflowClient
from mlflow.artifacts import list_artifacts
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from cluster.errors import ConfigError, DataError
from learner.config import RunConfig
from learner.fleet_plan import fleet_plan
from learner.loggers import logger as module
from learner.loggers.logger import Loggers
from learner.loggers.ml_flow import FOR_DATABASES
from learner.loggers.opening import open_loggers
from learner.monitoring.metrics import Recorder
from learner.preflight import preflight
from learner.runs.run_dir import RunDirectory
from learner.runs.starts import record_start
from tests.small_run import small_config
from tests.unit.learner.runs.test_records import record

KEY = "0123456789abcdef0123456789abcdef01234567"
SHEET = np.full((8, 12, 3), 200, dtype=np.uint8)


class Tool:
    """A logger that remembers."""

    run_id = "7"

    def __init__(self, has: Mapping[str, int] | None) -> None:
        self.has, self.got = has, list[tuple[str, int]]()

    def begin(self, next_step: int) -> Mapping[str, int] | None:
        return self.has

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        assert "fid/ema" not in values  # not finite
        self.got.append(("scalars", step))

    def evaluation(self, figures: Mapping[str, float], step: int) -> None:
        self.got.append(("evaluation", step))

    def histograms(self, values: Mapping[str, np.ndarray], step: int) -> None:
        self.got.append(("histograms", step))

    def images(self, name: str, image: np.ndarray, step: int) -> None:
        self.got.append((name, step))

    def finish(self, table: Mapping[str, Mapping[str, float]], files: object) -> None:
        self.got.append(("finish", 0))

    def close(self, *, failed: bool) -> None:
        self.got.append(("failed" if failed else "closed", 0))


def new_run(path: Path, config: RunConfig | None = None) -> RunDirectory:
    return RunDirectory.create(str(path), config or small_config())


def steps(tool: Tool, kind: str) -> list[int]:
    return [step for name, step in tool.got if name == kind]


def one_start(
    run: RunDirectory, loggers: Loggers, first: int, last: int, *, finished: bool = False
) -> None:
    """Iterations `first` to `last`, with a gallery and an evaluation after every second one."""
    if first == 1:
        loggers.images("gallery", SHEET, 0)  # of the base policy, before the records begin
    recorder = Recorder(run, first - 1, rollouts=False, loggers=loggers)
    for step in range(first, last + 1):
        record(recorder, step)
        if step % 2 == 0:
            recorder.record_evaluation(step, {"fid": 3.0, "recall": float("nan")})
            loggers.images("gallery", SHEET, step)
            Image.fromarray(SHEET).save(run.gallery / f"step_{step:06d}.png")
    recorder.close()
    if finished:
        run.write_evaluation({"tuned": {"fid": 2.0}})
        loggers.finish({"tuned, again": {"fid": 2.0, "recall": float("nan")}}, [run.evaluation])
    loggers.close()


def test_steps_that_are_done_again_are_written_once(tmp_path: Path) -> None:
    run, tool = new_run(tmp_path / "run"), Tool({})
    one_start(run, Loggers({"x": tool}), 1, 5)
    assert steps(tool, "scalars") == [1, 2, 3, 4, 5]
    assert steps(tool, "evaluation") == [2, 4]
    assert steps(tool, "gallery") == [0, 2, 4]
    assert tool.got[-1] == ("failed", 0)
    assert module.kept_runs(run) == {"x": "7"}
    again = Tool({"scalars": 5, "evaluation": 4, "images/gallery": 4})  # the checkpoint was of 3
    one_start(run, Loggers({"x": again}), 4, 7, finished=True)
    assert steps(again, "scalars") == [6, 7]
    assert steps(again, "evaluation") == [6]
    assert steps(again, "gallery") == [6]
    assert [name for name, _ in again.got[-2:]] == ["finish", "closed"]


def test_a_tool_is_given_what_it_lacks_of_earlier_starts(tmp_path: Path) -> None:
    """One that is new to the run, cannot be continued, or was away when the run was killed."""
    run = new_run(tmp_path / "run")
    one_start(run, Loggers(), 1, 5)
    new, behind, same = Tool({}), Tool({"scalars": 2, "evaluation": 2}), Tool(None)
    one_start(run, Loggers({"a": new, "b": behind, "c": same}), 4, 6)
    assert steps(new, "scalars") == [1, 2, 3, 4, 5, 6]
    assert steps(behind, "scalars") == [3, 4, 5, 6]
    assert steps(same, "scalars") == [4, 5, 6]
    assert steps(new, "evaluation") == [2, 4, 6]
    assert steps(behind, "evaluation") == [4, 6]
    assert steps(new, "gallery") == [2, 4, 6]


def test_a_tool_that_fails_or_hangs_ends_and_delays_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "STOP_S", 0.3)
    monkeypatch.setattr(module, "AGAIN_S", 0.01)
    monkeypatch.setattr(module, "MOST_WAITING", 40)
    release = threading.Event()

    class Failing(Tool):
        def scalars(self, values: Mapping[str, float], step: int) -> None:
            raise OSError(28, "No space left on device")

    class Hanging(Tool):
        def scalars(self, values: Mapping[str, float], step: int) -> None:
            release.wait()

    class Away(Tool):
        calls = 0

        def scalars(self, values: Mapping[str, float], step: int) -> None:
            self.calls += 1
            if self.calls < 3:
                raise ConnectionError("away")
            super().scalars(values, step)

    whole, away = Tool({}), Away({})
    tools = {"failing": Failing({}), "hanging": Hanging({}), "away": away, "whole": whole}
    run, start = new_run(tmp_path / "run"), time.monotonic()
    with caplog.at_level(logging.WARNING):
        loggers = Loggers(tools)
        recorder = Recorder(run, 0, rollouts=False, loggers=loggers)
        for step in (1, 2, 3):
            record(recorder, step)
        while steps(away, "scalars") != [1, 2, 3]:
            assert time.monotonic() - start < 5
        recorder.close()
        loggers.close()
    release.set()
    assert time.monotonic() - start < 5
    assert steps(whole, "scalars") == [1, 2, 3]
    told = [line.message.split()[1] for line in caplog.records if "the run goes on" in line.message]
    assert sorted(told) == ["away", "failing", "hanging"]  # once each
    assert len(run.metrics.read_text().splitlines()) == 3


@pytest.mark.parametrize("finished", [True, False])
def test_tools_that_hang_are_waited_for_together(
    finished: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also with full queues; after an error or a stop for a short time."""
    monkeypatch.setattr(module, "CLOSE_S", 0.6)
    monkeypatch.setattr(module, "STOP_S", 0.2)
    monkeypatch.setattr(module, "MOST_WAITING", 2)
    release = threading.Event()

    class Hanging(Tool):
        def scalars(self, values: Mapping[str, float], step: int) -> None:
            release.wait()

    whole, hanging = Tool({}), {str(number): Hanging({}) for number in range(4)}
    loggers = Loggers({**hanging, "whole": whole})
    loggers.begin(new_run(tmp_path / "run"), 1)
    for step in range(1, 6):
        loggers.scalars({"x": 1.0}, step)
        while len(whole.got) < step:
            time.sleep(0.001)
    if finished:
        loggers.finish({}, [])
    began = time.monotonic()
    loggers.close()
    seconds = time.monotonic() - began
    release.set()
    assert (0.5 if finished else 0.1) < seconds < (1.2 if finished else 0.6)
    assert whole.got[-1][0] == ("closed" if finished else "failed")


def test_a_tool_that_cannot_begin_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Tool):
        def begin(self, next_step: int) -> Mapping[str, int] | None:
            raise ConnectionError("away")

    broken, whole = Broken({}), Tool({})
    with caplog.at_level(logging.WARNING):
        one_start(new_run(tmp_path / "run"), Loggers({"x": broken, "y": whole}), 1, 3)
    assert broken.got == [("failed", 0)]
    assert steps(whole, "scalars") == [1, 2, 3]
    (line,) = [each.message for each in caplog.records if "the run goes on" in each.message]
    assert line.startswith("note: x lacks")
    assert line.endswith("ConnectionError: away")


def test_tensorboard_has_each_step_once_and_images(tmp_path: Path) -> None:
    config = small_config()
    run = new_run(tmp_path / "run", config)
    for first, last in ((1, 5), (4, 7)):
        with open_loggers(config, run) as loggers:
            one_start(run, loggers, first, last)
    events = EventAccumulator(str(run.tensorboard), {"images": 0, "histograms": 0}).Reload()
    assert [event.step for event in events.Scalars("reward/clip")] == [1, 2, 3, 4, 5, 6, 7]
    for tag in ("evaluation/fid", "exam/fid"):
        assert [event.step for event in events.Scalars(tag)] == [2, 4, 6]
    assert [event.step for event in events.Images("gallery")] == [0, 2, 4, 6]
    assert [event.step for event in events.Histograms("rewards/clip")] == [1, 2, 3, 4, 5, 6, 7]


needs_database = pytest.mark.skipif(
    any(find_spec(name) is None for name in FOR_DATABASES), reason="no sqlalchemy or no alembic"
)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Address of a database of MLflow, which takes seconds to make."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def offline(tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No credentials, and no connections."""
    for name in ("WANDB_API_KEY", "WANDB_PROJECT", "WANDB_SERVICE", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    monkeypatch.chdir(tmp_path)


def wandb_records(file: Path) -> list[Record]:
    """Records of a .wandb file: LevelDB's log format, after a header of 7 bytes."""
    data, at, whole, found = file.read_bytes(), 7, b"", list[Record]()
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            found.append(Record.FromString(whole))
            whole = b""
    return found


def history(file: Path) -> dict[str, list[int]]:
    """Name -> steps at which it was logged."""
    found: dict[str, list[int]] = {}
    for each in wandb_records(file):
        for item in each.history.item:
            name = item.key or "/".join(item.nested_key)
            found.setdefault(name, []).append(each.history.step.num)
    return found


def test_wandb_offline(offline: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    secrets = ["--my.api-key", "sk-12345", "--url", "s3://u:p5678@host/x"]
    monkeypatch.setattr("sys.argv", ["learner/run.py", "--seed", "7", *secrets])
    wandb.teardown()  # it keeps the command line that it saw first
    config = small_config(output={"loggers": ["wandb"]})
    run = new_run(tmp_path / "run", config)
    record_start(run, None, fleet_plan(config), [], inline=True)
    for first, last in ((1, 5), (4, 7)):
        with open_loggers(config, run) as loggers:
            one_start(run, loggers, first, last, finished=last == 7)
    (file,) = run.path.glob("wandb/offline-run-*/*.wandb")  # what `wandb sync` takes
    assert len(list(run.path.glob("wandb/offline-run-*/*.wandb.replaced"))) == 1
    deadline = time.monotonic() + 20  # W&B's process writes on for a moment
    while not any(each.HasField("exit") for each in wandb_records(file)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    found = history(file)
    assert found["reward/clip"] == [1, 2, 3, 4, 5, 6, 7]
    assert found["histogram/rewards/clip/_type"] == [4, 5, 6, 7]  # no file has earlier ones
    assert found["evaluation/fid"] == [2, 4, 6]
    assert found["gallery/_type"] == [2, 4, 6]
    records = wandb_records(file)
    (begun,) = [each.run for each in records if each.HasField("run")]
    assert (begun.run_id, begun.display_name, begun.project) == (run.identity, "run", "tessera")
    logged = {item.key: item.value_json for item in begun.config.update}
    assert logged.keys() >= {"rewards", "learner", "seed"}
    assert "--seed 7 --my.api-key '***' --url 's3://***@host/x'" in logged["command"]
    summary = {
        "/".join(item.nested_key) or item.key: item.value_json
        for each in records
        for item in each.summary.update
    }
    assert summary["table/tuned, again/fid"] == "2.0"
    assert (file.parent / "files" / "evaluation.json").exists()
    written = b"".join(path.read_bytes() for path in run.path.rglob("*") if path.is_file())
    assert b"--my.api-key" in written
    assert [each for each in (KEY, "sk-12345", "p5678") if each.encode() in written] == []


class OnlineRun:
    """What `wandb.init` returns for a run whose server has steps 0 to 5."""

    id, url, resumed, step = "7", "https://there/7", True, 6
    summary: ClassVar[dict[str, Any]] = {"evaluation/step": 4}

    def __init__(self, folder: Path) -> None:
        self.dir = str(folder / "wandb" / "run-7" / "files")
        self.logged: list[tuple[int, list[str]]] = []

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((step, sorted(values)))
        self.step = max(self.step, step)

    def finish(self, exit_code: int) -> None:
        self.logged.append((exit_code, ["finish"]))


def test_wandb_online_continues_after_what_its_server_has(
    offline: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Against a stand-in for the library: no server can be reached here."""
    monkeypatch.setenv("WANDB_MODE", "online")
    wandb.teardown()
    config = small_config(output={"loggers": ["wandb"]})
    run, given = new_run(tmp_path / "run", config), dict[str, Any]()
    online = OnlineRun(run.path)

    def init(**options: Any) -> OnlineRun:
        given.update(options)
        return online

    one_start(run, Loggers(), 1, 5)
    monkeypatch.setattr(wandb, "init", init)
    with open_loggers(config, run) as loggers:  # the checkpoint was of 3, the kill after 5
        one_start(run, loggers, 4, 7)
    assert (given["id"], given["resume"]) == (run.identity, "allow")
    assert [step for step, names in online.logged if "reward/clip" in names] == [6, 7]
    assert [step for step, names in online.logged if "histogram/rewards/clip" in names] == [6, 7]
    assert [step for step, names in online.logged if "evaluation/fid" in names] == [6]
    assert online.logged[-1] == (1, ["finish"])
    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ConfigError, match=r"could not begin the run \(no such entity\): log in"):
        open_loggers(config, run).__enter__()
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with caplog.at_level(logging.WARNING), open_loggers(config, run, begun=True) as loggers:
        one_start(run, loggers, 8, 8)  # a requeue
    assert "(no such entity): log in" in caplog.text
    assert "; the run goes on without it" in caplog.text
    assert module.kept_runs(run) == {"wandb": "7"}
    wandb.teardown()


def refuse(**_: Any) -> None:
    raise wandb.errors.CommError("no such entity")


@needs_database
def test_mlflow_in_a_database(offline: None, tmp_path: Path) -> None:
    config = small_config(output={"loggers": ["mlflow"]})
    run = new_run(tmp_path / "run", config)
    for first, last in ((1, 5), (4, 7)):
        with open_loggers(config, run) as loggers:
            one_start(run, loggers, first, last, finished=last == 7)
    client, run_id = MlflowClient(), module.kept_runs(run)["mlflow"]

    def logged(name: str, run_id: str = run_id) -> list[int]:
        return [metric.step for metric in client.get_metric_history(run_id, name)]

    assert logged("reward/clip") == [1, 2, 3, 4, 5, 6, 7]
    assert logged("evaluation/fid") == [2, 4, 6]
    stored = client.get_run(run_id)
    assert stored.info.status == "FINISHED"
    assert stored.data.params["learner.microbatch"] == "8"
    assert stored.data.metrics["table/tuned_ again/fid"] == 2.0
    assert "evaluation.json" in [each.path for each in list_artifacts(run_id=run_id)]
    with open_loggers(config, run, from_step=3) as loggers:  # other curves from there on
        one_start(run, loggers, 4, 4)
    other = module.kept_runs(run)["mlflow"]
    assert other != run_id
    assert logged("reward/clip", other) == [1, 2, 3, 4]
    assert client.get_run(other).info.status == "FAILED"


@needs_database
def test_a_run_that_never_began_leaves_nothing_in_a_tool(offline: None, tmp_path: Path) -> None:
    config = small_config(output={"loggers": ["wandb", "mlflow"]})
    run = new_run(tmp_path / "run", config)
    with open_loggers(config, run):
        assert (run.path / "wandb").is_dir()
        identity = run.identity
    assert run.exit_message() == "nothing was kept"
    experiment = MlflowClient().get_experiment_by_name("tessera")
    assert experiment is not None
    here = f"tags.`tessera.run` = '{identity}'"
    assert MlflowClient().search_runs([experiment.experiment_id], here) == []


@needs_database
def test_what_cannot_work_is_refused_before_a_run(
    offline: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = small_config(output={"loggers": ["wandb", "mlflow"]})
    assert preflight(config).problems == []
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    wandb.teardown()
    no_login, no_server = preflight(config).problems
    assert (
        "output.loggers: expected credentials of Weights & Biases, found none: log in" in no_login
    )
    assert "WANDB_MODE=offline" in no_login
    assert "expected a server of MLflow at http://127.0.0.1:9 (MLFLOW_TRACKING_URI)" in no_server
    assert "secret" not in no_server
    found = preflight(config, begun=True)
    assert found.problems == []
    expected = [f"{problem}; the run goes on without it" for problem in (no_login, no_server)]
    assert [note for note in found.notes if note.startswith("output.loggers")] == expected
    run = new_run(tmp_path / "run", config)
    with caplog.at_level(logging.WARNING), open_loggers(config, run, begun=True) as loggers:
        one_start(run, loggers, 1, 2)
    assert caplog.text.count("the run goes on without it") == 2
    wandb.teardown()


def test_mlflow_without_what_a_database_needs(
    offline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    find: Any = __import__("importlib.util").util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *rest: None if name == "alembic" else find(name, *rest),
    )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql+psycopg2://u:secret@h/db")
    config = small_config(output={"loggers": ["mlflow"]})
    (problem,) = preflight(config).problems
    assert "expected sqlalchemy and alembic to be installed" in problem
    assert "pip install 'tessera-rl[mlflow]'" in problem
    assert "secret" not in problem


def test_a_tool_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    find: Any = __import__("importlib.util").util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *rest: None if name in ("wandb", "mlflow") else find(name, *rest),
    )
    problems = preflight(small_config(output={"loggers": ["wandb", "mlflow"]})).problems
    assert [problem.rpartition(": ")[2] for problem in problems] == [
        "pip install 'tessera-rl[wandb]'",
        "pip install 'tessera-rl[mlflow]'",
    ]


@pytest.mark.parametrize("kept", ["{", "[]"])
def test_damaged_names_of_runs(tmp_path: Path, kept: str) -> None:
    run = new_run(tmp_path / "run")
    (run.path / "loggers.json").write_text(kept)
    with pytest.raises(DataError, match=r"loggers\.json: expected names of runs"):
        module.kept_runs(run)


def test_the_command_line_takes_names_in_both_ways() -> None:
    from learner.run import parse

    for words in (["wandb,mlflow"], ["wandb", "mlflow"]):
        assert parse(["--output.loggers", *words])[1].output.loggers == ("wandb", "mlflow")
    assert parse(["--output.loggers"])[1].output.loggers == ()
    with pytest.raises(SystemExit):
        parse(["--output.loggers", "wandb,mflow"])
    with pytest.raises(ConfigError, match="loggers"):
        small_config(output={"loggers": ["mflow"]})
