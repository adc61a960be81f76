"""Iterations ahead of learning: which weights they are drawn with, and what a checkpoint keeps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cluster.errors import CheckpointError, FleetError, StopRequestedError
from cluster.fleet import InlineFleet
from cluster.messages import RolloutGroup, SampleRequest, ScoredGroup
from learner.checkpoints.checkpoint import restore
from learner.checkpoints.store import CheckpointStore
from learner.config import RunConfig
from learner.fleet_plan import fleet_plan
from learner.loop import Iteration, check_moments_staleness, prepare, train
from learner.rollouts.codec import pack_group, unpack_group
from learner.rollouts.feature_space import set_reference
from learner.rollouts.prefetch import Pipeline
from learner.runs.run_dir import RunDirectory
from rewards.combine import Combiner
from rewards.distribution.config import MomentsConfig
from rewards.distribution.distribution_reward import DistributionReward
from rewards.distribution.reference import Reference
from rewards.servers.space_history import SpaceHistory
from tests.small_run import fingerprint, run_training, small_config
from tests.unit.helpers import request, scored_group


class PaperFleet:
    """Answers at once, with the version that was published last when it was asked."""

    def __init__(self) -> None:
        self.version, self.log = 0, []
        self._answers: dict[int, list[ScoredGroup]] = {}

    def submit(self, requests: list[SampleRequest]) -> int:
        self.log.append(("ask", requests[0].iteration, self.version))
        groups = [scored_group({"clip": [0.1, 0.2]}, group=r.group) for r in requests]
        self._answers[len(self._answers)] = [
            ScoredGroup(
                rollouts=RolloutGroup(
                    request=r,
                    version=self.version,
                    tokens=g.rollouts.tokens,
                    logprobs=g.rollouts.logprobs,
                    entropies=g.rollouts.entropies,
                ),
                scores=g.scores,
            )
            for r, g in zip(requests, groups)
        ]
        return len(self._answers) - 1

    def collect(self, ticket: int, *, finish: bool = False) -> list[ScoredGroup]:
        self.log.append(("collect", self._answers[ticket][0].rollouts.request.iteration, finish))
        return self._answers[ticket][::-1]  # in whatever order


def pipeline(staleness: int, fleet: PaperFleet, iterations: int = 5, **changes: object) -> Pipeline:
    config = small_config(max_staleness=staleness, iterations=iterations, **changes)
    return Pipeline(config, fleet)


def learn(made: Pipeline, fleet: PaperFleet, iteration: int) -> list[int]:
    """Versions of an iteration's groups; then its weights go live."""
    groups = made.take(iteration)
    assert [group.rollouts.request.group for group in groups] == [0, 1, 2, 3]
    fleet.version = iteration + 1
    made.release(iteration)
    return [group.rollouts.version for group in groups]


@pytest.mark.parametrize(
    ("staleness", "versions"), [(0, [0, 1, 2, 3, 4]), (1, [0, 0, 1, 2, 3]), (3, [0, 0, 0, 0, 1])]
)
def test_every_iteration_has_the_version_that_the_rule_says(
    staleness: int, versions: list[int]
) -> None:
    fleet = PaperFleet()
    made = pipeline(staleness, fleet)
    made.begin(0)
    assert [learn(made, fleet, i) for i in range(5)] == [[version] * 4 for version in versions]
    assert [entry for entry in fleet.log if entry[0] == "ask"] == [
        ("ask", iteration, version) for iteration, version in enumerate(versions)
    ]


def test_the_next_is_asked_for_before_this_one_is_learned() -> None:
    fleet = PaperFleet()
    made = pipeline(1, fleet)
    made.begin(0)
    learn(made, fleet, 0)
    made.take(1)
    assert fleet.log == [
        ("ask", 0, 0), ("ask", 1, 0), ("collect", 0, False), ("ask", 2, 1), ("collect", 1, False)
    ]  # fmt: skip


def test_a_checkpoint_keeps_what_could_not_be_drawn_again() -> None:
    fleet = PaperFleet()
    made = pipeline(2, fleet)
    made.begin(0)
    assert made.state() == b""  # all are drawn with the newest weights
    learn(made, fleet, 0)
    state = made.state()  # 1 and 2 of version 0; 3 is of the newest
    assert ("collect", 2, True) in fleet.log
    other = PaperFleet()
    other.version = 1
    resumed = pipeline(2, other)
    resumed.restore(state)
    resumed.begin(1)
    assert other.log == [("ask", 3, 1)]
    assert [learn(resumed, other, i) for i in (1, 2, 3)] == [[0] * 4, [0] * 4, [1] * 4]
    assert [learn(made, fleet, i) for i in (1, 2, 3)] == [[0] * 4, [0] * 4, [1] * 4]


def test_a_checkpoint_of_another_moment_is_refused() -> None:
    fleet = PaperFleet()
    made = pipeline(1, fleet)
    made.begin(0)
    learn(made, fleet, 0)
    state = made.state()
    resumed = pipeline(1, PaperFleet())
    resumed.restore(state)
    with pytest.raises((CheckpointError, FleetError), match="iteration"):
        resumed.begin(3)
    with pytest.raises(CheckpointError, match="pending groups cannot be read"):
        resumed.restore(state[:-9])


def test_rollouts_of_other_weights_are_refused() -> None:
    fleet = PaperFleet()
    made = pipeline(1, fleet)
    fleet.version = 2
    made.begin(0)
    with pytest.raises(FleetError, match="weights of 2 updates, but iteration 0 is to be drawn"):
        made.take(0)


