"""Throughput against the number of reward servers, with a scorer of fixed cost, on real Ray.

python -m tests.bench.reward_server [--servers 1 2 4 8] [--seconds-per-image 0.01] [--groups 40]

The servers are real ones (queue, batching, panel, per-image errors); the scorer sleeps a known time
for every image, so that the machine's cores do not bound the figure, and samplers answer at once.
What is measured is what Tessera adds. The groups are given for each server: at least `--groups`.
"""

from __future__ import annotations

import argparse
import time

from cluster.messages import Condition, SampleRequest, SamplingSpec
from cluster.ray_backend.fleet import RayFleet
from cluster.ray_session.session import RayConfig, RaySession
from cluster.roles import FleetPlan, Resources, Role
from learner.config import RunConfig, load_preset, merge, to_dict, validate
from learner.fleet_plan import fleet_plan
from tests.stand_ins import Idle, InstantSampler

ROLLOUTS = 16


def bench_config(servers: int, seconds: float) -> RunConfig:
    changes = {
        "num_reward_servers": servers,
        "rollouts_per_group": ROLLOUTS,
        "rewards": {
            "clip": {"enabled": False},
            "hps": {"enabled": False},
            "extra": [f"tests.stand_ins:SlowPerImage=1,seconds={seconds}"],
            "features": {"network": "pixels"},
        },
        "reward": {"num_cpus": 0.01},
        "evaluation": {"num_images": 0},
    }
    return validate(merge(to_dict(load_preset("miniature")), changes), "bench")


def plan(servers: int, seconds: float) -> FleetPlan:
    def role(name: str, factory: type) -> Role:
        return Role(name=name, factory=factory, config=None, resources=Resources(num_cpus=0.01))

    return FleetPlan(
        sampler=role("sampler", InstantSampler),
        reward_server=fleet_plan(bench_config(servers, seconds)).reward_server,
        moments_server=role("moments-server", Idle),
        learner=role("learner", Idle),
    )


def requests(count: int) -> list[SampleRequest]:
    return [
        SampleRequest(
            stream="train",
            iteration=0,
            group=group,
            condition=Condition(text="x", class_index=0),
            num_rollouts=ROLLOUTS,
            seed=0,
            spec=SamplingSpec(),
        )
        for group in range(count)
    ]


def rate(session: RaySession, servers: int, seconds: float, groups: int) -> float:
    """Images per second, start-up and the first round left out."""
    with RayFleet(plan(servers, seconds), session) as fleet:
        fleet.collect(fleet.submit(requests(2 * servers)))
        count = groups * servers
        start = time.perf_counter()
        fleet.collect(fleet.submit(requests(count)))
        return count * ROLLOUTS / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--servers", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--seconds-per-image", type=float, default=0.01)
    parser.add_argument("--groups", type=int, default=40)
    options = parser.parse_args()
    ideal = 1 / options.seconds_per_image
    print(f"scorer of {options.seconds_per_image * 1000:g} ms an image, groups of {ROLLOUTS}")
    print("servers   images/s   of linear   of what the scorer alone allows")
    first = 0.0
    with RaySession(RayConfig()) as session:
        for servers in options.servers:
            found = rate(session, servers, options.seconds_per_image, options.groups)
            first = first or found / servers
            linear, share = found / (servers * first), found / (servers * ideal)
            print(f"{servers:7d}   {found:8.1f}   {linear:9.1%}   {share:9.1%}", flush=True)
    print(f"RESULT reward_server.linear_{servers}={linear:.3f}")
    print(f"RESULT reward_server.of_scorer_{servers}={share:.3f}")


if __name__ == "__main__":
    main()
