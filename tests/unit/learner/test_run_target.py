"""Which run directory a command line means: new, resumed, the newest, one for every requeue."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.errors import ConfigError, LockHeldError
from cluster.io import paths
from cluster.io.locks import acquire
from cluster.io.paths import default_root, output_path
from cluster.io.processes import Holder
from cluster.io.run_layout import CONFIG, OWNER
from learner.run import REFUSED, main, parse
from learner.run_target import RunTarget, choose_run, newest_run
from learner.runs.run_dir import RunDirectory
from tests.small_run import default_config, flags, small_config
from tests.unit.checkpoint_cases import Kept


def chosen(
    run_dir: str = "", *, resume: bool = True, auto: bool = False, url: str = ""
) -> RunTarget:
    return choose_run(run_dir, resume=resume, auto_resume=auto, url=url)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def kept(path: Path, age_s: float) -> Path:
    """A run with a checkpoint; so old."""
    Kept(path).save(1)
    then = path.stat().st_mtime - age_s
    os.utime(path / CONFIG, (then, then))
    return path


def test_without_a_name_the_newest_that_is_free_and_kept_something(
    runs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    with pytest.raises(ConfigError, match="nothing to resume: no run under"):
        chosen()
    kept(runs / "old", 300)
    free = kept(runs / "free", 200)
    active = kept(runs / "active", 100)
    empty = RunDirectory.create(str(runs / "empty"), small_config())
    with acquire(active / OWNER, "active"):
        assert chosen().path == free
        assert f"passing over {empty.path}: it kept nothing" in caplog.text
        assert f"passing over {active}: it is active (process {os.getpid()}" in caplog.text
        assert f"resuming the newest run, {free}" in caplog.text
    assert chosen().path == active
    rows = RunDirectory.create(str(runs / "rows"), small_config())
    rows.metrics.write_text('{"iteration": 0}\n')
    assert newest_run(runs) == rows.path


def test_all_active_or_empty_is_said(runs: Path) -> None:
    active = kept(runs / "active", 0)
    RunDirectory.create(str(runs / "empty"), small_config())
    with (
        acquire(active / OWNER, "active"),
        pytest.raises(
            ConfigError, match=r"(?s)nothing to resume under.*empty: it kept.*active: it"
        ),
    ):
        chosen()


@pytest.mark.parametrize(
    "extra", [[], ["--from-step", "999"], ["--from-step", "1"], ["--iterations", "9"]]
)
def test_a_live_run_is_refused_and_not_touched(
    runs: Path, capsys: pytest.CaptureFixture[str], extra: list[str]
) -> None:
    made = Kept(runs / "A")
    made.save(1)
    partial = made.run.checkpoints / ".step_000002.0a1b"
    partial.mkdir()
    (partial / "policy.safetensors").write_bytes(b"half")
    with acquire(made.run.path / OWNER, "A", run="A"):
        before = files(runs)
        line = ["--resume", "--inline", "--run-dir", "runs/A", *extra]
        assert main(line) == REFUSED
        said = capsys.readouterr().err
        assert f"in use by process {os.getpid()} on" in said
        assert "python -m cluster.stop --run runs/A" in said
        assert f"kill {os.getpid()}" in said
        if not extra:
            assert main(["--inline", "--run-dir", "runs/A"]) == REFUSED  # and as a new one
            assert f"in use by process {os.getpid()} on" in capsys.readouterr().err
        assert files(runs) == before


def test_a_preset_beside_resume_must_be_the_runs(runs: Path) -> None:
    config = default_config()
    with chosen("runs/A", resume=False).acquire(config):
        pass
    line = ["--run-dir", "runs/A", *flags()]
    for resume in ("--resume", "--auto-resume"):
        assert parse([resume, *line, "--preset", "miniature"])[1] == config
        with pytest.raises(ConfigError, match=r"(?s)cannot change .*policy.*\(or --preset\)"):
            parse([resume, *line, "--preset", "llamagen-b-256"])


def test_a_refused_step_removes_nothing(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = Kept(runs / "A")
    made.save(1)
    (made.run.checkpoints / ".step_000002.0a1b").mkdir()
    before = made.names
    assert main(["--resume", "--inline", "--run-dir", "runs/A", "--from-step", "999"]) == REFUSED
    assert "--from-step 999: no complete checkpoint of it; there are: 1" in capsys.readouterr().err
    assert made.names == before
    assert not (made.run.path / OWNER).exists()


def test_a_dry_run_takes_no_lock_and_makes_nothing(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = Kept(runs / "A", checkpoint_url=f"file://{runs}/there")
    made.save(1)
    with acquire(made.run.path / OWNER, "A"):
        assert main(["--resume", "--run-dir", "runs/A", "--dry-run"]) == 0
    shutil.rmtree(made.run.path)
    url = ["--output.checkpoint-url", f"file://{runs}/there"]
    assert main(["--resume", "--run-dir", "runs/A", "--dry-run", *url]) == 0
    assert not made.run.path.exists()
    assert main(["--run-dir", "runs/B", "--dry-run"]) == 0
    assert not (runs / "B").exists()


def test_one_command_line_for_a_start_and_every_requeue(runs: Path) -> None:
    assert chosen("runs/A", resume=False, auto=True).saved is None
    (runs / "A").mkdir(parents=True)
    assert chosen("runs/A", resume=False, auto=True).saved is None
    # killed before its configuration was written
    dead = replace(Holder.this_process(), started="1")
    (runs / "A" / OWNER).write_bytes(dead.to_bytes())
    (runs / "A" / "checkpoints").mkdir()
    (runs / "A" / f".{CONFIG}.partial").write_text("se")
    config = small_config()
    with chosen("runs/A", resume=False, auto=True).acquire(config) as run:
        assert run.read_config() == config
    target = chosen("runs/A", resume=False, auto=True)  # killed before its first checkpoint
    assert target.saved == config
    with target.acquire(config) as run:
        assert run.lock is not None
    assert not (runs / "A" / OWNER).exists()
    with pytest.raises(ConfigError, match="--auto-resume needs the --run-dir"):
        chosen(resume=False, auto=True)
    (runs / "thesis").mkdir()
    (runs / "thesis" / "thesis.tex").write_text("")
    with (
        pytest.raises(ConfigError, match="is not empty, and holds no run"),
        chosen("runs/thesis", resume=False, auto=True).acquire(config),
    ):
        pass
    assert [path.name for path in (runs / "thesis").iterdir()] == ["thesis.tex"]


def test_a_lost_directory_is_made_again_by_its_owner_alone(runs: Path) -> None:
    url = f"file://{runs}/there"
    made = Kept(runs / "A", checkpoint_url=url)
    made.save(1)
    identity = made.run.identity
    shutil.rmtree(made.run.path)
    for auto in (False, True):
        target = chosen("runs/A", resume=not auto, auto=auto, url=url)
        assert target.saved == made.config
        assert not made.run.path.exists()
    with target.acquire(made.config) as run:
        assert run.identity == identity
    with pytest.raises(ConfigError, match=f"nothing to resume: no runs/B, and no .* {url}/none"):
        chosen("runs/B", url=f"{url}/none")
    assert chosen("runs/B", resume=False, auto=True, url=f"{url}/none").saved is None


def test_what_cannot_be_resumed_says_why(runs: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to resume: no runs/A"):
        chosen("runs/A")
    (runs / "A").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"has no config\.yaml"):
        chosen("runs/A")


def test_two_new_runs_get_two_names(runs: Path) -> None:
    config = small_config()
    with RunTarget(None).acquire(config) as one, RunTarget(None).acquire(config) as other:
        assert one.path != other.path
        with pytest.raises(LockHeldError), RunTarget(one.path, config).acquire(config):
            pass


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a job, which Ray deletes after it."""
    package = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    package.mkdir(parents=True)
    monkeypatch.chdir(package)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return package