def test_groups_survive_the_file_bit_for_bit() -> None:
    group = scored_group(
        {"clip": [0.1, np.nan]}, group=3, errors=[None, "clip: boom"], features=np.eye(2, 5)
    )
    back = unpack_group(group.rollouts.request, pack_group(group))
    assert back.rollouts.tokens.dtype == np.int32
    for name in ("tokens", "logprobs", "entropies"):
        np.testing.assert_array_equal(getattr(back.rollouts, name), getattr(group.rollouts, name))
    np.testing.assert_array_equal(back.scores.scores["clip"], group.scores.scores["clip"])
    np.testing.assert_array_equal(back.scores.features["features"], np.eye(2, 5))
    assert back.scores.errors == (None, "clip: boom")
    with pytest.raises(CheckpointError, match="was expected, found"):
        unpack_group(request(group=2), pack_group(group))
    with pytest.raises(CheckpointError, match="cannot be read"):
        unpack_group(group.rollouts.request, pack_group(group)[:-5])


def test_moments_are_bounded_like_the_policy() -> None:
    answer = DistributionReward(
        iteration=5, rewards=np.zeros(2), fid=1.0, batch_fid=1.0, effective_size=2.0, version=4
    )
    check_moments_staleness(answer, 5, max_staleness=1)
    with pytest.raises(FleetError, match="staleness 1 is outside 0 to max_staleness 0"):
        check_moments_staleness(answer, 5, max_staleness=0)
    with pytest.raises(FleetError, match="staleness -1 is outside"):
        check_moments_staleness(answer, 3, max_staleness=3)


@pytest.fixture(scope="module")
def one_ahead() -> tuple[RunConfig, list[Iteration]]:
    config = small_config(max_staleness=1)
    with InlineFleet(fleet_plan(config)) as fleet:
        return config, run_training(config, fleet)


def test_the_loop_learns_from_rollouts_one_update_old(one_ahead: tuple) -> None:
    _, done = one_ahead
    assert [iteration.groups[0].rollouts.version for iteration in done] == [0, 0, 1, 2]
    assert [iteration.metrics["policy/staleness"] for iteration in done] == [0, 1, 1, 1]
    assert [iteration.metrics["staleness/groups_1"] for iteration in done] == [0, 4, 4, 4]
    assert [iteration.metrics["staleness/groups_0"] for iteration in done] == [4, 0, 0, 0]
    assert [iteration.metrics["moments/version"] for iteration in done] == [0, 1, 2, 3]
    assert (
        abs(done[0].metrics["policy/ratio"] - 1) < 1e-4 < abs(done[1].metrics["policy/ratio"] - 1)
    )


def test_resumed_one_ahead_equals_uninterrupted(one_ahead: tuple, tmp_path: Path) -> None:
    config, whole = one_ahead

    def begin(fleet: InlineFleet) -> tuple:
        return set_reference(config, fleet), Combiner(config.rewards.terms())

    with InlineFleet(fleet_plan(config)) as fleet:
        made = Pipeline(config, fleet)
        space, combiner = begin(fleet)
        fleet.broadcast(0)
        prepare(config, fleet, space)
        first: list[Iteration] = []
        train(
            config, fleet, space, 0, first.append, lambda: len(first) == 2, "", combiner, made
        )  # fmt: skip
        run = RunDirectory.create(str(tmp_path / "run"), config)
        kept = CheckpointStore(run, config)
        kept.save(2, fleet, combiner, made.state())
        kept.close()
    with InlineFleet(fleet_plan(config)) as fleet:
        made = Pipeline(config, fleet)
        space, combiner = begin(fleet)
        newest = CheckpointStore(run, config).newest()
        assert newest is not None
        restore(newest, fleet, combiner, made)
        fleet.broadcast(2)
        rest: list[Iteration] = []
        train(config, fleet, space, 2, rest.append, lambda: False, "", combiner, made)
    assert fingerprint([*first, *rest]) == fingerprint(whole)


def test_a_stop_ends_the_wait_but_not_a_checkpoint() -> None:
    config = small_config(max_staleness=1)
    stop: list[bool] = []
    with InlineFleet(fleet_plan(config), lambda: bool(stop)) as fleet:
        fleet.broadcast(0)
        made = Pipeline(config, fleet)
        made.begin(0)
        stop.append(True)
        with pytest.raises(StopRequestedError):
            made.take(0)
        assert made.state() == b""


def test_the_moments_server_tells_its_version_and_its_work_between_commits() -> None:
    def features(seed: int) -> np.ndarray:
        count = 8 if seed > 1 else 60  # a quarter of the dimensions
        return np.random.default_rng(seed).normal(size=(count, 32)).astype(np.float32)

    def server() -> SpaceHistory:
        made = SpaceHistory(MomentsConfig(decay=0.5))
        made.set_reference(Reference.from_features(features(0), "net"), "net")
        return made

    first, valid = server(), np.ones(8, bool)
    first.seed(features(1))
    first.refresh()
    answer = first.commit(0, features(2), valid)
    assert (answer.version, [span.phase for span in answer.spans]) == (0, ["decompose", "moments"])
    answer = first.commit(1, features(3), valid)  # nobody refreshed
    assert (answer.version, [span.phase for span in answer.spans]) == (1, ["moments"])
    second = server()
    second.restore(first.state())
    assert second.commit(2, features(4), valid).version == 2


def test_groups_of_other_weights_are_refused() -> None:
    fleet = PaperFleet()
    fleet.version = 1
    made = pipeline(0, fleet)
    made.begin(0)
    with pytest.raises(FleetError, match="weights of 1 updates, but iteration 0 is to be drawn"):
        made.take(0)


def test_an_iteration_that_lacks_a_group_is_refused() -> None:
    fleet = PaperFleet()
    made = pipeline(0, fleet)
    made.begin(0)
    fleet._answers[0].pop(2)
    with pytest.raises(FleetError, match=r"iteration 0 lacks groups \[2\]"):
        made.take(0)
