"""The command learner.report, and what a run does at its end: files, owners, refusals."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cluster.errors import FleetError, LockLostError, StorageError
from cluster.io.locks import acquire, locked_file
from cluster.io.run_layout import OWNER
from cluster.io.starts import START, append_event, last_ending, read_events
from cluster.program.console import FAILED, make_console
from cluster.program.signals import StopFlag
from learner import report
from learner import run as run_command
from learner.report import conclude, main, note_end
from learner.runs.run_dir import RunDirectory
from tests.small_run import small_config
from tests.unit.learner.reports.made_run import made_run


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return made_run(tmp_path / "run", 6)


def test_the_page_of_an_ended_run_is_in_its_directory(run: RunDirectory) -> None:
    assert main([str(run.path)]) == 0
    assert "<!doctype html>" in run.report.read_text()
    assert not (run.path / OWNER).exists()


def test_the_page_of_a_killed_run_says_so(run: RunDirectory) -> None:
    append_event(run.path, START, {})
    assert main([str(run.path)]) == 0
    assert '<span class="state killed">' in run.report.read_text()


def test_an_active_run_keeps_its_directory(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    with acquire(run.path / OWNER, "it"):
        assert main([str(run.path)]) == 0
    assert not run.report.exists()
    assert Path("run-report.html").is_file()
    assert "the run is active" in capsys.readouterr().out
    relative = os.path.relpath(run.report)
    with acquire(run.path / OWNER, "it"):
        assert main([str(run.path), "--out", relative]) == 2
    assert f"the run directory {run.path} is in use" in capsys.readouterr().err


def test_a_page_elsewhere(run: RunDirectory, tmp_path: Path) -> None:
    target = tmp_path / "new" / "page.html"
    assert main([str(run.path), "--out", str(target)]) == 0
    assert target.is_file()
    assert not run.report.exists()
    with locked_file(target, "it"):
        assert main([str(run.path), "--out", str(target)]) == 2


def test_several_runs(run: RunDirectory, tmp_path: Path) -> None:
    other = made_run(tmp_path / "other", 6, seed=1)
    assert main(["--compare", str(run.path), str(other.path)]) == 0
    page = Path("comparison.html").read_text()
    assert "Differences in configuration" in page
    assert "<code>seed</code>" in page


def test_runs_by_name_and_the_newest(run: RunDirectory) -> None:
    made = made_run(Path("runs") / "a", 6)
    assert main(["a"]) == main([]) == 0
    assert made.report.is_file()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["nothing"], "nothing is not there: name a run's directory"),
        (["."], "holds no run: name a run's directory"),
        ([], "name a run: there is none under"),
        (["{run}", "--out", "."], "is a directory"),
        (["--compare", "{run}"], "--compare needs two runs or more"),
    ],
)
def test_refusals(
    run: RunDirectory, capsys: pytest.CaptureFixture[str], line: list[str], said: str
) -> None:
    assert main([word.replace("{run}", str(run.path)) for word in line]) == 2
    assert said in capsys.readouterr().err


def test_how_a_run_ended_is_recorded_whatever_becomes_of_its_report(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(report, "render", lambda *_: 1 / 0)
    conclude(run, "failed", "no GPU")
    assert read_events(run.path)[-1]["detail"] == "no GPU"
    assert "the report was not written (division by zero)" in caplog.text
    assert f"learner.report {run.path}" in caplog.text


def test_a_recorded_end_is_recorded_once(run: RunDirectory) -> None:
    append_event(run.path, START, {})
    note_end(run, "stopped")
    assert conclude(run, "stopped")
    assert [event["event"] for event in read_events(run.path)] == ["start", "end"]


def test_a_run_that_kept_nothing_has_no_report(tmp_path: Path) -> None:
    run = RunDirectory.create(str(tmp_path / "run"), small_config())
    conclude(run, "stopped")
    assert last_ending(run.path) == "stopped"
    assert not run.report.exists()
    assert run.exit_message() == "nothing was kept"
    assert not run.path.exists()


@pytest.mark.parametrize("error", [LockLostError("another's"), StorageError("full")])
def test_a_lost_directory_is_said(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(report, "record_end", fail)
    conclude(run, "failed")  # its own error is said
    if isinstance(error, LockLostError):
        with pytest.raises(LockLostError):
            conclude(run, "finished")
    else:
        conclude(run, "finished")


@pytest.mark.parametrize("error", [FleetError("no GPU"), RuntimeError("a bug")])
def test_a_signal_while_a_failed_run_reports_leaves_the_report_out(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> bool:
        raise error

    def interrupted(*_: object) -> str:
        told.append(run.log.read_text())  # what is there, should the process die now
        raise KeyboardInterrupt

    told: list[str] = []
    monkeypatch.setattr(run_command, "record", lambda *_: None)
    monkeypatch.setattr(run_command, "run_on_fleet", fail)
    monkeypatch.setattr(report, "render", interrupted)
    config = run.read_config()

    def carry_out() -> int:
        return run_command.carry_out(
            run_command.Command(), config, run, make_console(), StopFlag(), lambda: None
        )

    if isinstance(error, FleetError):
        assert carry_out() == FAILED
        assert "what was kept is in" in run.log.read_text()
    else:
        with pytest.raises(RuntimeError, match="a bug"):
            carry_out()
        assert "Traceback" in told[0]
    assert str(error) in told[0]
    assert run.log.read_text().count("Traceback") == isinstance(error, RuntimeError)
    assert last_ending(run.path) == "failed"
