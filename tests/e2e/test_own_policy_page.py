"""learner/your-own-policy.md: the miniature's commands run, in their order and as they stand there;
LlamaGen-B's name models, presets and options that exist."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.checkpoints.zoo import MODELS
from cluster.program.console import REFUSED
from rewards.reference.fetch import PUBLISHED
from tests.small_run import flags

PAGE = Path(__file__).parents[2] / "learner" / "your-own-policy.md"
MINIATURE, LLAMAGEN = "# the miniature", "# LlamaGen-B"
SMALL = {
    "learner.run": [*flags(), "--evaluation.num-images", "0", "--output.gallery-every", "0"],
    "learner.evaluate": ["--num-images", "20", "--bootstrap", "20"],
    "actors.sample": ["--per-condition", "1", "--device", "cpu"],
}
"""Options after those on the page, which they replace: fewer images and iterations."""
ITERATIONS = {"50-": "3-", "60.3.7": "4.3.2"}
"""Iterations and rollouts on the page -> what so small a run has."""


def commands(heading: str) -> Iterator[str]:
    """The commands in the page's blocks under a heading, whatever lines they take."""
    blocks = re.findall(r"^```\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.M)
    for block in blocks:
        first, _, rest = block.partition("\n")
        lines = ""
        for line in rest.splitlines() if first == heading else ():
            lines += f"\n{line}" if lines else line
            if lines.endswith("\\") or lines.count("'") % 2:
                continue
            yield lines
            lines = ""
        assert not lines, block


def parsed(command: str) -> tuple[str, list[str]]:
    """The module of a command, and its arguments."""
    words = shlex.split(command.replace("\\\n", ""))
    assert words[:2] == ["python", "-m"], command
    return words[2], words[3:]


def run(command: str) -> int:
    """Run a command of the miniature's, small and inline; returns its exit status."""
    if not command.startswith("python"):
        return subprocess.run(["bash", "-c", command], check=False).returncode
    module, arguments = parsed(command)
    if "--compare" not in arguments:
        arguments = [ITERATIONS.get(word, word) for word in arguments] + SMALL.get(module, [])
    if module in ("learner.run", "learner.evaluate") and "--compare" not in arguments:
        arguments.append("--inline")
    return importlib.import_module(module).main(arguments)


def test_every_command_of_the_miniature_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    listed = list(commands(MINIATURE))
    modules = [parsed(command)[0] for command in listed if command.startswith("python")]
    assert {"actors.weights", "learner.evaluate", "learner.run", "learner.report"} <= set(modules)
    for command in listed:
        assert run(command) == 0, (command, capsys.readouterr().err)
    own = tmp_path / "own"
    results = json.loads((own / "tuned" / "results.json").read_text())
    assert {"base", "base, CFG 2", "tuned"} <= set(results["rows"])
    assert (own / "samples" / "grid.png").is_file()
    assert (own / "best" / "sheet_001.png").is_file()
    assert (own / "tuned.pt").is_file()
    assert (tmp_path / "runs" / "own" / "report.html").stat().st_size > 10_000


def test_every_command_of_llamagen_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without its weights: names are known, plans are made, dry runs lack the files alone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TESSERA_WEIGHTS", str(tmp_path / "none"))
    seen = set()
    for command in commands(LLAMAGEN):
        module, arguments = parsed(command)
        if module == "actors.weights" and arguments[0] == "fetch":
            assert arguments[1:] in [[name] for name in MODELS]
        elif module == "rewards.reference":
            assert arguments[0] == "fetch"
            assert arguments[1] in PUBLISHED
        elif module == "learner.plan":
            assert importlib.import_module(module).main(arguments) == 0
        elif module in ("learner.run", "learner.evaluate") and "--preset" in arguments:
            dry = [] if "--dry-run" in arguments else ["--dry-run"]
            main = importlib.import_module(module).main
            assert main([*arguments, *dry, "--inline"]) == REFUSED
            said = "".join(capsys.readouterr())
            assert "fetch llamagen-b-256" in said
            assert "fetch llamagen-vq-16" in said
        else:  # of a run, as the miniature's; tests/unit/test_pages.py reads the options
            assert "own" in command
        seen.add(module)
    assert {"learner.plan", "learner.run", "learner.evaluate", "rewards.reference"} <= seen


def test_both_sides_have_every_step() -> None:
    steps = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    numbered = [step for step in steps if step[0].isdigit()]
    assert len(numbered) == 8
    for step in numbered:
        assert MINIATURE in step, step[:30]
        assert LLAMAGEN in step, step[:30]
