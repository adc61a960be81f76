"""Histories of several feature spaces: they change together or not at all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cluster.errors import CheckpointError, DataError
from cluster.messages import MAIN_SPACE
from rewards.distribution.config import MomentsConfig
from rewards.distribution.reference import Reference
from rewards.servers.moments_server import MomentsServer
from rewards.servers.space_history import SpaceHistory

TERMS = {
    MAIN_SPACE: MomentsConfig(decay=0.5),
    "wide": MomentsConfig(window=60.0),
    "rough": MomentsConfig(kind="sliding", window=50.0, covariance="diagonal"),
}
DIMS = {MAIN_SPACE: 4, "wide": 7, "rough": 4}
ALL = np.ones(12, dtype=bool)
CLASSES = np.repeat([0, 1, 2], 4)


def features(count: int, seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {
        space: generator.normal(size=(count, dim)).astype(np.float32) for space, dim in DIMS.items()
    }


REAL = {space: Reference.from_features(x, space) for space, x in features(100, 0).items()}
NETWORKS = {space: space for space in DIMS}


def server(terms: dict[str, MomentsConfig] = TERMS, *, seeded: bool = True) -> MomentsServer:
    made = MomentsServer(terms)
    made.set_references(REAL, NETWORKS)
    if seeded:
        made.seed(features(60, 1))
    return made


def plain(answers: dict[str, Any]) -> dict[str, Any]:
    """But for the times."""
    return {space: repr(answer.packed()) for space, answer in answers.items()}


def test_each_space_has_the_rewards_that_it_has_alone() -> None:
    """Whatever its history and form; a failed image is left out of all."""
    together = server()
    starts = together.seed(features(60, 1))
    alone = {}
    for space, term in TERMS.items():
        alone[space] = SpaceHistory(term)
        alone[space].set_reference(REAL[space], space)
        assert alone[space].seed(features(60, 1)[space]) == starts[space]
    for iteration in range(3):
        valid = ALL.copy()
        valid[iteration] = False
        x = features(12, 2 + iteration)
        together.refresh()
        found = together.commit(iteration, x, valid, run="a", classes=CLASSES)
        for history in alone.values():
            history.refresh()
        expected = {
            space: history.commit(iteration, x[space], valid, run="a", classes=CLASSES)
            for space, history in alone.items()
        }
        assert plain(found) == plain(expected)
        assert all(np.isnan(answer.rewards[iteration]) for answer in found.values())
        assert {answer.version for answer in found.values()} == {iteration}


def test_a_commit_that_fails_in_one_space_changes_none() -> None:
    ours, theirs = server(), server()
    before = ours.state()
    x = features(12, 2)
    with pytest.raises(DataError, match=r"^rewards\.further\.rough: .*finite"):
        ours.commit(0, x | {"rough": np.full_like(x["rough"], np.nan)}, ALL, run="a")
    assert ours.state() == before
    assert plain(ours.commit(0, x, ALL, run="a")) == plain(theirs.commit(0, x, ALL, run="a"))


def test_a_repeated_commit_counts_once_in_every_space() -> None:
    ours = server()
    first = ours.commit(0, features(12, 2), ALL, run="a")
    state = ours.state()
    assert ours.commit(0, features(12, 2), ALL, run="a") == first
    assert ours.state() == state
    restored = server(seeded=False)
    restored.restore(state)
    assert restored.state() == state
    assert plain(restored.commit(0, features(12, 2), ALL, run="a")) == plain(first)
    later = [each.commit(1, features(12, 3), ALL, run="a") for each in (ours, restored)]
    assert plain(later[0]) == plain(later[1])


def test_a_state_of_the_main_space_alone_is_read() -> None:
    """As earlier versions wrote it; it is none of several spaces."""
    term = {MAIN_SPACE: TERMS[MAIN_SPACE]}
    history = SpaceHistory(term[MAIN_SPACE])
    history.set_reference(REAL[MAIN_SPACE], MAIN_SPACE)
    history.seed(features(60, 1)[MAIN_SPACE])
    history.commit(0, features(12, 2)[MAIN_SPACE], ALL)
    ours = server(term, seeded=False)
    ours.restore(history.state())
    x = features(12, 3)
    expected = history.commit(1, x[MAIN_SPACE], ALL)
    assert plain(ours.commit(1, x, ALL)) == plain({MAIN_SPACE: expected})
    with pytest.raises(
        CheckpointError, match=r"of the feature spaces features, .* has features, w"
    ):
        server().restore(history.state())
    with pytest.raises(CheckpointError, match=r"spaces features, wide, rough, .* has features: go"):
        ours.restore(server().state())


def test_a_reference_of_another_network_is_refused_by_the_name_of_the_space() -> None:
    made = MomentsServer(TERMS)
    with pytest.raises(DataError, match=r"^rewards\.further\.wide: .*made with features 'wide'"):
        made.set_references(REAL, NETWORKS | {"wide": "another"})
