"""Secrets are refused where they would be written down, and filled in where they are named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cluster.control.discovery import check_run_name
from cluster.errors import ConfigError
from cluster.program.secrets import check_environment, secret_variables, with_environment
from learner.config import dump, validate
from learner.run import main
from rewards.scorers.user_rewards import parse_user_reward
from tests.small_run import small_config

HIDDEN = "hunter2hunter2"


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "OPENAI_API_KEY", "APIKEY", "aws_secret", "DB_PASSWORD", "TOKEN_FILE_KEY"]
)
def test_a_secret_that_is_written_out_is_refused_and_not_repeated(name: str) -> None:
    with pytest.raises(ValueError, match=rf"env_vars\.{name} looks like a secret") as error:
        check_environment({"env_vars": {name: HIDDEN}})
    assert f"${{{name}}}" in str(error.value)
    assert HIDDEN not in str(error.value)
    check_environment({"env_vars": {name: f"${{{name}}}"}})


def test_what_is_no_secret_passes() -> None:
    check_environment({})
    check_environment({"env_vars": {"TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": "/a:/b"}})
    check_environment({"pip": ["git+https://example.org/a.git"]})


def test_passwords_in_addresses_are_refused() -> None:
    with pytest.raises(ValueError, match="URL with a password") as error:
        check_environment({"pip": {"packages": [f"git+https://me:{HIDDEN}@example.org/a.git"]}})
    assert HIDDEN not in str(error.value)


def test_references_are_filled_in_and_kept_from_ray() -> None:
    environment = {"env_vars": {"PLAIN": "1", "HEADER": "Bearer ${MINE}"}, "pip": ["x"]}
    open_ones, hidden = secret_variables(environment, {"MINE": HIDDEN})
    assert open_ones == {"pip": ["x"], "env_vars": {"PLAIN": "1"}}
    assert hidden == {"HEADER": f"Bearer {HIDDEN}"}
    assert secret_variables({}, {}) == ({}, {})
    with pytest.raises(ConfigError, match=r"refers to \$\{MINE\}, but the environment"):
        secret_variables(environment, {})


def test_a_role_has_its_variables_before_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TESSERA_TEST_TOKEN", raising=False)

    class Role:
        def __init__(self, config: str) -> None:
            self.found = (config, os.environ["TESSERA_TEST_TOKEN"])

    monkeypatch.setenv("TESSERA_TEST_TOKEN", "before")
    made = with_environment(Role, {"TESSERA_TEST_TOKEN": HIDDEN})
    assert made.__name__ == "Role"
    assert made("a").found == ("a", HIDDEN)
    assert with_environment(Role, {}) is Role


POOLS = {"rewards": {"extra": ["tests.stand_ins:Environment=0.1,variable=X,pool=apart"]}}


def test_a_configuration_names_secrets_and_is_the_same_when_resumed() -> None:
    named = {"apart": {"runtime_env": {"env_vars": {"API_TOKEN": "${MY_TOKEN}"}}}}
    config = small_config(**POOLS, reward_pools=named)
    assert "${MY_TOKEN}" in dump(config)
    literal = {"apart": {"runtime_env": {"env_vars": {"API_TOKEN": HIDDEN}}}}
    with pytest.raises(ConfigError, match="looks like a secret") as error:
        small_config(**POOLS, reward_pools=literal)
    assert HIDDEN not in str(error.value)
    with pytest.raises(ConfigError) as error:  # not in errors of other fields either
        validate({"reward_pools": {"apart": {"num_server": 1, "runtime_env": literal}}}, "x")
    assert HIDDEN not in str(error.value)


def test_options_of_own_rewards_are_no_place_for_secrets() -> None:
    with pytest.raises(ValueError, match="the option api_key looks like a secret") as error:
        parse_user_reward(f"my:Judge=1,api_key={HIDDEN}")
    assert HIDDEN not in str(error.value)
    assert parse_user_reward("my:Judge=1,max_tokens=5,key=a").options == {
        "max_tokens": 5,
        "key": "a",
    }


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", "a\nb", "x" * 201])
def test_names_that_lead_elsewhere_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="a run is named after its directory"):
        check_run_name(name)
    check_run_name("night 2, é")


def test_a_run_directory_needs_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--inline", "--run-dir", ".."]) == 2
    assert "a run is named after its directory" in capsys.readouterr().err


def test_a_worker_of_a_cluster_works_where_the_driver_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that relative paths lead to the same files, on storage that all nodes share."""

    class Here:
        def __init__(self) -> None:
            self.found = Path.cwd()

    package = tmp_path / "runtime_resources" / "_ray_pkg_1"
    package.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shared").mkdir()
    assert with_environment(Here, {}, directory=str(tmp_path / "nowhere"))().found == tmp_path
    assert (
        with_environment(Here, {}, directory=str(tmp_path / "shared"))().found
        == tmp_path / "shared"
    )
    monkeypatch.chdir(package)  # of its pool
    assert with_environment(Here, {}, directory=str(tmp_path / "shared"))().found == package
