"""Every private name that `cluster.ray_session.private` uses of Ray: what a new Ray broke."""

from __future__ import annotations

import inspect
import os
import platform
import stat
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import ray
from packaging.requirements import Requirement

from cluster.errors import FleetError
from cluster.ray_session import private, session
from cluster.ray_session.address import GcsAnswer, parse_address
from cluster.ray_session.session import RaySession
from cluster.ray_session.token import TOKEN, find_token, token

ROOT = Path(__file__).parents[2]
WAIT_S = 120.0
GROUP = "beside"


class Counter:
    def __init__(self, start: int) -> None:
        if start < 0:
            raise ValueError("below nothing")
        self.value = start

    def busy(self, seconds: float) -> float:
        time.sleep(seconds)
        return time.monotonic()

    def token(self) -> str:
        return os.environ[TOKEN]

    def whose(self) -> str:
        return ray.get_runtime_context().get_actor_id()


def start(value: int) -> Any:
    wrapped = ray.remote(num_cpus=0, concurrency_groups={GROUP: 1})(Counter)
    return wrapped.remote(value)


@pytest.fixture(scope="module")
def counter(ray_session: RaySession) -> Any:
    handle = start(7)
    ray.get(private.started(handle), timeout=WAIT_S)
    return handle


def test_the_bound_names_the_ray_that_these_tests_ran_with() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bound = next(r for r in map(Requirement, project["dependencies"]) if r.name == "ray")
    major, minor, *_ = ray.__version__.split(".")
    later = f"{major}.{int(minor) + 1}.0"
    assert bound.specifier.contains(ray.__version__)
    assert not bound.specifier.contains(later), "private names: one minor version at a time"


def test_loopback_is_still_rays_switch() -> None:
    from ray._private import ray_constants

    assert ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR == private.ONE_MACHINE
    before = ray_constants.ENABLE_RAY_CLUSTER, os.environ.get(private.ONE_MACHINE)
    with private.loopback():
        assert os.environ[private.ONE_MACHINE] == "0"
    assert (ray_constants.ENABLE_RAY_CLUSTER, os.environ.get(private.ONE_MACHINE)) == before


def test_a_private_ray_is_on_loopback(ray_session: RaySession) -> None:
    (node,) = ray.nodes()
    assert node["NodeManagerAddress"] == "127.0.0.1"
    assert ray_session.address.startswith("127.0.0.1:")


def test_a_private_ray_is_shown_a_token(ray_session: RaySession) -> None:
    assert private.shows_token() is True


def test_workers_have_the_token_whatever_becomes_of_its_file(counter: Any) -> None:
    find_token()
    assert ray.get(counter.token.remote(), timeout=WAIT_S) == token(os.environ)


def test_the_control_service_says_its_versions(ray_session: RaySession) -> None:
    """Shown the token that it asks for; and what a wrong one, or none, is answered with."""
    address = ray_session.address
    assert find_token()
    answer = private.ask_gcs(address, token(os.environ), WAIT_S)
    assert answer == GcsAnswer("OK", "", ray.__version__, platform.python_version(), True)
    for shown in ("", "wrong"):
        assert private.ask_gcs(address, shown, WAIT_S).code == "UNAUTHENTICATED"


def test_what_is_free_of_each_node_is_told_alike_before_and_after_joining(
    ray_session: RaySession,
) -> None:
    (node,) = ray.nodes()
    (asked,) = private.ask_free(ray_session.address, token(os.environ), WAIT_S)
    ((key, free),) = private.free_per_node().items()
    assert key == node["NodeID"] == asked.id
    assert asked.name == node["NodeManagerAddress"]
    assert asked.labels == node["Labels"]
    assert 0 <= asked.cpus <= node["Resources"]["CPU"]
    assert asked.cpus + asked.used.get("CPU", 0) == pytest.approx(node["Resources"]["CPU"])
    assert asked.cpus == pytest.approx(free.get("CPU", 0))
    with pytest.raises(FleetError, match="are not told"):
        private.ask_free(ray_session.address, "wrong", WAIT_S)


