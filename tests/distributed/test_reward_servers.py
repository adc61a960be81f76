"""Reward servers on real Ray: any number, any batching, deaths, pools, environments, scaling."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from cluster.control.control_actor import (
    FleetStatus,
    RunConnection,
    find_control_actor,
)
from cluster.control.discovery import RunLocation
from cluster.errors import FleetError, TesseraError
from cluster.fleet import InlineFleet
from cluster.ray_backend.fleet import RayFleet
from cluster.ray_session.session import RaySession
from cluster.scale import scale
from cluster.scheduling.pool import State, Worker, WorkerPool
from cluster.scheduling.work_queue import Waiting
from learner.fleet_plan import fleet_plan
from learner.loop import Iteration
from rewards.servers.reward_server import RewardServer
from tests.bench.reward_server import requests
from tests.distributed.failures.kills import pid_of
from tests.distributed.stubs import (
    START_S,
    DistinctSampler,
    Once,
    SlowScorer,
    distinct_images,
    echo_plan,
    servers_alone,
    slow_plan,
)
from tests.distributed.stubs import requests as stub_requests
from tests.small_run import run_training, small_config
from tests.stand_ins import instant_images

SLOW = "tests.stand_ins:Brightness=0.3,seconds=0.15"
OFF = {"enabled": False}
PIXELS = {"features": {"network": "pixels"}}
PLAIN = {"clip": OFF, "hps": OFF, **PIXELS}
"""Rewards that need no network."""
TOGETHER = {"max_batch": 16, "max_wait_ms": 30.0}


def rewards_of(iterations: list[Iteration]) -> dict[str, np.ndarray]:
    names = iterations[0].advantages.rewards
    return {
        name: np.stack([done.advantages.rewards[name] for done in iterations]) for name in names
    }


@pytest.fixture(scope="module")
def alone() -> list[Iteration]:
    config = small_config(rewards={"extra": [SLOW.replace("0.15", "0.0")]})
    with InlineFleet(fleet_plan(config)) as fleet:
        return run_training(config, fleet)


class KillsInMidBatch(RayFleet):
    """Kills the reward server that gets the first group of iteration 1, while it scores."""

    victims: list[int]

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        send = self._group_calls.send

        def send_and_kill(pool: WorkerPool, picked: Sequence[Waiting], worker: Worker) -> None:
            send(pool, picked, worker)
            asked = picked[0].task.request
            first = (asked.stream, asked.iteration) == ("train", 1) and not self.victims
            if first and pool is not self._samplers:
                pid = pid_of(worker)
                time.sleep(0.05)  # of the scorer's .15 s
                os.kill(pid, signal.SIGKILL)
                self.victims.append(pid)

        self._group_calls.send = send_and_kill


def test_scores_do_not_depend_on_who_dies(ray_session: RaySession) -> None:
    """Batching across groups, so that the last bits of a score are not bound to be the same."""
    rewards = {**PIXELS, "extra": [SLOW]}
    options = {"num_reward_servers": 2, "reward": TOGETHER, "rewards": rewards}
    plan = servers_alone(fleet_plan(small_config(**options)))
    plan = dataclasses.replace(
        plan, sampler=dataclasses.replace(plan.sampler, factory=DistinctSampler)
    )
    asked = [dataclasses.replace(request, iteration=1) for request in requests(12)]
    with KillsInMidBatch(plan, ray_session) as fleet:
        fleet.victims = []
        found = [group.scores for group in fleet.collect(fleet.submit(asked))]
        assert fleet.restarts == len(fleet.victims) == 1
    server = RewardServer(plan.reward_server.config)
    for request, scores in zip(asked, found, strict=True):
        expected = server.score(request, distinct_images(request))
        assert scores.errors == (None,) * request.num_rollouts
        for name, values in {**expected.scores, **expected.features}.items():
            ours = {**scores.scores, **scores.features}[name]
            np.testing.assert_allclose(ours, values, rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.slow  # scores: the test above; moments after the loss: test_lost_workers.py
@pytest.mark.parametrize(("servers", "kill"), [(1, True), (2, True), (4, False)])
def test_rewards_do_not_depend_on_how_many_there_are_or_who_dies(
    ray_session: RaySession, alone: list[Iteration], servers: int, kill: bool
) -> None:
    """Batching across groups, so that the last bits of a score are not bound to be the same."""
    options = {"num_reward_servers": servers, "reward": TOGETHER, "rewards": {"extra": [SLOW]}}
    config = small_config(num_samplers=1, **options)
    kind = KillsInMidBatch if kill else RayFleet
    with kind(fleet_plan(config), ray_session) as fleet:
        fleet.victims = []
        commits: list[int] = []
        moments = fleet.moments

        class Counting:
            def __getattr__(self, name: str) -> Any:
                if name == "commit":
                    return lambda iteration, *rest, **options: (
                        commits.append(iteration),
                        moments.commit(iteration, *rest, **options),
                    )[1]
                return getattr(moments, name)

        type(fleet).moments = property(lambda self: Counting())
        try:
            done = run_training(config, fleet)
        finally:
            del type(fleet).moments
            RayFleet.moments = MOMENTS
        assert fleet.restarts == len(fleet.victims) == int(kill)
    assert commits == [0, 1, 2, 3]
    expected, found = rewards_of(alone), rewards_of(done)
    worst = {name: np.abs(found[name] - expected[name]).max() for name in expected}
    print(f"servers {servers}, kill {kill}: largest differences {worst}")
    assert max(worst.values()) <= 1e-6
    for ours, theirs in zip(done, alone):
        assert ours.metrics["fid/ema"] == pytest.approx(theirs.metrics["fid/ema"], abs=1e-5)
        assert ours.metrics["fid/effective_size"] == theirs.metrics["fid/effective_size"]


MOMENTS = RayFleet.moments


def test_pools_with_an_environment_of_their_own_give_the_same_scores(
    ray_session: RaySession, tmp_path: Path
) -> None:
    """A scorer whose module only one pool can import. Reproducible, as that pool tells."""
    (tmp_path / "only_there.py").write_text(
        "import os\n"
        "import numpy as np\n"
        "import torch\n"
        "class Workspaces:\n"
        "    def __init__(self, device): pass\n"
        "    def __call__(self, images, conditions):\n"
        "        found = os.environ.get('CUBLAS_WORKSPACE_CONFIG')\n"
        "        on = torch.are_deterministic_algorithms_enabled()\n"
        "        return np.full(len(images), on and found == ':4096:8', np.float32)\n"
        "class Redness:\n"
        "    def __init__(self, device): self.device = device\n"
        "    def __call__(self, images, conditions):\n"
        "        return np.array([i[..., 0].mean() for i in images], np.float32)\n"
    )
    environment = {"env_vars": {"PYTHONPATH": str(tmp_path), "WHO": "7"}}
    config = small_config(
        rewards={
            **PIXELS,
            "hps": {"pool": "apart"},
            "extra": [
                "only_there:Redness=0.1,pool=apart",
                "tests.stand_ins:Environment=0,variable=WHO,pool=apart",
                "only_there:Workspaces=0,pool=apart",
            ],
        },
        reproducible=True,
        reward_pools={"apart": {"runtime_env": environment}},
    )
    asked = requests(4)
    with RayFleet(servers_alone(fleet_plan(config)), ray_session) as fleet:
        assert [len(pool.workers) for pool in fleet.pools] == [1, 1, 1]
        found = [group.scores for group in fleet.collect(fleet.submit(asked))]
    images = instant_images(asked[0].num_rollouts)
    plain = RewardServer(fleet_plan(small_config(rewards=PIXELS)).reward_server.config)
    for request, scores in zip(asked, found, strict=True):
        assert {*scores.scores} == {"clip", "hps", "redness", "environment", "workspaces"}
        assert (scores.scores["environment"] == 7).all()
        assert (scores.scores["workspaces"] == 1).all()
        expected = plain.score(request, images)
        for name, values in {**expected.scores, **expected.features}.items():
            ours = {**scores.scores, **scores.features}[name]
            np.testing.assert_array_equal(ours, values, err_msg=name)


def test_a_scorer_that_its_server_cannot_import_is_named(ray_session: RaySession) -> None:
    config = small_config(rewards={**PLAIN, "extra": ["only_there:Redness=0.1"]})
    with (
        pytest.raises(TesseraError, match=r"only_there:Redness cannot be imported where reward"),
        RayFleet(servers_alone(fleet_plan(config)), ray_session),
    ):
        pass


class Background:
    """Runs the training in a thread, so that the test can act meanwhile."""

    def __init__(self, config: Any, fleet: RayFleet) -> None:
        self.done: list[Iteration] = []
        self.stop = threading.Event()
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(config, fleet))
        self._thread.start()

    def _run(self, config: Any, fleet: RayFleet) -> None:
        try:
            self.done = run_training(config, fleet, lambda done: self.stop.is_set())
        except BaseException as error:
            self.error = error

    def finish(self) -> list[Iteration]:
        self.stop.set()
        self._thread.join(240)
        assert not self._thread.is_alive()
        if self.error:
            raise self.error
        return self.done


def status_of(control: Any) -> FleetStatus:
    return ray.get(control.status.remote())


@pytest.mark.slow  # tests/e2e/test_ray_job.py scales up; down and equal rewards: only here
def test_scaling_by_hand_while_it_runs(ray_session: RaySession, logged: list[str]) -> None:
    """Up and down, samplers and servers: same rewards, servers warm before they serve."""
    extra = ["tests.stand_ins:Brightness=0.3,seconds=0.1,warm_seconds=1.0"]
    config = small_config(iterations=400, rewards={"extra": extra})
    with RayFleet(fleet_plan(config), ray_session, run="by-hand") as fleet:
        running = Background(config, fleet)
        name, control = find_control_actor("")
        run = RunConnection(name, control, RunLocation(name, "auto"))
        assert name == "by-hand"
        status = scale(run, {"reward-server": 3, "sampler": 3}, timeout_s=60)
        assert [pool.serving for pool in status.pools] == [3, 3]
        status = scale(run, {"reward-server": 1, "sampler": 1}, timeout_s=60)
        assert [pool.serving for pool in status.pools] == [1, 1]
        with pytest.raises(FleetError, match="no role 'judge': there are sampler, reward-server"):
            scale(run, {"judge": 1}, timeout_s=60)
        with pytest.raises(FleetError, match=r"must be in 1\.\.4096, found 0"):
            scale(run, {"sampler": 0}, timeout_s=60)
        done = running.finish()
        assert fleet.restarts == 0
    quick = small_config(iterations=400, rewards={"extra": ["tests.stand_ins:Brightness=0.3"]})
    with InlineFleet(fleet_plan(quick)) as inline:
        expected = rewards_of(run_training(quick, inline, lambda count: count == len(done)))
    found = rewards_of(done)
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])
    assert "reward-server: 1 -> 3 workers, as asked for" in logged
    assert any("serves" in line for line in logged)


def test_a_name_is_taken_once_and_given_back(ray_session: RaySession) -> None:
    with (
        RayFleet(echo_plan(), ray_session, run="twice"),
        pytest.raises(FleetError, match="a run named 'twice' is active on this cluster already"),
        RayFleet(echo_plan(), ray_session, run="twice"),
    ):
        pass
    with RayFleet(echo_plan(), ray_session, run="twice"):  # free again
        pass


def test_waiting_groups_bring_more_servers_and_idle_ones_leave(
    ray_session: RaySession, logged: list[str]
) -> None:
    auto = {"max": 2, "target_wait_s": 0.2, "every_s": 1.0}
    configured = fleet_plan(small_config(reward=auto)).reward_server
    plan = slow_plan(0.0)
    server = dataclasses.replace(
        plan.reward_server,
        factory=SlowScorer,
        config=(0.4,) * 2,
        count=configured.count,
        autoscale=configured.autoscale,
    )
    plan = dataclasses.replace(plan, reward_server=server, slots=8)
    with RayFleet(plan, ray_session) as fleet:
        fleet.broadcast(1)
        servers = fleet.pools[1]
        deadline = time.monotonic() + START_S
        while len(servers.of(State.SERVING)) < 2:
            assert len(fleet.collect(fleet.submit(stub_requests(8)))) == 8
            assert time.monotonic() < deadline, logged
        servers.meter.restart(time.monotonic() - 10)  # ten seconds without work
        fleet._autoscaler.tick(0)
        assert len(servers.of(State.SERVING)) == 1
    assert any("workers (work waited" in line for line in logged)


def test_an_addition_that_cannot_start_does_not_end_the_run(
    ray_session: RaySession, tmp_path: Path, logged: list[str]
) -> None:
    plan = slow_plan(0.0)
    server = dataclasses.replace(plan.reward_server, factory=Once, config=str(tmp_path / "mark"))
    with RayFleet(dataclasses.replace(plan, reward_server=server), ray_session) as fleet:
        fleet.broadcast(1)
        servers = fleet.pools[1]
        servers.scale(2)
        assert len(servers.workers) == 2
        deadline = time.monotonic() + START_S
        while len(servers.workers) > 1:
            assert len(fleet.collect(fleet.submit(stub_requests(1)))) == 1
            assert time.monotonic() < deadline, logged
    assert any("going on without server-1: " in line for line in logged), logged
    assert any("no second one" in line for line in logged), logged


def test_bad_images_are_answered_with_errors_and_the_server_lives(ray_session: RaySession) -> None:
    from tests.unit.helpers import request

    plan = servers_alone(fleet_plan(small_config()))
    good = np.full((8, 8, 3), 200, np.uint8)
    bad = [good, good[:1, :1], good[..., :1], good.astype(np.float32), good * np.nan, good]
    with RayFleet(plan, ray_session) as fleet:
        worker = fleet.pools[1].workers[0]
        scores = ray.get(worker.handle.score.remote(request(rollouts=6), bad), timeout=60)
        with pytest.raises(Exception, match="non-empty"):
            ray.get(worker.handle.score.remote(request(), good[None][:0]), timeout=60)
        again = ray.get(worker.handle.score.remote(request(rollouts=1), good[None]), timeout=60)
    assert [error is None for error in scores.errors] == [True, False, False, False, False, True]
    right = scores.scores["clip"][[0, 5]]
    np.testing.assert_allclose(right, again.scores["clip"][0], atol=1e-6)
