"""Several groups in one call of a worker: functions that run in its process, beside its methods.

The driver's time goes by calls: with eight groups in each it serves several times as many workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cluster.messages import GroupScores, RolloutGroup, SampleRequest
from cluster.roles import Pictures, RewardServerRole, SamplerRole


def images_of(sampler: SamplerRole, groups: Sequence[RolloutGroup]) -> list[Any]:
    """The images of each group, then the list of the spans: as many values as groups, and one."""
    decoded = [sampler.images(group) for group in groups]
    return [*(images for images, _ in decoded), [span for _, span in decoded]]


def scores_of(
    server: RewardServerRole, requests: Sequence[SampleRequest], *images: Pictures
) -> list[GroupScores]:
    """The scores of each group. All are asked for at once, so that the server may batch them."""
    with ThreadPoolExecutor(len(requests)) as threads:
        return [*threads.map(server.score, requests, images)]