def test_a_private_ray_has_no_autoscaler(ray_session: RaySession) -> None:
    assert private.autoscaler() == private.NodeAutoscaler(found=False)


def test_a_group_is_on_the_node_that_it_is_given(ray_session: RaySession) -> None:
    """With several nodes: `test_placement_groups.py`."""
    (node,) = ray.nodes()
    for target in (node["NodeID"], "", "a" * 56):  # the last one is gone
        group = private.place_on_one_node([{"CPU": 0.01}] * 2, [{}, {"x": "!y"}], target)
        assert group.wait(WAIT_S)
        table = ray.util.placement_group_table(group)
        assert set(table["bundles_to_node_id"].values()) == {node["NodeID"]}
        ray.util.remove_placement_group(group)


def test_nodes_and_clusters_of_this_machine_are_found(ray_session: RaySession) -> None:
    (node,) = ray.nodes()
    assert node["NodeID"] in private.nodes_here()
    assert private.clusters_here()[ray_session.address] == os.getuid()
    asked = private.ask_nodes(ray_session.address, token(os.environ), WAIT_S)
    found = asked[node["NodeID"]]
    assert found.address == node["NodeManagerAddress"]
    assert stat.S_ISSOCK(os.stat(found.socket).st_mode)
    session.check_node(parse_address(ray_session.address, "test"))
    with pytest.raises(FleetError, match="are not told"):
        private.ask_nodes(ray_session.address, "wrong", WAIT_S)


def test_a_private_ray_gets_its_directory() -> None:
    """Rays of other tests show that it is used; here, that `ray.init` still takes the option."""
    from ray._private.worker import init

    assert "_temp_dir" in private.in_directory("/tmp/short")
    assert "_temp_dir" in inspect.getsource(init)
    assert private.in_directory("") == {}


def test_one_attempt_is_still_rays_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private.node import Node

    name = "RAY_gcs_server_port_wait_time_s"
    assert name in inspect.getsource(Node)
    monkeypatch.delenv(name, raising=False)
    with private.one_attempt():
        assert os.environ[name] == "1"
    assert name not in os.environ


def test_actors_have_ids_nodes_and_processes(counter: Any) -> None:
    number = private.actor_id(counter)
    assert number == ray.get(counter.whose.remote(), timeout=WAIT_S)
    pid = ray.get(private.call_inside(counter, lambda _: os.getpid()), timeout=WAIT_S)
    assert private.living_actors()[number] == {"node": "127.0.0.1", "pid": pid}


def test_a_killed_actor_lives_no_more(ray_session: RaySession) -> None:
    handle = start(0)
    ray.get(private.started(handle), timeout=WAIT_S)
    number = private.actor_id(handle)
    assert number in private.living_actors()
    ray.kill(handle)
    deadline = time.monotonic() + WAIT_S
    while number in private.living_actors():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_an_actor_that_cannot_start_says_why(ray_session: RaySession) -> None:
    with pytest.raises(ray.exceptions.RayActorError, match="below nothing") as caught:
        ray.get(private.started(start(-1)), timeout=WAIT_S)
    assert caught.value.actor_init_failed


def test_a_function_is_called_with_the_instance(counter: Any) -> None:
    inside = private.call_inside(counter, lambda instance: instance.value)
    assert ray.get(inside, timeout=WAIT_S) == 7


def test_a_function_is_called_beside_work(counter: Any) -> None:
    """Before the work that it was sent after is done: in the thread of its own group."""
    working = counter.busy.remote(3.0)
    asked = private.call_inside(counter, lambda _: time.monotonic(), group=GROUP)
    in_order = private.call_inside(counter, lambda _: time.monotonic())
    beside, ended, after = ray.get([asked, working, in_order], timeout=WAIT_S)
    assert beside < ended <= after


def test_a_function_inside_takes_arguments_and_returns_several(counter: Any) -> None:
    given = ray.put(2)
    pair = private.call_inside(counter, lambda c, n: (c.value, n), given, num_returns=2)
    assert ray.get(list(pair), timeout=WAIT_S) == [7, 2]
