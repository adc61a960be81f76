"""Files for `ray up`, checked by Ray's own schema and preparation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster.deploy.command import parse
from cluster.deploy.plan_document import read_plan
from cluster.deploy.ray_up.files import CLUSTER, RAY_UP, SUBMIT
from cluster.errors import ConfigError
from tests.unit.cluster.deploy.plans import (
    cpus,
    document,
    eight_gpus,
    many_gpus,
    one_gpu,
    role,
    text,
)

AWS = ["--image", "registry.example/tessera:1", "--checkpoint-url", "s3://bucket/run"]
OWN = ["--head-ip", "10.0.0.1", "--worker-ip", "10.0.0.2", "--worker-ip", "10.0.0.3"]


def made(values: dict[str, Any], *given: str) -> tuple[dict[str, Any], str]:
    """The cluster that Ray would start, validated, and the submission."""
    line = ["ray-up", "--preset", values["preset"], "--gpus", str(values["gpus"]), *given]
    _, options = parse(line)
    written = RAY_UP.files(read_plan(text(values), "test"), options)
    prepared = prepare_config(yaml.safe_load(written[CLUSTER]))
    validate_config(prepared)
    return prepared, written[SUBMIT]


def counts(cluster: dict[str, Any]) -> dict[str, tuple[str, int, int]]:
    """Type -> machine, fewest and most of it."""
    return {
        name: (each["node_config"]["InstanceType"], each["min_workers"], each["max_workers"])
        for name, each in cluster["available_node_types"].items()
        if name != "head"
    }


@pytest.mark.parametrize("values", [cpus(), one_gpu(), eight_gpus()])
@pytest.mark.parametrize("where", [AWS, OWN], ids=["aws", "own"])
def test_ray_accepts_the_cluster(values: dict[str, Any], where: list[str]) -> None:
    cluster, submit = made(values, *where)
    assert cluster["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    for starts in (cluster["head_start_ray_commands"], cluster["worker_start_ray_commands"]):
        assert all("RAY_AUTH_MODE=token" in line for line in starts if "ray start" in line)
    assert "--auto-resume" in submit


def test_a_preset_that_is_a_file_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.yaml").write_text("seed: 3")
    monkeypatch.chdir(tmp_path)
    cluster, submit = made({**eight_gpus(), "preset": "mine.yaml"}, *AWS)
    ((there, here),) = set(cluster["file_mounts"].items()) - {("~/.ray/auth_token",) * 2}
    assert here == str(tmp_path / "mine.yaml")
    assert f"--preset {there}" in " ".join(submit.split())
    assert "mine.yaml" not in submit


def test_eight_gpus_share_one_machine() -> None:
    cluster, submit = made(eight_gpus(), *AWS)
    assert counts(cluster) == {"shared": ("p5en.48xlarge", 1, 2)}  # 16 reward servers need 10 GPUs
    assert cluster["available_node_types"]["shared"]["resources"] == {"CPU": 192, "GPU": 8}
    assert ".labels" not in submit


def test_many_gpus_get_machines_for_each_role() -> None:
    values = document(
        64,
        role("learner", 8, num_gpus=1),
        role("sampler", 40, num_gpus=1),
        role("reward-server", 32, min=16, max=64, num_gpus=0.5),
        gpu="h200",
    )
    cluster, submit = made(values, *AWS)
    assert counts(cluster) == {
        "learner": ("p5en.48xlarge", 1, 1),
        "sampler": ("p5en.48xlarge", 5, 5),
        "reward-server": ("p5en.48xlarge", 1, 4),
    }
    for name in counts(cluster):
        assert cluster["available_node_types"][name]["labels"] == {"tessera-role": name}
    assert "--reward.labels tessera-role=reward-server" in submit.replace("'", "").replace("\\", "")
    assert cluster["max_workers"] == 10


def test_small_machines_are_taken_where_there_are_some() -> None:
    values = document(10, role("learner", 4, num_gpus=1), role("sampler", 4, num_gpus=1),
                      role("reward-server", 2, min=1, max=4, num_gpus=1), gpu="l40s")  # fmt: skip
    assert counts(made(values, *AWS)[0]) == {
        "learner": ("g6e.24xlarge", 1, 1),
        "sampler": ("g6e.24xlarge", 1, 1),
        "reward-server": ("g6e.4xlarge", 1, 4),
    }


def test_a_pool_must_name_its_nodes() -> None:
    """On AWS it has machines of its own; your own machines are all of one kind."""
    with pytest.raises(ConfigError, match="pool 'fid' might run on the nodes of other roles"):
        made(many_gpus(), *AWS)
    made(many_gpus(), *OWN)


def test_own_machines_are_all_joined() -> None:
    cluster, _ = made(eight_gpus(), *OWN)
    (node,) = cluster["available_node_types"].values()
    assert (node["min_workers"], node["max_workers"]) == (2, 2)
    assert cluster["provider"]["worker_ips"] == ["10.0.0.2", "10.0.0.3"]


IMAGE = {"image": "registry.example/tessera:1"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "machines of AWS come without Tessera"),
        (IMAGE, "share no storage: give --checkpoint-url"),
        (IMAGE | {"setup": ("true",)}, "--setup prepares machines without --image"),
        ({"worker_ip": ("10.0.0.1",)}, "--worker-ip needs --head-ip"),
        ({"head_ip": "10.0.0.1", "worker_ip": ("10.0.0.1",)}, "each machine once"),
        ({"head_ip": "host.name"}, "--head-ip must be an IP address, found 'host.name'"),
        (IMAGE | {"idle_minutes": 0}, "--idle-minutes must be >= 1, found 0"),
        (IMAGE | {"ssh_key": "key; rm -rf"}, "--ssh-key must be an absolute path"),
        ({"image": "no tag"}, "--image must be an image"),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RAY_UP.options(preset="miniature", gpus=0, **given)


def test_a_gpu_that_aws_lacks() -> None:
    with pytest.raises(ConfigError, match="AWS has no machine with 4090"):
        made(one_gpu() | {"gpu": "4090"}, *AWS)
