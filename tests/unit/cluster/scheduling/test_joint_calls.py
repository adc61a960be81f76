"""Several groups in one call of a worker, in its process."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from cluster.errors import TesseraError
from cluster.messages import GroupScores, SampleRequest
from cluster.scheduling.joint_calls import images_of, scores_of
from tests.distributed.stubs import DistinctSampler, distinct_images
from tests.stand_ins import drawn
from tests.unit.helpers import request


def test_images_of_some_groups_come_one_by_one_with_their_spans_last() -> None:
    requests = [request(number) for number in (3, 1, 2)]
    *images, spans = images_of(DistinctSampler(None, "sampler"), [drawn(r) for r in requests])
    assert len(images) == len(spans) == 3
    for asked, found in zip(requests, images, strict=True):
        np.testing.assert_array_equal(found, distinct_images(asked))


class Meeting:
    """A reward server whose calls wait for each other: asked for one by one, they would not end."""

    def __init__(self, count: int) -> None:
        self._all = threading.Barrier(count, timeout=20)

    def score(self, request: SampleRequest, images: np.ndarray) -> GroupScores:
        self._all.wait()
        if images[0] < 0:
            raise TesseraError("no such image")
        return GroupScores(key=request.key, scores={"sum": images}, features={}, errors=(None,))


def test_scores_of_some_groups_are_asked_for_at_once_and_keep_their_order() -> None:
    requests = [request(number, 1) for number in (5, 3, 4)]
    images = [np.array([each.group], np.float32) for each in requests]
    found = scores_of(Meeting(3), requests, *images)
    assert [(each.key.group, each.scores["sum"][0]) for each in found] == [(5, 5), (3, 3), (4, 4)]


def test_what_fails_of_some_groups_is_raised() -> None:
    images = [np.array([value], np.float32) for value in (1, -1)]
    with pytest.raises(TesseraError, match="no such image"):
        scores_of(Meeting(2), [request(0, 1), request(1, 1)], *images)
