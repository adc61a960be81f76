from __future__ import annotations

import pytest
import tyro

from cluster.errors import ConfigError
from cluster.placement.config import PlacementConfig
from cluster.placement.labels import check_selector, unmet
from cluster.roles import Resources
from learner.checkpoints.resume import check_resume
from learner.config import RunConfig, dump, parse_yaml, to_dict
from learner.run import Command, with_flags


@pytest.mark.parametrize(
    "selector",
    [
        {"tessera-role": "sampler"},
        {"ray.io/accelerator-type": "in(H100,H200)"},
        {"a": "in(b, c)", "example.com/zone": "!in(x)", "m_t": "!spot"},
        {},
    ],
)
def test_selectors_of_ray_are_taken(selector: dict[str, str]) -> None:
    from ray._private.label_utils import validate_label_selector

    check_selector(selector)
    assert validate_label_selector(selector) is None  # Ray agrees


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ({"-role": "a"}, "'-role' is no key of a label"),
        ({"": "a"}, "'' is no key"),
        ({"a/b/c_": "a"}, "is no key"),
        ({"x" * 64: "a"}, "is no key"),
        ({"a" * 254 + "/b": "a"}, "is no key"),
        ({"role": ""}, r"role must be VALUE, in\(A,B\), !VALUE or !in\(A,B\)"),
        ({"role": "in()"}, "found 'in\\(\\)'"),
        ({"role": "in(a,)"}, "role must be"),
        ({"role": "in(a,!b)"}, "role must be"),
        ({"role": "!!a"}, "role must be"),
        ({"role": "a b"}, "role must be"),
        ({"role": "a\n"}, "role must be"),
        ({"role": "x" * 64}, "role must be"),
    ],
)
def test_others_are_refused(selector: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Resources(labels=selector)


@pytest.mark.parametrize(
    ("value", "meets", "not_met"),
    [
        ("a", ["a"], ["b", None, "A"]),
        ("in(a,b)", ["a", "b"], ["c", None]),
        ("in(a, b)", ["a", "b"], ["c", None]),
        ("!a", ["b", None], ["a"]),
        ("!in(a,b)", ["c", None], ["a", "b"]),
    ],
)
def test_what_meets_a_selector(value: str, meets: list, not_met: list) -> None:
    def labels(found: str | None) -> dict[str, str]:
        return {"other": "x"} if found is None else {"key": found}

    assert all(unmet({"key": value}, labels(each)) == "" for each in meets)
    assert all(unmet({"key": value}, labels(each)) == f"key={value}" for each in not_met)


def test_every_part_must_be_met() -> None:
    selector = {"a": "1", "b": "!2"}
    assert unmet(selector, {"a": "1"}) == ""
    assert unmet(selector, {"a": "1", "b": "2"}) == "b=!2"
    assert unmet(selector, {}) == "a=1"


def with_words(*words: str, base: RunConfig | None = None) -> RunConfig:
    return with_flags(list(words), Command(), base or RunConfig())


def test_the_command_line_takes_words() -> None:
    config = with_words(
        "--sampler.labels", "tessera-role=sampler", "gpu=!in(a,b)",
        "--reward.labels", "tessera-role=reward-server",
        "--learner.accelerator-type", "H100",
        "--placement.samplers-with-reward-servers", "--placement.wait-s", "5",
    )  # fmt: skip
    assert config.sampler.labels == {"tessera-role": "sampler", "gpu": "!in(a,b)"}
    assert config.reward.labels == {"tessera-role": "reward-server"}
    assert config.learner.accelerator_type == "H100"
    assert config.placement == PlacementConfig(samplers_with_reward_servers=True, wait_s=5)
    other = with_words("--sampler.labels", "zone=b", base=config)
    assert (other.sampler.labels, other.learner) == ({"zone": "b"}, config.learner)
    assert with_words("--sampler.labels", base=config).sampler.labels == {}
    assert with_words("--seed", "3", base=config).sampler.labels == config.sampler.labels


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tessera-role"], "expected KEY=VALUE"),
        (["a=b", "a=c"], "a is there twice"),
        (["a="], "expected KEY=VALUE"),
    ],
)
def test_words_that_are_no_selector_are_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        with_words("--sampler.labels", *words)
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert caught.value.code == 2
    assert message in said
    assert "--sampler.labels" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sampler.labels", "role=in()"], "role must be VALUE"),
        (["--sampler.accelerator-type", "H100,A100"], "accelerator_type is a name"),
        (["--placement.wait-s", "0"], "wait_s must be > 0 seconds, found 0"),
    ],
)
def test_a_bad_value_on_the_command_line_is_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        with_words(*words)
    assert caught.value.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_files_have_them_too() -> None:
    text = "sampler: {labels: {tessera-role: sampler}, accelerator_type: L4}"
    config = parse_yaml(text, "here")
    assert config.sampler.labels == {"tessera-role": "sampler"}
    assert parse_yaml(dump(config), "again") == config
    with pytest.raises(ConfigError, match=r"sampler.labels.a.*string"):
        parse_yaml("sampler: {labels: {a: 3}}", "here")
    with pytest.raises(ConfigError, match=r"placement.learners"):
        parse_yaml("placement: {learners: together}", "here")


def test_a_resumed_run_may_change_them() -> None:
    saved = RunConfig()
    wanted = with_words("--sampler.labels", "a=b", "--placement.learners", "any")
    check_resume(saved, wanted)
    check_resume(wanted, saved)
    assert "labels" in to_dict(saved)["sampler"]


def test_every_role_is_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tyro.cli(RunConfig, args=["--help"])
    said = capsys.readouterr().out
    for role in ("sampler", "reward", "learner"):
        assert f"--{role}.labels" in said
