"""What a run takes of disk and object store; figures by hand."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from actors.checkpoints.loading import load_policy
from cluster.errors import FleetError
from cluster.ray_session.object_store import (
    StoreFullError,
    StoreNeed,
    check_store,
    explain_store_full,
    format_bytes,
    memory_full,
    store_full,
)
from cluster.ray_session.session import RayConfig
from learner.capacity import storage
from learner.capacity.storage import (
    DiskWatch,
    checkpoint_bytes,
    room_note,
    sampling_need,
    store_need,
)
from learner.fleet_plan import sampling_plan
from tests.small_run import small_config

NEED = StoreNeed(snapshot=1_000_000_000, group=50_000_000, groups=20)


def test_need_of_the_miniature() -> None:
    config = small_config(max_staleness=1, evaluation={"num_images": 40})
    weights = sum(p.numel() for p in load_policy(config.policy).parameters())
    need = store_need(config)
    assert need.groups == 2 * 4
    assert need.group == 40 * 8 * 8 * 3  # an evaluation's; digits have 8 pixels a side
    assert need.batch == 256 * 8 * 8 * 3
    assert need.snapshot == 4 * weights
    assert checkpoint_bytes(config) == 12 * weights


def test_need_of_an_evaluation() -> None:
    """No weights travel; as many groups are in flight as its workers can hold."""
    config = small_config(num_samplers=8, num_reward_servers=2, evaluation={"num_images": 40})
    plan = sampling_plan(config)
    need = sampling_need(config, plan)
    assert need.groups == plan.slots == 8 * 2 + 2 * plan.reward_server.depth
    assert need.total == need.groups * 40 * 8 * 8 * 3 + need.batch
    assert check_store(need, need.total) == ""
    note = check_store(need, need.total - 1)
    assert f"{need.groups} groups in flight with 0.00768 MB of images each and " in note
    assert "weights" not in note
    with pytest.raises(FleetError, match=r"but the images of one group have 0\.00768"):
        check_store(need, 999)


def test_store_by_hand() -> None:
    assert NEED.total == 4_000_000_000
    assert check_store(NEED, 4_000_000_000) == ""
    note = check_store(NEED, 3_999_999_999)
    assert "20 groups in flight, (S + 1) P, with 50 MB of images each" in note
    assert "3 snapshots of weights of 1 GB: 4 GB" in note
    assert check_store(NEED, 1_050_000_000)
    with pytest.raises(FleetError, match=r"store has 1\.05 GB, but one snapshot .* has 1 GB"):
        check_store(NEED, 1_049_999_999)


def test_errors_say_what_holds_how_much() -> None:
    error = store_full("sampler-1", RuntimeError("Local disk is full\nmore"))
    with pytest.raises(StoreFullError) as caught, explain_store_full(NEED, 80_000_000):
        raise error
    text = str(caught.value)
    assert text.startswith("sampler-1: no room for it in the object store")
    assert "(Local disk is full)" in text
    assert "The store has 80 MB; the run needs 20 groups in flight" in text
    assert "--ray.object-store-memory" in text
    assert "(1 worker(s) were killed)" in str(
        memory_full("learner", RuntimeError("1 worker(s) were killed\nTop 10 users"))
    )


@pytest.mark.parametrize(("number", "text"), [(83e6, "83 MB"), (2.5e9, "2.5 GB"), (1e8, "0.1 GB")])
def test_sizes(number: float, text: str) -> None:
    assert format_bytes(number) == text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"object_store_memory": 0.01}, "object_store_memory is in GB, 0 or at least 0.08"),
        ({"object_store_memory": 4e9}, "object_store_memory is in GB"),
        ({"num_cpus": -1}, "num_cpus must be >= 0, found -1"),
    ],
)
def test_impossible_settings_of_ray_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RayConfig(**changes)


def test_two_checkpoints_must_fit() -> None:
    assert room_note(2000, 1000, Path("x")) == ""
    assert "the disk of x has 0.001 GB free" in room_note(1_000_000, 1_000_000, Path("x"))


def test_a_full_disk_is_named_once_until_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(free))
    watch = DiskWatch(tmp_path, 500)
    free = 999
    watch()
    watch()
    assert len(logged) == 1
    free = 1000
    watch()
    (tmp_path / "step_000010").mkdir()
    (tmp_path / "step_000010" / "policy.safetensors").write_bytes(bytes(501))
    watch()  # the estimate of 500 gives way to what one really takes
    assert len(logged) == 2
    assert storage.free_bytes(tmp_path) == 1000
