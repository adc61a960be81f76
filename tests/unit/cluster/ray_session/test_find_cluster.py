"""Which cluster a configuration and an environment name, before Ray is started."""

from __future__ import annotations

import os
import platform
import socket
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest

from cluster.errors import ConfigError, FleetError
from cluster.ray_session import private, session
from cluster.ray_session.address import Address, GcsAnswer, current_cluster
from cluster.ray_session.private import NodeHere
from cluster.ray_session.session import RayConfig, check_node, check_ray, find_cluster
from learner import run as command

WELCOME = GcsAnswer("OK", ray=version("ray"), python=platform.python_version())


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a machine without a cluster, and a user without a token."""
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "")  # so that what the code sets is undone
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(session, "clusters_here", dict)
    (tmp_path / "ray").mkdir()
    return tmp_path


@pytest.fixture
def closed() -> int:
    """A port that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[GcsAnswer]:
    """Clusters answer everywhere, with these in turn; the last one stays."""
    answers = [WELCOME]
    monkeypatch.setattr(session, "probe", lambda address: None)
    monkeypatch.setattr(
        private, "ask_gcs", lambda *_: answers.pop(0) if len(answers) > 1 else answers[0]
    )
    return answers


def leave(temporary: Path, text: str) -> Path:
    file = temporary / "ray" / "ray_current_cluster"
    file.write_text(text)
    return file


