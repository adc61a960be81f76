"""Rewards in a file of the user's own: any name, anywhere; kept with the run, as they were."""

from __future__ import annotations

import inspect
import os
import sys
from dataclasses import replace
from operator import itemgetter
from pathlib import Path

import numpy as np
import pytest

from cluster.errors import ConfigError
from cluster.messages import Condition
from learner.config import RunConfig, dump, parse_yaml
from learner.fleet_plan import fleet_plan
from learner.run import main, parse
from learner.runs.run_dir import RunDirectory
from rewards.config import RewardsConfig, RewardServerConfig
from rewards.scorers.user_reward_files import changed_since
from rewards.scorers.user_rewards import import_user_reward, load_user_reward, parse_user_reward
from rewards.servers.reward_server import RewardServer
from tests.small_run import small_config

SCALED = """\
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FACTOR = {factor}


@dataclass
class Scaled:
    device: str
    by: float = 1.0

    def __call__(self, images, conditions) -> np.ndarray:
        return np.array([image.mean() for image in images]) * FACTOR * self.by
"""
CONDITIONS = [Condition(text="a", class_index=0)] * 2
IMAGES = np.full((2, 8, 8, 3), 4, np.uint8)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards.py").write_text(SCALED.format(factor=2))
    return tmp_path


@pytest.mark.parametrize(
    ("text", "file", "name"),
    [
        ("./my_rewards.py:Scaled=0.5,by=3", "./my_rewards.py", "scaled"),
        ("my_rewards.py:Scaled", "my_rewards.py", "scaled"),
        ("~/a b/my, own=1.py:Look.at=2", "~/a b/my, own=1.py", "at"),
        ("/somewhere/rewards.py:CLIPScore=1,name=mine", "/somewhere/rewards.py", "mine"),
        ("../x.py:A=1", "../x.py", "a"),
    ],
)
def test_what_is_written(text: str, file: str, name: str) -> None:
    extra = parse_user_reward(text)
    assert (extra.file, extra.name) == (file, name)


def test_dotted_paths_are_no_files() -> None:
    assert parse_user_reward("my_pkg.rewards:Aesthetic=0.5").file == ""
    for text in ("./my_rewards:Scaled=1", "./my_rewards.py=1", "./my_rewards.py:=1", ".py:A"):
        with pytest.raises(ValueError, match=r"one in a file with \./name\.py in the place of"):
            parse_user_reward(text)


def test_a_weight_beside_a_file_is_checked() -> None:
    with pytest.raises(ValueError, match="the weight must be a number, found 'much'"):
        parse_user_reward("./a=b.py:B=much")


@pytest.mark.parametrize("name", ["rewards.py", "learner.py", "numpy.py", "a b.py", "1.py", "ü.py"])
def test_it_may_be_called_anything(here: Path, name: str) -> None:
    (here / name).write_text(SCALED.format(factor=5))
    for file in (f"./{name}", str(here / name)):
        scorer = load_user_reward(parse_user_reward(f"{file}:Scaled=1,by=2"), "cpu")
        assert scorer(IMAGES, CONDITIONS).tolist() == [40, 40]
    assert sys.modules["numpy"] is np
    assert str(here) not in sys.path


def test_a_home_directory_is_found(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here))
    assert (
        load_user_reward(parse_user_reward("~/my_rewards.py:Scaled"), "cpu")(IMAGES, CONDITIONS)[0]
        == 8
    )


def test_a_run_keeps_the_text_and_continues_with_it(here: Path) -> None:
    extra = ["./my_rewards.py:Scaled=0.5", "./my_rewards.py:Scaled=1,name=more,by=3"]
    off, pixels = {"enabled": False}, {"network": "pixels"}
    rewards = {"extra": extra, "clip": off, "hps": off, "features": pixels}
    config = small_config(rewards=rewards)
    kept = parse_yaml(
        dump(config_with_files(config)), "a run's config.yaml"
    )  # as --resume and a checkpoint elsewhere read it
    assert changed_since(kept.rewards.files) == []
    (here / "my_rewards.py").write_text(SCALED.format(factor=7))
    (line,) = changed_since(kept.rewards.files)
    assert line.startswith("./my_rewards.py has changed since the run began, which continues with")
    os.chdir("/")  # another directory, another machine
    server = RewardServer(RewardServerConfig(rewards=kept.rewards, judge=None))
    scorers = server._panels["rewards"]._scorers
    assert scorers["scaled"](IMAGES, CONDITIONS).tolist() == [8, 8]
    assert scorers["more"](IMAGES, CONDITIONS).tolist() == [24, 24]
    (here / "my_rewards.py").unlink()
    assert changed_since(kept.rewards.files) == []
    source = inspect.getsource(type(scorers["more"]._scorer))
    assert "class Scaled" in source  # torch.jit and triton read it


def config_with_files(config: RunConfig) -> RunConfig:
    return replace(config, rewards=config.rewards.with_files())


def test_the_command_line_reads_it_when_the_run_begins(here: Path) -> None:
    _, config, _ = parse(["--rewards.extra", "./my_rewards.py:Scaled=0.5"])
    (kept,) = config.rewards.files.values()
    assert kept.path == str(here / "my_rewards.py")
    assert kept.text == (here / "my_rewards.py").read_text()
    assert fleet_plan(config).reward_server.config.rewards.user_rewards()[0].kept == kept


