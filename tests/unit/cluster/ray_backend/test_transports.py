"""Which transports can run where, and what is said of those that cannot."""

from __future__ import annotations

import dataclasses

import pytest

from cluster.errors import ConfigError
from cluster.ray_backend.transports import Surroundings, WeightsConfig, why_not
from learner.config import load_preset, merge, to_dict, validate
from learner.fleet_plan import fleet_plan

BIG = Surroundings(learner_gpus=1, sampler_gpus=1, num_samplers=7, gpus=16, nodes=2, nixl=True)
ONE_GPU = Surroundings(
    learner_gpus=0.5, sampler_gpus=0.25, num_samplers=2, gpus=1, nodes=1, nixl=True
)
LAPTOP = Surroundings(learner_gpus=0, sampler_gpus=0, num_samplers=2, gpus=0, nodes=1, nixl=False)


def test_the_object_store_runs_everywhere() -> None:
    for here in (BIG, ONE_GPU, LAPTOP):
        assert why_not("object-store", here) == ""


@pytest.mark.parametrize("transport", ["nccl", "nixl", "cuda-ipc"])
def test_without_gpus_nothing_else_does(transport: str) -> None:
    assert why_not(transport, LAPTOP) == (
        "the learner must have a GPU (num_gpus is 0); samplers must have a GPU (num_gpus is 0)"
    )
    half = dataclasses.replace(BIG, sampler_gpus=0)
    assert why_not(transport, half) == "samplers must have a GPU (num_gpus is 0)"


def test_nccl_wants_a_gpu_for_each() -> None:
    assert why_not("nccl", BIG) == ""
    assert "a GPU each, found shares of 0.5 and 0.25" in why_not("nccl", ONE_GPU)


def test_nixl_wants_its_package() -> None:
    assert why_not("nixl", BIG) == why_not("nixl", ONE_GPU) == ""
    assert "pip install nixl" in why_not("nixl", dataclasses.replace(BIG, nixl=False))


def test_cuda_ipc_wants_one_gpu_for_all() -> None:
    assert why_not("cuda-ipc", ONE_GPU) == ""
    assert "found 16 GPUs on 2 nodes, and shares that add up to 8" in why_not("cuda-ipc", BIG)
    crowd = dataclasses.replace(ONE_GPU, num_samplers=3)  # Ray could not place them on one
    assert "shares that add up to 1.25" in why_not("cuda-ipc", crowd)


def test_adapters_need_none_of_them() -> None:
    assert "adapters travel alone" in why_not("nccl", BIG, adapters_alone=True)


def test_the_wire_has_the_samplers_dtype_unless_told() -> None:
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
