"""A sampler decodes images beside the next group's tokens, and does all else in order."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path
from statistics import median

import pytest
import ray

from cluster.ray_backend.fleet import RayFleet
from cluster.ray_backend.group_calls import IMAGES, SAMPLER_THREADS, spans_of
from cluster.ray_backend.publisher import Publisher
from cluster.ray_backend.transports import COLLECTIVE, OBJECT_STORE
from cluster.ray_session.private import started
from cluster.ray_session.session import RaySession
from cluster.spans import Span
from tests.distributed.stubs import (
    DECODE_S,
    Batches,
    TwoHanded,
    requests,
    two_handed_plan,
)
from tests.stand_ins import drawn

WAIT_S = 60.0


@pytest.mark.parametrize("transport", [OBJECT_STORE, COLLECTIVE])
def test_the_thread_beside_leaves_the_order_of_the_others(
    ray_session: RaySession, transport: str
) -> None:
    """Weights are taken up between the groups that they were sent between, while images decode."""
    actor_class = Publisher(transport).actor_class(TwoHanded, SAMPLER_THREADS)
    sampler = actor_class.options(num_cpus=0.1).remote("", name="sampler")
    decode = sampler.images.options(concurrency_group=IMAGES, num_returns=2)
    try:
        ray.get(started(sampler), timeout=WAIT_S)
        asked, samples, spans, expected = requests(1)[0], [], [], []
        group = drawn(asked)
        for version in range(1, 5):
            sampler.load_weights.remote(version)
            samples += [sampler.sample.remote([asked]) for _ in range(2)]
            spans += [decode.remote(group)[1] for _ in range(2)]
            expected += [f"load {version}", *[f"sample 0 with {version}"] * 2]
        groups = ray.get(samples, timeout=WAIT_S)
        decodes = ray.get(spans, timeout=WAIT_S)
        assert ray.get(sampler.diary.remote(), timeout=WAIT_S) == expected
        assert [group.version for (group,) in groups] == [1, 1, 2, 2, 3, 3, 4, 4]
        tokens = [span for (group,) in groups for span in group.spans]
        assert len(tokens) == len(decodes) == 8
        assert any(max(a.start, b.start) < min(a.end, b.end) for a in tokens for b in decodes)
    finally:
        ray.kill(sampler)


def test_images_are_decoded_beside_the_next_groups_tokens(ray_session: RaySession) -> None:
    """The sampler never idles: its groups take as long as their tokens do, and the last images."""
    with RayFleet(two_handed_plan(), ray_session) as fleet:
        fleet.broadcast(1)
        fleet.sample_images(requests(1))
        spans: list[Span] = []
        advance = fleet._group_calls.advance

        def listen(ref: ray.ObjectRef) -> None:
            spans.extend(spans_of(ray.get(ref)))
            advance(ref)

        fleet._group_calls.advance = listen
        images = fleet.sample_images(requests(8))
        assert [int(image[0, 0]) for image in images] == list(range(8))
        (worker,) = fleet.pools[0].workers
        assert worker.idle
    samples = sorted(span for span in spans if span.phase == "sample")
    decodes = sorted(span for span in spans if span.phase == "decode")
    assert len(samples) == len(decodes) == 8
    pauses = [after.start - before.end for before, after in pairwise(samples)]
    # One after the other, every pause would be as long as decoding. A busy machine wakes late, now
    # and then.
    assert median(pauses) < DECODE_S
    beside = [
        min(decode.end, after.end) - max(decode.start, after.start)
        for decode, after in zip(decodes, samples[1:])
    ]
    assert sum(seconds > 0 for seconds in beside) >= 5


def test_one_that_dies_over_images_has_its_groups_asked_for_again(
    ray_session: RaySession, tmp_path: Path
) -> None:
    with RayFleet(two_handed_plan(str(tmp_path / "died"), 1), ray_session) as fleet:
        fleet.broadcast(1)
        images = fleet.sample_images(requests(6))
        assert (tmp_path / "died").exists()
        assert [int(image[0, 0]) for image in images] == list(range(6))
        assert fleet.restarts == 1


def test_every_group_of_a_lost_batch_is_asked_for_again(
    ray_session: RaySession, tmp_path: Path
) -> None:
    plan = two_handed_plan(str(tmp_path), 1)
    sampler = dataclasses.replace(plan.sampler, factory=Batches, max_groups=4)
    with RayFleet(dataclasses.replace(plan, sampler=sampler), ray_session) as fleet:
        fleet.broadcast(1)
        images = fleet.sample_images(requests(11))
        assert [int(image[0, 0]) for image in images] == list(range(11))
        assert fleet.restarts == 1
        assert fleet.pools[0].workers[0].idle
        assert fleet.pools[0].workers[0].tasks == 0
    calls = [path.name.partition("_")[2].split("-") for path in sorted(tmp_path.iterdir())]
    assert max(len(call) for call in calls) == 4
    lost = calls[0]
    assert len(lost) == 4
    asked = [int(number) for call in calls[1:] for number in call]
    assert sorted(asked) == list(range(11))  # those that were lost among them, and none twice
