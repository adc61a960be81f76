"""YAML that is refused because it would mean another thing than it looks."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.checkpoints.taming import read_project
from cluster.errors import CheckpointError, ConfigError
from cluster.io.strict_yaml import MalformedYamlError, load
from learner.config import dump, load_file, load_preset, parse_yaml
from rewards.scorers.user_rewards import parse_user_reward
from tests.fuzzing import check_reader


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("iterations: 3\niterations: 5", "line 2, column 1: the key 'iterations' is there twice"),
        ("learner: {lr: 1}\nseed: 1\nlearner: {}", "line 3.*'learner' is there twice.* line 1"),
        ("learner: {lr: 1.0, lr: 2.0}", "'lr' is there twice"),
        ("a: [{b: 1, b: 1}]", "'b' is there twice"),
        ("seed: 010", "reads 010 as an octal number: write 10"),
        ("seed: -0777", "octal number: write 777"),
        ("seed: 1:30", "1:30 as a number to the base 60"),
        ("seed: 1:30.5", "base 60"),
        ("x: 2001-99-99", "month must be in"),
        ("x: !!int ''", "cannot be read"),
        ("x: !!timestamp foo", "cannot be read"),
        ("[" * 20_000, "nested too deeply"),
        ("a: &a [*a]", "nested too deeply"),
        ("a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "\n".join(
            f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]" for a, b in zip("abcdefgh", "bcdefghi")
        ), "aliases"),
        ("!!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("a: 1\n---\na: 2", "single document"),
        ("\t a: 3", "line 1, column 1: .*cannot start any token"),
        ("a: \x00", "special characters"),
        ("? [1, 2]\n: 3", "unhashable key"),
    ],
)  # fmt: skip
def test_refused(text: str, said: str) -> None:
    with pytest.raises(MalformedYamlError, match=said):
        load(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("\ufeffa: 3", {"a": 3}),
        ("<<: {a: 4, b: 1}\na: 3", {"a": 3, "b": 1}),  # a merge is no second key
        ("x: &x {a: 1}\ny: *x", {"x": {"a": 1}, "y": {"a": 1}}),
        ("[0, 0o17, 0x10, 1_000, -3, 1e-5]", [0, "0o17", 16, 1000, -3, "1e-5"]),
        ("1: a\n'1': b", {1: "a", "1": "b"}),
        ("", None),
    ],
)  # fmt: skip
def test_taken(text: str, value: object) -> None:
    assert load(text) == value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("iterations: yes", "iterations must be a number, found true"),
        ("learner: {lr: true}", "learner.lr must be a number, found true"),
        ("learner: {betas: [off, 0.9]}", r"learner.betas\[0\] must be a number, found false"),
        ("seed: 010", "octal"),
        ("learner: {lr: 1.0}\nlearner: {warmup: 1}", "twice"),
    ],
)
def test_configurations(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_yaml(text, "mine.yaml")


def test_other_readers_of_yaml(tmp_path: Path) -> None:
    project = tmp_path / "x-project.yaml"
    project.write_text("model: {target: a}\nmodel: {target: b}")
    with pytest.raises(CheckpointError, match="twice"):
        read_project(project)
    with pytest.raises(ValueError, match="octal"):
        parse_user_reward("module:Reward=1,threads=010")


def test_damaged_configurations(tmp_path: Path) -> None:
    """Of users' own: a field that lost a letter is unknown; nothing but our error is raised."""
    path = tmp_path / "mine.yaml"
    path.write_text(dump(load_preset("llamagen-b-256")))
    check_reader(path, load_file, 150)
