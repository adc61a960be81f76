"""The plan document: what is read, and what is refused by which name."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.deploy.plan_document import read_plan
from cluster.errors import ConfigError
from tests.unit.cluster.deploy.plans import document, eight_gpus, role, text


def test_a_document_is_read() -> None:
    plan = read_plan(text(eight_gpus() | {"added_later": 1}), "plan")
    assert (plan.preset, plan.gpus, plan.role("sampler").count) == ("llamagen-b-256", 8, 4)
    assert [each.name for each in plan.workers] == ["learner", "sampler", "reward-server"]
    assert [each.name for each in plan.roles if each.scales] == ["reward-server"]
    assert read_plan(text(eight_gpus() | {"iteration_s": None}), "plan").iteration_s is None


def _of_sampler(**values: Any) -> dict[str, Any]:
    sampler = role("sampler", num_gpus=1) | values
    return document(2, role("learner", num_gpus=1), sampler, role("reward-server"))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("not json", "plan: no JSON"),
        ("[1]", "one JSON object, found list"),
        (text(eight_gpus() | {"version": 2}), "version must be 1, found 2"),
        (text({"gpus": 1}), "version must be 1, found None"),
        (text(eight_gpus() | {"gpus": -1}), "gpus: .*greater than or equal to 0, found -1"),
        (text(eight_gpus() | {"gpus": 7}), "roles take 8 GPUs, but gpus is 7"),
        (text(_of_sampler(count=0)), r"roles\[1\].count: .*greater.*found 0"),
        (text(_of_sampler(num_cpus=-1)), r"roles\[1\].num_cpus: .*found -1"),
        (text(_of_sampler(num_gpus="many")), r"roles\[1\].num_gpus: .*found 'many'"),
        (text(_of_sampler(num_gpus=1.5)), "sampler: num_gpus above 1 must be whole, found 1.5"),
        (text(_of_sampler(name="Sampler one")), r"roles\[1\].name: .*found 'Sampler one'"),
        (text(_of_sampler(name="learner")), "roles has 'learner' twice; roles lacks 'sampler'"),
        (text(_of_sampler(min=2)), "sampler: min <= count <= max must hold, found 2, 1, 1"),
        (text({k: v for k, v in eight_gpus().items() if k != "roles"}), "roles: Field required"),
        ('{"version": 1, "gpus": NaN}', "gpus"),
    ],
)
def test_what_is_refused_is_named(given: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        read_plan(given, "plan")
