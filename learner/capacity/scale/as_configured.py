"""A run's settings as they are, on hosts that are known: what `iteration.predict` computes with."""

from __future__ import annotations

import os
from collections.abc import Sequence

from learner.capacity.scale.iteration import Prediction, Setting, predict
from learner.capacity.scale.links import Host, Messages, traffic
from learner.capacity.service_times import ServiceTimes, score_bytes
from learner.capacity.workload import Models, sampling_of
from learner.config import RunConfig
from learner.fleet_plan import fleet_plan


def one_host(config: RunConfig) -> Host:
    """All workers of a run."""
    plan = fleet_plan(config)
    servers = {role.name: role.count for role in plan.servers}
    return Host(samplers=plan.sampler.count, servers=servers, learners=plan.learner.count)


def setting_of(
    config: RunConfig,
    models: Models,
    times: ServiceTimes,
    hosts: Sequence[Host],
    *,
    cores: float,
    link: float = float("inf"),
    one_machine: bool = False,
) -> Setting:
    """What an iteration of a run is made of.

    Args:
        cores: of each host, for workers without a GPU.
        link: bytes/s between hosts, one way.
        one_machine: the hosts are parts of one machine, whose cores they share.
    """
    groups = config.groups_per_iteration
    messages = Messages.of(times, groups, score_bytes(config, models))
    plan = fleet_plan(config)
    on_cpus = {r.name: r.resources.num_threads for r in plan.roles if not r.resources.num_gpus}
    return Setting(
        groups=groups,
        calls=sampling_of(config, models).calls,
        staleness=config.max_staleness,
        hosts=[one_host(config)] if one_machine else hosts,
        traffic=traffic(hosts, messages),
        link=link,
        cores=cores if on_cpus.keys() & {"sampler", "learner"} else float("inf"),
        threads=on_cpus,
    )


def on_this_machine(config: RunConfig, models: Models, times: ServiceTimes) -> Prediction:
    """An iteration with all workers on this machine."""
    cores = os.cpu_count() or 1
    return predict(times, setting_of(config, models, times, [one_host(config)], cores=cores))
