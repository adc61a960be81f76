"""The scripts of a Slurm job: what they ask of Slurm, and shellcheck. They run in
tests/distributed/hosts/test_slurm.py."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from cluster.deploy.plan_document import PlanDocument, read_plan
from cluster.deploy.slurm.files import SCRIPT, SLURM, SlurmOptions, files
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


def plan_of(values: dict[str, Any]) -> PlanDocument:
    return read_plan(text(values), "test")


def options(values: dict[str, Any], **given: Any) -> SlurmOptions:
    return SlurmOptions(preset=values["preset"], gpus=values["gpus"], **given)


def directives(values: dict[str, Any], **given: Any) -> dict[str, str]:
    """Option of sbatch -> value; they must stand before the first command."""
    script = files(plan_of(values), options(values, **given))[SCRIPT]
    before, _, after = script.partition("\n# ---- settings")
    assert "#SBATCH" not in after
    lines = [line for line in before.splitlines() if line.startswith("#SBATCH --")]
    return dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in lines)


def words(script: str, array: str) -> list[str]:
    """What bash takes an array of the settings for."""
    settings = script.partition("# ---- the job")[0]
    show = f'{settings}\npython3 -c "import json, sys; print(json.dumps(sys.argv[1:]))"'
    done = subprocess.run(
        ["bash", "-uc", f'{show} "${{{array}[@]}}"'],
        capture_output=True, text=True, check=True,
        env={"PATH": "/usr/bin:/bin", "HOME": "/home/user", "SLURM_ARRAY_TASK_ID": "5"},
    )  # fmt: skip
    return json.loads(done.stdout)


def test_what_one_node_is_asked_for() -> None:
    asked = directives(eight_gpus())
    assert (asked["nodes"], asked["gpus-per-node"], asked["ntasks-per-node"]) == ("1", "8", "1")
    assert asked["cpus-per-task"] == "48"
    assert int(asked["mem"].removesuffix("G")) > 15 * 4  # 16 workers of 4 GB
    assert asked["signal"] == "B:USR1@300"
    assert "requeue" in asked


def test_what_many_nodes_are_asked_for() -> None:
    asked = directives(many_gpus())
    assert (asked["nodes"], asked["gpus-per-node"], asked["mem"]) == ("8", "8", "0")
    few = directives(many_gpus(), gpus_per_node=4, cpus_per_node=96, partition="a,b", account="x")
    assert (few["nodes"], few["gpus-per-node"], few["cpus-per-task"]) == ("16", "4", "96")
    assert (few["partition"], few["account"]) == ("a,b", "x")


def test_a_fleet_on_cpus_asks_for_no_gpus() -> None:
    assert "gpus-per-node" not in directives(cpus())
    assert directives(cpus(), nodes=3)["nodes"] == "3"


@pytest.mark.parametrize(
    ("iteration_s", "checkpoint", "warning"),
    [(None, 0, 300), (30, 10**9, 300), (600, 20 * 10**9, 2100), (1e6, 0, 65535)],
)
def test_the_warning_leaves_time_for_an_iteration_and_a_checkpoint(
    iteration_s: float | None, checkpoint: int, warning: int
) -> None:
    values = one_gpu() | {"iteration_s": iteration_s, "checkpoint_bytes": checkpoint}
    assert directives(values)["signal"] == f"B:USR1@{warning}"


HARD = ["--conditions.template", "a photo of a {}", "--x", "it's", "--y", '$HOME `id` \\ " !*']


def test_the_runs_options_arrive_as_they_are() -> None:
    values = eight_gpus() | {"arguments": HARD}
    script = files(plan_of(values), options(values, run_dir="/shared/a", checkpoint_url="s3://b/c"))
    found = words(script[SCRIPT], "ARGUMENTS")
    assert found[2:8] == HARD
    assert found[8:] == [
        "--run-dir", "/shared/a/seed-5", "--auto-resume", "--output.checkpoint-url", "s3://b/c",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "step", ["", "apptainer exec --nv --bind '/a b' /t.sif", "--container-image=/t.sqsh"]
)
def test_a_container_is_words(step: str) -> None:
    script = files(plan_of(one_gpu()), options(one_gpu(), step=step))[SCRIPT]
    expected = {"": 0, "a": 6, "-": 1}[step[:1]]
    assert len(words(script, "STEP")) == expected


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("values", [cpus(), one_gpu(), many_gpus()])
def test_shellcheck_finds_nothing(values: dict[str, Any], tmp_path: Path) -> None:
    given = {"setup": ("module load cuda", ". /shared/venv/bin/activate"), "interface": "ib0",
             "step": "apptainer exec --nv /shared/tessera.sif"}  # fmt: skip
    written = files(plan_of(values), options(values, **given))
    for name, script in written.items():
        (tmp_path / name).write_text(script)
    checked = ["shellcheck", "--shell=bash", *sorted(written)]
    done = subprocess.run(checked, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"time": "tomorrow"}, "--time must be a time as sbatch takes it"),
        ({"time": "10:00\n#SBATCH --mem=0"}, "--time must be"),
        ({"partition": "a b"}, "--partition must be a name"),
        ({"interface": "ib0; id"}, "--interface must be a network device"),
        ({"step": "apptainer 'x"}, "--step is not one command line"),
        ({"setup": ("one\ntwo",)}, "--setup must be one line each"),
        ({"gpus_per_node": 0}, "--gpus-per-node must be >= 1, found 0"),
        ({"nodes": 1, "gpus_per_node": 4}, "have fewer GPUs than --gpus 8"),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        options(eight_gpus(), **given)


def test_workers_that_no_node_holds_are_refused() -> None:
    wide = document(16, role("learner", num_gpus=8), role("sampler", 8, num_gpus=1),
                    role("reward-server"))  # fmt: skip
    assert files(plan_of(wide), options(wide))
    with pytest.raises(ConfigError, match="a learner takes 8 GPUs, but --gpus-per-node is 4"):
        files(plan_of(wide), options(wide, gpus_per_node=4))


def test_a_preset_that_is_a_file_is_found_from_anywhere() -> None:
    values = {**one_gpu(), "preset": "mine.yaml"}
    text = SLURM.files(plan_of(values), options(values, preset_text="seed: 3"))[SCRIPT]
    assert str(Path("mine.yaml").absolute()) in text
    assert " mine.yaml" not in text


def test_every_step_of_the_way_is_said() -> None:
    said = SLURM.next_steps(plan_of(one_gpu()), options(one_gpu()))
    assert "sbatch deploy/run.sbatch" in said
    assert "deploy/beside JOB python -m cluster.stop --checkpoint" in said


def test_only_gpus_that_the_plan_uses_are_asked_for() -> None:
    given = SlurmOptions(preset="llamagen-b-256", gpus=1000)
    script = files(plan_of(eight_gpus()), given)[SCRIPT]
    assert "#SBATCH --nodes=1\n" in script
    assert "#SBATCH --gpus-per-node=8\n" in script


def test_the_object_store_is_one_that_ray_starts_with() -> None:
    values = cpus() | {"object_store_bytes": 5_000_000}  # Ray takes no less than 75 MiB
    script = files(plan_of(values), options(values, nodes=3))[SCRIPT]
    assert f"\nOBJECT_STORE_BYTES={1 << 30} " in script