def test_outputs_of_a_job_do_not_go_where_ray_deletes(
    package: Path, caplog: pytest.LogCaptureFixture
) -> None:
    home = Path.home() / "tessera-runs"
    assert default_root() == home
    assert output_path("runs/A", "--run-dir") == home / "A"
    assert output_path("A", "--run-dir") == home / "A"
    assert output_path(Path("out/x.npz"), "--out") == home / "out" / "x.npz"
    assert "--run-dir runs/A would be in the package of this job" in caplog.text
    assert output_path("/data/A", "--run-dir") == Path("/data/A")
    for inside in (str(package / "A"), "../A"):
        with pytest.raises(ConfigError, match="which Ray deletes after it: name a directory that"):
            output_path(inside, "--run-dir")
    assert chosen("runs/A", resume=False).path == home / "A"


def test_outside_of_jobs_paths_are_what_they_say(runs: Path) -> None:
    assert output_path("runs/A", "--run-dir") == Path("runs/A")
    assert paths.default_root() == runs


@pytest.mark.parametrize("line", ["--run-dir ~nobody-here/A", "--preset ~nobody-here/a.yaml"])
def test_a_home_that_nobody_knows_is_refused(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*line.split(), "--inline"]) == REFUSED
    assert "the home directory that ~ stands for is not known: set HOME" in capsys.readouterr().err


def test_a_run_in_a_job_is_resumed_by_the_same_name(package: Path) -> None:
    line = ["--run-dir", "runs/A", "--auto-resume", *flags()]
    for saved in (False, True):
        _, config, target = parse(line)
        assert bool(target.saved) == saved
        with target.acquire(config) as run:
            assert run.path == Path.home() / "tessera-runs" / "A"
    assert list(package.iterdir()) == []


def test_a_path_that_is_not_utf_8_is_refused_before_anything_is_there(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    target = chosen(str(folder / "run"), resume=False)
    with (
        pytest.raises(ConfigError, match=r"caf\\udce9/run is not UTF-8"),
        target.acquire(small_config()),
    ):
        pass
    assert not folder.exists()
