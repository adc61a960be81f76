"""starts.jsonl: what a start records, how an end is told, secrets."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.control.discovery import left_behind
from cluster.io.run_layout import REPORT, STARTS
from cluster.io.starts import END, HOW, START, append_event, last_ending, read_events
from cluster.placement.nodes import Node
from cluster.program.secrets import without_secrets
from learner.fleet_plan import fleet_plan
from learner.runs.run_dir import RunDirectory
from learner.runs.starts import record_end, record_start
from tests.small_run import small_config


def test_a_start_and_its_end(tmp_path: Path) -> None:
    config = small_config(num_samplers=3)
    run = RunDirectory.create(str(tmp_path / "run"), config)
    nodes = [Node("a", 4.0, 1.0), Node("b", 8.0)]
    for number in range(2):
        record_start(run, ["--seed", "7", "--run-dir", "my run"], fleet_plan(config), nodes,
                     inline=False)  # fmt: skip
        start = read_events(run.path)[-1]
        assert start["resumed"] == bool(number)
    assert start["command"] == "python -m learner.run --seed 7 --run-dir 'my run'"
    assert start["versions"].keys() >= {"python", "torch", "ray", "tessera-rl"}
    assert start["hardware"]["hosts"] == 2
    assert (start["hardware"]["cluster_cpus"], start["hardware"]["cluster_gpus"]) == (12.0, 1.0)
    assert start["hardware"]["cores"] >= 1
    assert start["hardware"]["memory_gb"] > 0
    assert (start["fleet"]["sampler"], start["fleet"]["inline"]) == (3, False)
    assert last_ending(run.path) == ""
    record_end(run, "failed", "x" * 10_000)
    assert last_ending(run.path) == "failed"
    assert len(read_events(run.path)[-1]["detail"]) == 2000


def test_damaged_lines_are_left_out(tmp_path: Path) -> None:
    assert last_ending(tmp_path) is None
    append_event(tmp_path, START, {})
    with (tmp_path / STARTS).open("ab") as file:
        file.write(b'[1]\n{"event": "other"}\n\xff\n{"event": "en')
    assert [event["event"] for event in read_events(tmp_path)] == [START]


def test_how_a_run_ended_decides_over_its_report(tmp_path: Path) -> None:
    append_event(tmp_path, START, {})
    (tmp_path / REPORT).touch()
    assert left_behind(tmp_path)["stage"] == "killed"
    append_event(tmp_path, END, {HOW: "stopped"})
    left = left_behind(tmp_path)
    assert (left["stage"], left["report"]) == ("ended", str(tmp_path / REPORT))
    append_event(tmp_path, END, {HOW: "finished"})
    assert left_behind(tmp_path)["stage"] == "finished"


@pytest.mark.parametrize(
    ("given", "written"),
    [
        (["--seed", "7"], ["--seed", "7"]),
        (["--api-key", "abc", "x"], ["--api-key", "***", "x"]),
        (["--a.token=abc"], ["--a.token=***"]),
        (["--tokenizer.checkpoint", "t"], ["--tokenizer.checkpoint", "t"]),
        (["--u", "s3://me:pass@host/x"], ["--u", "s3://***@host/x"]),
        (["--password", "--seed", "7"], ["--password", "--seed", "7"]),
        (["--u", "https://TOKEN@host/x@y"], ["--u", "https://***@host/x@y"]),
        (["s3://k:pa/ss@h/x"], ["s3://***@h/x"]),
        (["https://h:80/a.npz"], ["https://h:80/a.npz"]),
        (
            ["--u=https://h/x?X-Amz-Date=1&X-Amz-Signature=ab%2F&b=2"],
            ["--u=https://h/x?X-Amz-Date=1&X-Amz-Signature=***&b=2"],
        ),
        (["{env_vars: {OPENAI_API_KEY: sk-1, N: 2}}"], ["{env_vars: {OPENAI_API_KEY: ***, N: 2}}"]),
        (['{"API_KEY": "sk, 1"}'], ['{"API_KEY": "***"}']),
        (["{API_KEY: '${API_KEY}'}"], ["{API_KEY: '${API_KEY}'}"]),
        (["{API_KEY: ${API_KEY}}"], ["{API_KEY: ${API_KEY}}"]),
        (["--vars", "API_KEY", "sk-1", "N", "2"], ["--vars", "API_KEY", "***", "N", "2"]),
        (["API_KEY=sk-1"], ["API_KEY=***"]),
        (["--vars=API_KEY=sk-1"], ["--vars=API_KEY=***"]),
        (["--hf-token-file", "/x"], ["--hf-token-file", "/x"]),
        (["--hf-token-file=/x"], ["--hf-token-file=/x"]),
    ],
)
def test_secrets_are_not_written(given: list[str], written: list[str]) -> None:
    assert without_secrets(given) == written


def test_the_error_of_a_run_is_written_without_secrets(tmp_path: Path) -> None:
    run = RunDirectory.create(str(tmp_path / "run"), small_config())
    text = "StorageError: s3://me:pass@host/x: expected a bucket; API_KEY: sk-1"
    record_end(run, "failed", text)
    expected = "StorageError: s3://***@host/x: expected a bucket; API_KEY: ***"
    assert read_events(run.path)[-1]["detail"] == expected
