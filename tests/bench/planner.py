"""Predicted against measured seconds of an iteration: the miniature with 1, 2 and 4 samplers, and
on several hosts at two link speeds.

python -m tests.bench.planner [--only samplers hosts] [--iterations 30]

A run with one sampler is measured; the planner takes its service times out of the trace and
predicts the others. Medians of iterations after a warm-up. The part `hosts` needs root and
iproute2 (network namespaces, `tests/distributed/hosts`).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from actors.checkpoints.sources import planned_policy, planned_tokenizer
from learner.capacity.scale.as_configured import one_host, setting_of
from learner.capacity.scale.iteration import predict
from learner.capacity.scale.links import Host
from learner.capacity.service_times import ServiceTimes, from_measured
from learner.capacity.workload import Models
from learner.config import RunConfig
from learner.runs.run_dir import RunDirectory

PARTS = ("samplers", "hosts")
WARM_UP = 0.25
SMALL = ("--evaluation.num-images", "0", "--output.checkpoint-every", "100000",
         "--output.no-rollouts", "--rewards.loo-fid.seed-images", "128")  # fmt: skip
LINKS = {"20_mbit": 20e6, "1_gbit": 1e9}
LABEL = "tessera-role"
PLACED = [
    word
    for role in ("learner", "sampler", "reward")
    for word in (f"--{role}.labels", f"{LABEL}={role}")
]
WIDE = ("--rollouts-per-group", "64")


def options(iterations: int, *more: str) -> list[str]:
    return ["--iterations", str(iterations), *SMALL, *more]


def measured_run(folder: Path, name: str, arguments: list[str]) -> Path:
    """A run in a process of its own; returns its directory."""
    run = folder / name
    command = [sys.executable, "-m", "learner.run", *arguments, "--run-dir", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        raise SystemExit(f"{name} ended with {done.returncode}: {done.stdout[-2000:]}{done.stderr}")
    return run


def iteration_seconds(run: Path) -> float:
    """Median seconds of a run's iterations after the warm-up."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = rows[int(len(rows) * WARM_UP) :]
    return statistics.median(row["time/iteration"] for row in kept)


def config_of(run: Path) -> tuple[RunConfig, Models]:
    config = RunDirectory.existing(run).read_config()
    policy, tokenizer = config.policy.source(), config.tokenizer.source()
    return config, Models(planned_policy(policy), planned_tokenizer(tokenizer))


def report(name: str, predicted: float, measured: float) -> None:
    ratio = predicted / measured
    print(f"{name:20s} predicted {predicted:.3f} s, measured {measured:.3f} s, {ratio:.2f}")
    print(f"RESULT planner.{name}_ratio={ratio:.3f}", flush=True)


def samplers(folder: Path, iterations: int, counts: Sequence[int]) -> None:
    """Predict runs with several samplers from the first one."""
    cores = os.cpu_count() or 1
    times: ServiceTimes | None = None
    for count in counts:
        run = measured_run(
            folder, f"samplers-{count}", options(iterations, "--num-samplers", str(count))
        )
        config, models = config_of(run)
        times = times or from_measured(run)
        setting = setting_of(config, models, times, [one_host(config)], cores=cores)
        report(f"samplers_{count}", predict(times, setting).seconds, iteration_seconds(run))


def hosts(folder: Path, iterations: int) -> None:
    """Predict a run on three hosts, one a role, at two link speeds, from a run on one host."""
    from tests.distributed.hosts.cluster import HostCluster
    from tests.distributed.hosts.network import Network, why_not

    if reason := why_not():
        print(f"hosts: skipped, {reason}")
        return
    more = [*WIDE, "--num-samplers", "1"]
    times = from_measured(measured_run(folder, "one-host", options(iterations, *more)))
    where = [Host(learners=1), Host(samplers=1), Host(servers={"reward-server": 1})]
    with Network(3) as network, HostCluster(network, cpus=2) as cluster:
        cluster.start_head(labels=f"{LABEL}=learner")
        for host, role in zip(network.hosts[1:], ("sampler", "reward")):
            cluster.join(host, labels=f"{LABEL}={role}")
        for name, speed in LINKS.items():
            for host in network.hosts:
                host.limit(round(speed))
            run = network.shared / f"run-{name}"
            line = [sys.executable, "-m", "learner.run", *options(iterations, *more)]
            line += ["--run-dir", str(run), "--ray.address", cluster.address, *PLACED]
            done = cluster.submit(line, timeout=600)
            if done.returncode:
                raise SystemExit(f"{name} ended with {done.returncode}: {done.stdout[-3000:]}")
            config, models = config_of(run)
            setting = setting_of(
                config,
                models,
                times,
                where,
                cores=os.cpu_count() or 1,
                link=speed / 8,
                one_machine=True,
            )
            report(f"hosts_{name}", predict(times, setting).seconds, iteration_seconds(run))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--counts", type=int, nargs="+", default=(1, 2, 4), help="of samplers")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in given.only:
            print(f"--- {name} (load {os.getloadavg()[0]:.1f})", flush=True)
            if name == "samplers":
                samplers(Path(folder), given.iterations, given.counts)
            else:
                hosts(Path(folder), given.iterations)
    print(f"load at the end: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
