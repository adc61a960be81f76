"""The committed examples: each is what the command in its head writes, bit for bit.

`python -m tests.unit.cluster.deploy.test_examples` writes them anew from their plans, which
`python -m learner.plan --json --preset llamagen-b-256 --gpu h200 --gpus N` made.
"""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from cluster.deploy.command import command_line, made_files, parse
from cluster.deploy.plan_document import read_plan

EXAMPLES = Path(__file__).parents[4] / "cluster" / "deploy" / "examples" / "kuberay"
SIZES = (1, 8, 64)


def given(gpus: int) -> list[str]:
    return ["kuberay", "--preset", "llamagen-b-256", "--gpus", str(gpus), "--gpu", "h200",
            "--image", "registry.example.org/tessera:0.1.0", "--ray-version", "2.60.0",
            "--plan", str(EXAMPLES / "plans" / f"{gpus}.json"), "--out", str(EXAMPLES)]  # fmt: skip


def expected() -> dict[str, str]:
    """Relative path -> text of every example."""
    made: dict[str, str] = {}
    for gpus in SIZES:
        target, options = parse(given(gpus))
        assert options.plan is not None
        plan = read_plan(options.plan.read_text(encoding="utf-8"), str(options.plan))
        made |= made_files(target, plan, options)
    return made


def test_the_examples_are_what_the_command_writes() -> None:
    made = expected()
    there = {str(file.relative_to(EXAMPLES)) for file in EXAMPLES.rglob("*.yaml")}
    assert there == made.keys()
    for path, text in made.items():
        assert (EXAMPLES / path).read_text(encoding="utf-8") == text, path


@pytest.mark.parametrize("gpus", SIZES)
def test_the_heads_command_makes_them(gpus: int) -> None:
    target, options = parse(given(gpus))
    job = next(EXAMPLES.glob(f"overlays/job-{gpus}-gpu*/rayjob.yaml"))
    first = job.read_text(encoding="utf-8").splitlines()[0]
    line = command_line(target, options)
    assert f"`{line}`" in first
    again, same = parse(shlex.split(line)[2:])
    assert again is target
    assert (same.preset, same.gpus, same.plan) == (options.preset, gpus, None)


if __name__ == "__main__":
    from cluster.deploy.command import write_all

    write_all(EXAMPLES, expected(), force=True)