def test_a_resumed_run_continues_with_what_it_began_with(here: Path) -> None:
    """Also where the command line names the file again, and where it is gone."""
    begun = config_with_files(small_config(rewards={"extra": ["./my_rewards.py:Scaled=0.5"]}))
    RunDirectory.create(str(here / "run"), begun)
    (here / "my_rewards.py").write_text(SCALED.format(factor=7))
    again = ["--resume", "--run-dir", str(here / "run")]
    for arguments in (again, [*again, "--rewards.extra", "./my_rewards.py:Scaled=0.5"]):
        assert parse(arguments)[1].rewards == begun.rewards
    (here / "my_rewards.py").unlink()
    assert parse(again)[1].rewards == begun.rewards
    with pytest.raises(ConfigError, match=r"--resume continues the same run.*rewards\.extra"):
        parse([*again, "--rewards.extra", "./my_rewards.py:Scaled=2"])


def test_odd_texts_survive_config_yaml(here: Path) -> None:
    text = '# coding: utf-8\r\nA = """\ttab \x0c form \x85 next \u2028 line  \n#: é ☃ 😀"""\n'
    (here / "odd.py").write_bytes(b"\xef\xbb\xbf" + text.encode())
    config = small_config(rewards={"extra": ["./odd.py:A=0"]})
    assert parse_yaml(dump(config_with_files(config)), "x") == config_with_files(config)


def test_a_text_that_was_changed_is_refused(here: Path) -> None:
    text = dump(config_with_files(small_config(rewards={"extra": ["./my_rewards.py:Scaled"]})))
    with pytest.raises(ConfigError, match=r"my_rewards\.py is damaged, or was changed"):
        parse_yaml(text.replace("FACTOR = 2", "FACTOR = 9"), "x")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, r"\./bad\.py is to be a Python file, found no such file \(/"),
        ("def broken(:\n", r"\./bad\.py is no Python: .* \(line 1\)"),
        ("x" * (1 << 20) + "y", r"\./bad\.py has 1\.0 MiB, and at most 1 are kept"),
        (b"\xff\xfe\x00", r"\./bad\.py (is no Python|cannot be read)"),
    ],
)
def test_a_file_that_is_none_is_reported_first(
    here: Path, text: str | bytes | None, told: str
) -> None:
    if text is not None:
        (here / "bad.py").write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ConfigError, match=told):
        parse(["--rewards.extra", "./bad.py:A=1"])
    with pytest.raises(ConfigError, match=told):  # also for a pool of which nobody here can know
        RewardsConfig(extra=("./bad.py:A=1,pool=other",)).with_files()


def test_a_directory_is_no_file(here: Path) -> None:
    (here / "bad.py").mkdir()
    assert main(["--rewards.extra", "./bad.py:A=1"]) == 2


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "import nowhere_at_all\n",
            "No module named 'nowhere_at_all' (bad.py, line 1). Only this ",
        ),
        ("from . import sibling\n", "attempted relative import"),
        ("raise SystemExit(3)\n", "SystemExit: 3 (bad.py, line 1)"),
        ("\n\n1 / 0\n", "ZeroDivisionError: division by zero (bad.py, line 3)"),
        ("B = 1\n", "there is no 'A' in it"),
        ("A = 1\n", "is a int, which cannot be called to build a scorer: name a class"),
        ("class A: pass\n", "is called with (device) to build the scorer, but"),
        (
            "class A:\n    def __init__(self, device): pass\n",
            "the class lacks __call__: define __call__(self, images, conditions)",
        ),
        (
            "class A:\n    def __init__(self, device): pass\n"
            "    def __call__(self, images): pass\n",
            "its __call__ is called with (images, conditions), but too many positional",
        ),
        (
            "class A:\n    def __init__(self, device): pass\n"
            "    async def __call__(self, images, conditions): pass\n",
            "its __call__ is async",
        ),
        (
            "import abc\nclass A(abc.ABC):\n    def __init__(self, device): pass\n"
            "    def __call__(self, images, conditions): pass\n"
            "    @abc.abstractmethod\n    def net(self): pass\n",
            "the class lacks net",
        ),
    ],
)
def test_what_is_wrong_with_a_reward_is_one_clear_error(here: Path, text: str, told: str) -> None:
    (here / "bad.py").write_text(text)
    for _ in range(2):  # a failed import leaves nothing behind
        with pytest.raises(ConfigError) as caught:
            import_user_reward(parse_user_reward("./bad.py:A=1"))
        assert str(caught.value).startswith("rewards.extra: ./bad.py:A")
        assert told in str(caught.value)
        assert "\n" not in str(caught.value)


def test_what_says_nothing_of_its_signature_is_believed(here: Path) -> None:
    (here / "odd.py").write_text("from operator import itemgetter as A\n")
    assert import_user_reward(parse_user_reward("./odd.py:A=1")) is itemgetter


def test_a_file_is_imported_once_in_a_process(here: Path) -> None:
    count = "import sys\nsys.seen = getattr(sys, 'seen', 0) + 1\n"
    (here / "counts.py").write_text(f"{count}from operator import itemgetter as A\n")
    for options in ("", ",name=again"):
        import_user_reward(parse_user_reward(f"./counts.py:A=1{options}"))
    assert sys.__dict__.pop("seen") == 1