@pytest.mark.parametrize("address", ["", "local"])
def test_without_an_address_a_private_ray_is_wanted(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_cluster(RayConfig(address=address)) is None
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert find_cluster(RayConfig(address=address)) is None
    monkeypatch.setenv("RAY_ADDRESS", "")
    assert find_cluster(RayConfig(address=address)) is None


def test_an_option_goes_before_the_environment(
    answers: list[GcsAnswer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert find_cluster(RayConfig()) == Address("10.0.0.1", 6379, "$RAY_ADDRESS")
    assert find_cluster(RayConfig(address="auto")) == Address("10.0.0.1", 6379, "$RAY_ADDRESS")
    assert find_cluster(RayConfig(address="10.0.0.2:1")) == Address("10.0.0.2", 1)
    assert find_cluster(RayConfig(address="local")) is None


def test_auto_is_what_ray_start_left(temporary: Path, answers: list[GcsAnswer]) -> None:
    file = leave(temporary, "10.0.0.3:6379")
    assert find_cluster(RayConfig(address="auto")) == Address("10.0.0.3", 6379, str(file))


def test_auto_of_a_dead_cluster_names_the_file_it_left(temporary: Path, closed: int) -> None:
    file = leave(temporary, f"127.0.0.1:{closed}")
    with pytest.raises(FleetError, match="If that cluster has ended, remove") as error:
        find_cluster(RayConfig(address="auto"))
    assert str(file) in str(error.value)


def test_auto_without_a_cluster() -> None:
    with pytest.raises(FleetError, match="no Ray cluster runs on this machine: start one by"):
        find_cluster(RayConfig(address="auto"))


def test_auto_takes_the_only_cluster_but_no_private_ray(
    answers: list[GcsAnswer], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = ["127.0.0.1:4001", "10.0.0.4:6379"]
    mine = os.getuid()
    monkeypatch.setattr(session, "clusters_here", lambda: dict.fromkeys(running, mine))
    found = find_cluster(RayConfig(address="auto"))
    assert found is not None
    assert str(found) == "10.0.0.4:6379"
    running.append("10.0.0.4:6380")
    with pytest.raises(FleetError, match=r"several .*: name one, 10\.0\.0\.4:6379 or 10"):
        find_cluster(RayConfig(address="auto"))


def test_auto_takes_no_cluster_of_another_user(
    answers: list[GcsAnswer], temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, other = os.getuid(), os.getuid() + 54321  # has no name
    there = {"10.0.0.4:6379": other}
    monkeypatch.setattr(session, "clusters_here", lambda: there)
    with pytest.raises(FleetError, match=rf"belongs to others \(10.0.0.4:6379, of user {other}\)"):
        find_cluster(RayConfig(address="auto"))
    file = leave(temporary, "10.0.0.4:6379")  # Ray's file of the cluster that was started last
    monkeypatch.setattr(session, "current_cluster", lambda _: left(file, other))
    with pytest.raises(FleetError, match=r"belongs to others \(10.0.0.4:6379, of user \d+\): name"):
        find_cluster(RayConfig(address="auto"))
    monkeypatch.setattr(session, "current_cluster", current_cluster)  # ours, which has ended
    with pytest.raises(FleetError, match=rf"belongs to others \(10.0.0.4:6379, of user {other}\)"):
        find_cluster(RayConfig(address="auto"))
    there["10.0.0.5:6380"] = mine
    found = find_cluster(RayConfig(address="auto"))
    assert str(found) == "10.0.0.5:6380"
    assert str(find_cluster(RayConfig(address="10.0.0.4:6379"))) == "10.0.0.4:6379"


def left(file: Path, user: int) -> Address | None:
    """A file that another user left."""
    found = current_cluster(str(file.parent))
    assert found is not None
    assert found.user == os.getuid()
    return replace(found, user=user)


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> dict[str, NodeHere]:
    """Nodes of the cluster; those named `here...` are on this machine, beside one of another
    cluster."""
    nodes: dict[str, NodeHere] = {"far": NodeHere("10.0.0.9", "/tmp/ray/sockets/raylet")}
    monkeypatch.setattr(private, "ask_nodes", lambda *_: nodes)
    monkeypatch.setattr(private, "nodes_here", lambda: frozenset({"here", "of another cluster"}))
    return nodes


def test_a_node_that_this_user_may_use(nodes: dict[str, NodeHere], tmp_path: Path) -> None:
    address = Address("10.0.0.4", 6379)
    with pytest.raises(FleetError, match="has no node on this machine"):
        check_node(address)
    nodes["here"] = NodeHere("10.0.0.4", str(tmp_path / "raylet"))
    with pytest.raises(FleetError, match="keeps its files where this program does not see them"):
        check_node(address)
    (tmp_path / "raylet").touch()
    check_node(address)


def test_the_node_of_another_user_is_refused(
    nodes: dict[str, NodeHere], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray would abort the process."""
    socket = tmp_path / "raylet"
    socket.touch()
    nodes["here"] = NodeHere("10.0.0.4", str(socket))
    monkeypatch.setattr(os, "access", lambda path, mode: (path, mode) != (socket, os.W_OK))
    with pytest.raises(FleetError, match=rf"belongs to \S+, and its socket {socket} cannot"):
        check_node(Address("10.0.0.4", 6379))


def test_a_proxy_in_the_way_is_said_before_a_private_ray_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_grpc_enable_http_proxy", "1")
    monkeypatch.setenv("https_proxy", "http://10.9.9.9:3128")
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(FleetError, match=r"would talk to 127\.0\.0\.1 through the proxy of"):
        check_ray(RayConfig())


def test_a_token_is_shown_to_a_cluster_of_this_machine_alone(
    temporary: Path, answers: list[GcsAnswer]
) -> None:
    """One that is named by its address could be anybody's: the user says so by RAY_AUTH_MODE."""
    (temporary / ".ray").mkdir()
    (temporary / ".ray" / "auth_token").write_text("abc")
    leave(temporary, "10.0.0.3:6379")
    answers[:] = [GcsAnswer("UNAUTHENTICATED"), WELCOME]
    assert find_cluster(RayConfig(address="auto"))
    assert os.environ.pop("RAY_AUTH_MODE") == "token"
    answers[:] = [GcsAnswer("UNAUTHENTICATED"), WELCOME]
    with pytest.raises(FleetError, match="set RAY_AUTH_MODE=token"):
        find_cluster(RayConfig(address="10.0.0.3:6379"))


def test_a_token_that_is_asked_for_by_the_environment_and_absent(
    answers: list[GcsAnswer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with pytest.raises(
        FleetError, match="RAY_AUTH_MODE=token is set, and no token is found: there is none in"
    ):
        find_cluster(RayConfig(address="10.0.0.3:6379"))


def test_what_is_no_address() -> None:
    with pytest.raises(ConfigError, match=r"--ray\.address is 'ray://head:10001'"):
        find_cluster(RayConfig(address="ray://head:10001"))


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "http://127.0.0.1:{}"])
def test_a_run_is_refused_in_seconds_and_makes_nothing(
    form: str,
    closed: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", form.format(closed))
    start, run = time.monotonic(), tmp_path / "run"
    assert command.main(["--run-dir", str(run)]) == 2
    assert time.monotonic() - start < 60
    assert "$RAY_ADDRESS" in capsys.readouterr().err
    assert not run.exists()
