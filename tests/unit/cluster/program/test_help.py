"""--help shows the options that people use, --help-all every one."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from actors.sample import COMMON as OF_SAMPLE
from actors.sample_source import SampleConfig
from cluster.program.help import Groups, _first_sentence, options_of, short_help
from learner.config import load_preset
from learner.evaluation.options import COMMON as OF_EVALUATE
from learner.evaluation.options import Command as EvaluateCommand
from learner.evaluation.options import Settings as EvaluateSettings
from learner.replay import COMMON as OF_REPLAY
from learner.replay import Command as ReplayCommand
from learner.replayed import Settings
from learner.rollouts.command import COMMON as OF_ROLLOUTS
from learner.rollouts.command import Output
from learner.rollouts.selection import Selection
from learner.run import COMMON, Command
from rewards.reference.build import COMMON as OF_REFERENCE
from rewards.reference.build import ReferenceConfig

LONGEST = 60  # lines, at 80 columns
COMMANDS = {
    "learner.run": (COMMON, [Command(), load_preset("miniature")]),
    "actors.sample": (OF_SAMPLE, [SampleConfig()]),
    "learner.rollouts": (OF_ROLLOUTS, [Selection(), Output()]),
    "learner.replay": (OF_REPLAY, [ReplayCommand(), Settings.of(load_preset("miniature"))]),
    "learner.evaluate": (
        OF_EVALUATE,
        [EvaluateCommand(), EvaluateSettings.of(load_preset("miniature"))],
    ),
    "rewards.reference": (OF_REFERENCE, [ReferenceConfig(images="", out=Path())]),
}


def text_of(command: str, option: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(command).main([option])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_is_short(
    command: str,
    option: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = text_of(command, option, capsys).splitlines()
    assert len(lines) <= LONGEST
    assert max(map(len, lines)) <= 80
    shown = [line.split()[0] for line in lines if line.startswith("  --")]
    groups, _ = COMMANDS[command]
    assert shown == [flag for flags in groups.values() for flag in flags]
    assert "--help-all shows every option" in lines[-1]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_all_shows_every_field(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = text_of(command, "--help-all", capsys)
    _, options = COMMANDS[command]
    flags = [option.flag for value in options for option in options_of(value)]
    assert len(flags) > 10
    hidden = [  # for YAML alone
        "--reward-pools", "--rewards.files", "--judge.further", "--rewards.further"
    ]  # fmt: skip
    shown = set(re.findall(r"--[\w.-]+", text))
    assert [flag for flag in flags if flag not in (*shown, *hidden)] == []


@pytest.mark.parametrize("command", ["learner.plan", "actors.weights", "actors.captions"])
def test_other_commands_are_short_as_they_are(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert len(text_of(command, "--help", capsys).splitlines()) <= LONGEST


@pytest.mark.parametrize("command", COMMANDS)
def test_short_texts_stand_alone(command: str) -> None:
    """No open bracket or quote (but for intervals such as [0, 1)), no list of values for a text."""
    _, options = COMMANDS[command]
    for option in (option for value in options for option in options_of(value)):
        text = re.sub(r"[\[(]0, 1[\])]", "", option.text)
        assert text, option
        assert not re.match(r"Of |With --|[a-z0-9]+:", text), option
        assert all(text.count(left) == text.count(right) for left, right in ("()", "[]")), option
        assert all(text.count(quote) % 2 == 0 for quote in '"`'), option


@pytest.mark.parametrize(
    ("text", "short"),
    [
        (
            "Resume it (default: the newest. Or so) now. More.",
            "Resume it (default: the newest. Or so) now",
        ),
        ('One of "a; b", e.g. this: that; else none.', 'One of "a; b", e.g. this: that'),
        ("Images in all (four).", "Images in all"),
    ],
)
def test_first_sentence(text: str, short: str) -> None:
    assert _first_sentence(text) == short


def test_defaults_are_those_of_the_preset(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        importlib.import_module("learner.run").main(["--preset", "llamagen-b-256", "--help"])
    assert "Learning iterations (400)" in capsys.readouterr().out


def test_an_option_that_is_not_there_cannot_be_called_common() -> None:
    groups: Groups = {"what": ("--preset", "--iteratoins")}
    with pytest.raises(KeyError, match="iteratoins"):
        short_help("run", "Runs.", groups, [Command(), load_preset("miniature")])


def test_hidden_options_are_suggested(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        importlib.import_module("learner.run").main(["--loss.importance-cup", "2"])
    assert stop.value.code == 2
    assert "--loss.importance-cap" in capsys.readouterr().err
