"""Which transports can run where, and what is said of those that cannot."""

from __future__ import annotations

import dataclasses

import pytest

from cluster.errors import ConfigError
from cluster.ray_backend.transports import Surroundings, WeightsConfig, why_not
from learner.config import load_preset, merge, to_dict, validate
from learner.fleet_plan import fleet_plan

BIG = Surroundings(learner_gpus=1, sampler_gpus=1)
ONE_GPU = Surroundings(learner_gpus=0.5, sampler_gpus=0.25)
LAPTOP = Surroundings(learner_gpus=0, sampler_gpus=0)


def test_the_object_store_runs_everywhere() -> None:
    for here in (BIG, ONE_GPU, LAPTOP):
        assert why_not("object-store", here) == ""


def test_without_gpus_nothing_else_does() -> None:
    assert why_not("nccl", LAPTOP) == (
        "the learner must have a GPU (num_gpus is 0); samplers must have a GPU (num_gpus is 0)"
    )
    half = dataclasses.replace(BIG, sampler_gpus=0)
    assert why_not("nccl", half) == "samplers must have a GPU (num_gpus is 0)"


def test_nccl_wants_a_gpu_for_each() -> None:
    assert why_not("nccl", BIG) == ""
    assert "a GPU each, found shares of 0.5 and 0.25" in why_not("nccl", ONE_GPU)


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


def test_adapters_need_none_of_them() -> None:
    assert "adapters travel alone" in why_not("nccl", BIG, adapters_alone=True)


def test_the_wire_has_the_samplers_dtype_unless_set() -> None:
    assert WeightsConfig().wire("bfloat16") == "bfloat16"
    assert WeightsConfig(dtype="bfloat16").wire("float32") == "bfloat16"


def test_a_run_carries_the_choice_to_its_roles() -> None:
    def plan(**changes: object):
        return fleet_plan(validate(merge(to_dict(load_preset("miniature")), changes), "test"))

    default = plan()
    assert (default.transport, default.adapters_alone) == ("object-store", False)
    assert default.learner.config.wire_dtype == "float32"
    assert plan(sampler={"dtype": "bfloat16"}).learner.config.wire_dtype == "bfloat16"
    changed = plan(weights={"transport": "nccl", "dtype": "bfloat16"})
    assert (changed.transport, changed.learner.config.wire_dtype) == ("nccl", "bfloat16")
    with pytest.raises(ConfigError, match="transport"):
        plan(weights={"transport": "carrier pigeon"})
