"""Calls of groups, without Ray: references are numbers."""

from __future__ import annotations

from typing import Any

from cluster.ray_backend.group_calls import Call, GroupCalls, Stage
from cluster.scheduling.in_flight import PendingBatch, PendingGroup
from tests.unit.cluster.scheduling.test_pool import Pool
from tests.unit.helpers import request


def test_abandoned_groups_need_no_weights() -> None:
    """After a lost learner, their versions are not published again."""
    samplers, unused = Pool().pool, Any
    calls = GroupCalls(unused, samplers, {}, unused, unused, unused, unused)
    batches = [PendingBatch([None]), PendingBatch([None])]
    for number, batch in enumerate(batches):
        group = PendingGroup(batch, 0, request(group=number), (), weight_version=number)
        calls.calls[number] = Call((group,), samplers, samplers.workers[0], Stage.SAMPLE)
    assert [*calls.weight_versions] == [0, 1]
    batches[0].abandoned = True
    assert [*calls.weight_versions] == [1]
