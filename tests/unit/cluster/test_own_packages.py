"""Files of the user's that have our packages' names: `python -m` names them, `tessera` does not
mind them. And what messages call the commands."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.control.discovery import resume_command
from cluster.errors import ConfigError
from cluster.own_packages import NAMES
from cluster.program import invocation
from cluster.program.invocation import Invocation, command_of
from rewards.scorers.user_rewards import import_user_reward, parse_user_reward

ROOT = Path(__file__).parents[3]
USED = "the user's file was imported"


def start(cwd: Path, *arguments: str, path: str = "") -> subprocess.CompletedProcess[str]:
    """This Python, with the packages that are installed."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )


def put(folder: Path, entry: str) -> None:
    """A user's file, folder (`name/`) or package (`name/__init__.py`)."""
    if entry.endswith("/"):
        (folder / entry / "data").mkdir(parents=True)
        return
    (folder / entry).parent.mkdir(parents=True, exist_ok=True)
    (folder / entry).write_text(f"raise SystemExit({USED!r})\n")


@pytest.mark.parametrize(
    ("module", "entry"),
    [
        ("learner.run", "rewards.py"),
        ("learner.run", "cluster.py"),
        ("learner.plan", "actors/__init__.py"),
        ("rewards.reference", "cluster/__init__.py"),
        ("rewards.reference", "learner.py"),
        ("actors.sample", "rewards/__init__.py"),
        ("cluster.stop", "actors.py"),
    ],
)
@pytest.mark.parametrize("where", ["working directory", "PYTHONPATH"])
def test_what_hides_a_package_is_named(tmp_path: Path, module: str, entry: str, where: str) -> None:
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
    here, there = tmp_path / "here", tmp_path / "there"
    put(here if where == "working directory" else there, entry)
    found = start(here, "-m", module, "--help", path=str(there))
    assert (found.returncode, found.stdout) == (2, "")
    (line,) = found.stderr.splitlines()
    name = entry.removesuffix("/__init__.py")
    shown = f"./{name}" if where == "working directory" else str(there / name)
    assert line.startswith("error: ")
    assert f" {shown} hides " in line
    assert f"rename {shown}" in line
    assert "`tessera`" in line


def test_of_a_program_of_the_users_it_is_an_import_error(tmp_path: Path) -> None:
    put(tmp_path, "rewards.py")
    (tmp_path / "mine.py").write_text("import learner\n")
    found = start(tmp_path, "mine.py")
    assert found.returncode == 1
    assert "ImportError: the file ./rewards.py hides" in found.stderr


def test_packages_of_two_copies_are_not_mixed(tmp_path: Path) -> None:
    """One that is installed, and another's `rewards` earlier on the path."""
    other, part = tmp_path / "other", tmp_path / "part"
    for name in NAMES:
        shutil.copytree(ROOT / name, other / name, ignore=lambda *_: {"networks", "__pycache__"})
    part.mkdir()
    (part / "rewards").symlink_to(other / "rewards")
    found = start(tmp_path, "-m", "learner.run", "--help", path=str(part))
    assert (found.returncode, found.stdout) == (2, "")
    assert "two copies of this program are mixed" in found.stderr
    assert str(other) in found.stderr
    whole = start(tmp_path, "-c", "import rewards; print(rewards.__file__)", path=str(other))
    assert whole.stdout.strip() == str(other / "rewards" / "__init__.py"), whole.stderr


@pytest.fixture
def full_of_names(tmp_path: Path) -> Path:
    """A working directory with everything that can be in the way, and a module of the user's."""
    for name in (*NAMES, "torch", "ray", "tyro", "types", "numpy"):
        put(tmp_path, f"{name}.py")
    for entry in ("rich/", "yaml/__init__.py"):
        put(tmp_path, entry)
    (tmp_path / "my_rewards.py").write_text("class Dark: pass\n")
    return tmp_path


SHOW = """
import sys
from cluster.program.invocation import current
import actors, cluster, learner, rewards, my_rewards, torch, ray, tyro, types, numpy, rich, yaml
names = "actors cluster learner rewards torch ray tyro types numpy rich yaml".split()
here = current().directory
assert here and sys.path[-1] == here and here not in sys.path[:-1], sys.path
assert sys.modules["my_rewards"].__file__.startswith(here)
assert not [name for name in names if sys.modules[name].__file__.startswith(here)]
def main(arguments):
    print("looked", arguments)
    return 5
"""


def test_the_command_minds_none_of_them(full_of_names: Path, tmp_path: Path) -> None:
    """As the script runs it: from a directory of its own. It starts a module that looks around."""
    bin, there = tmp_path / "bin", tmp_path / "there"
    for entry in ("cluster.py", "learner/__init__.py", "rewards/", "actors.py"):
        put(there, entry)
    bin.mkdir()
    (bin / "look.py").write_text(SHOW)
    script = "import sys, tessera_rl as t; t.COMMANDS['look'] = ('look', ''); sys.exit(t.main())"
    (bin / "tessera").write_text(script)
    found = start(full_of_names, str(bin / "tessera"), "look", "--odd", path=str(there))
    assert found.stdout == "looked ['--odd']\n", found.stderr
    assert found.returncode == 5


def test_help_and_errors_of_the_command(tmp_path: Path) -> None:
    put(tmp_path, "torch.py")
    show = "import tessera_rl, sys; tessera_rl.main(['--help']); print('torch' in sys.modules)"
    shown = start(tmp_path, "-c", show)
    for name in ("run", "status", "scale", "stop", "sample", "weights", "captions", "reference",
                 "plan", "deploy"):  # fmt: skip
        assert f"\n  {name} " in shown.stdout
    assert shown.stdout.endswith("False\n")
    wrong = start(tmp_path, "-m", "tessera_rl", "stauts")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == ("error: there is no command 'stauts': did you mean 'tessera status'?\n")


@pytest.mark.parametrize("asked", [[], ["--version"], ["stauts"]])
def test_a_console_that_fails_is_no_traceback(asked: list[str]) -> None:
    line = [sys.executable, "-m", "tessera_rl", *asked]
    with open("/dev/full", "w") as full:
        one = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True)
        both = subprocess.run(line, stdout=full, stderr=full)
    full_disk = "error: the standard output cannot be written: No space left on device\n"
    assert (one.returncode, one.stderr == full_disk) == (
        (2, False) if asked == ["stauts"] else (1, True)
    )
    assert one.stderr.count("\n") == 1
    assert both.returncode == one.returncode


@pytest.mark.parametrize("command", ["stop", pytest.param("run", marks=pytest.mark.slow)])
def test_commands_call_themselves_by_the_users_name(tmp_path: Path, command: str) -> None:
    found = start(tmp_path, "-m", "tessera_rl", command, "--help")
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith(f"usage: tessera {command} ")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(invocation, "_current", Invocation())


def test_messages_name_the_command_that_was_used(
    started: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path("/runs/my run")
    assert resume_command(run) == "python -m learner.run --resume --run-dir '/runs/my run'"
    monkeypatch.setattr(invocation, "_current", Invocation(by_name=True))
    assert resume_command(run) == "tessera run --resume --run-dir '/runs/my run'"
    assert command_of("actors.weights") == "tessera weights"
    assert command_of("learner.miniature.arms") == "python -m learner.miniature.arms"


def test_a_reward_in_a_file_of_our_name_is_distinguished() -> None:
    with pytest.raises(ConfigError, match=r"rename yours, or name it by its file, ./rewards\.py:X"):
        import_user_reward(parse_user_reward("rewards:X=1"))
