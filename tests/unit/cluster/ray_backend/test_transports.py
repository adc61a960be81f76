"""Which transport a run gets, and over what."""

from __future__ import annotations

import pytest

from cluster.errors import ConfigError
from cluster.ray_backend.transports import WeightsConfig, over_nccl, why_not
from cluster.roles import FleetPlan
from learner.config import load_preset, merge, to_dict, validate
from learner.fleet_plan import fleet_plan


def plan(**changes: object) -> FleetPlan:
    return fleet_plan(validate(merge(to_dict(load_preset("miniature")), changes), "test"))


@pytest.mark.parametrize(
    ("learner", "sampler", "nccl"),
    [(1, 1, True), (2, 1, True), (1, 0.5, False), (0.5, 0.25, False), (1, 0, False)],
)
def test_nccl_wants_a_gpu_for_each(learner: float, sampler: float, nccl: bool) -> None:
    found = plan(learner={"num_gpus": learner}, sampler={"num_gpus": sampler})
    assert over_nccl(found) is nccl


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"transport": "nixl"}, "weights.transport nixl was removed"),
        ({"transport": "cuda-ipc"}, "weights.transport cuda-ipc was removed"),
        ({"take_up": "token"}, "weights.take_up token was removed"),
    ],
)
def test_removed_options_are_errors(options: dict[str, str], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        validate(merge(to_dict(load_preset("miniature")), {"weights": options}), "test")


def test_older_configurations_are_read() -> None:
    old = {"weights": {"take_up": "group"}}
    assert (
        validate(merge(to_dict(load_preset("miniature")), old), "test").weights.take_up == "group"
    )


def test_adapters_need_no_group() -> None:
    assert why_not(plan(learner={"lora": {"rank": 2}})).startswith("adapters travel alone")
    assert why_not(plan()) == why_not(plan(max_staleness=2)) == ""


def test_the_wire_has_the_samplers_dtype_unless_set() -> None:
    assert WeightsConfig().wire("bfloat16") == "bfloat16"
    assert WeightsConfig(dtype="bfloat16").wire("float32") == "bfloat16"


def test_a_run_carries_the_choice_to_its_roles() -> None:
    default = plan()
    assert (default.transport, default.adapters_alone) == ("object-store", False)
    assert default.learner.config.wire_dtype == "float32"
    assert plan(sampler={"dtype": "bfloat16"}).learner.config.wire_dtype == "bfloat16"
    changed = plan(weights={"transport": "collective", "dtype": "bfloat16"})
    assert (changed.transport, changed.learner.config.wire_dtype) == ("collective", "bfloat16")
    with pytest.raises(ConfigError, match="transport"):
        plan(weights={"transport": "carrier pigeon"})
