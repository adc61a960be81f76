"""The fleet plans of runs and of evaluations: their roles and configurations."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from actors.sampler import Sampler, SamplerConfig
from cluster.program.precision import DETERMINISTIC
from cluster.roles import FleetPlan, Resources, Role
from learner.config import RunConfig
from learner.training.config import LearnerConfig
from learner.training.learner import Learner
from rewards.config import RewardServerConfig, RewardServerResources
from rewards.scorers.r_precision import distinct_texts
from rewards.servers.moments_server import MomentsServer
from rewards.servers.reward_server import REWARDS, RewardServer

CONTROL_THREADS = 2  # of a reward server: statistics and features beside the scoring
DEPTH = 2  # requests of a reward server that scores one at a time: the running one and the next


def fleet_plan(config: RunConfig) -> FleetPlan:
    """Put together the roles of a run."""
    learner = LearnerConfig(
        policy=config.policy,
        tokenizer=config.tokenizer,
        optimizer=config.learner,
        loss=config.loss,
        entropy=config.entropy,
        real=config.real,
        conditions=config.conditions,
        guards=config.guards,
        spec=config.sampling,
        seed=config.seed,
        iterations=config.iterations,
        max_staleness=config.max_staleness,
        timeout_s=config.timeout_s,
        reproducible=config.reproducible,
        wire_dtype=config.weights.wire(config.sampler.dtype),
    )
    terms = {space: each.term for space, each in config.rewards.spaces().items()}
    return FleetPlan(
        sampler=_sampler_role(config),
        reward_server=_reward_role(config, "", config.reward, config.num_reward_servers),
        reward_pools=tuple(
            _reward_role(config, name, pool, pool.num_servers, pool.runtime_env)
            for name, pool in config.reward_pools.items()
        ),
        moments_server=Role(
            name="moments-server",
            factory=MomentsServer,
            config=terms,
            resources=Resources(num_threads=max(term.num_threads for term in terms.values())),
        ),
        learner=Role(
            name="learner",
            factory=Learner,
            config=learner,
            resources=config.learner,
            environment=_environment(config),
            count=config.num_learners,
        ),
        timeout_s=config.timeout_s,
        heartbeat_s=config.heartbeat_s,
        max_restarts=config.max_restarts,
        slots=config.slots,
        max_staleness=config.max_staleness,
        transport=config.weights.transport,
        placement=config.placement,
        adapters_alone=config.learner.lora.rank > 0,
        quota=config.quota,
    )


def sampling_plan(config: RunConfig) -> FleetPlan:
    """The plan of an evaluation: samplers that hold `config.policy` as version 0, and reward
    servers with the panels of judge and rewards; no learner, no moments server.

    As many groups are in flight as keep all workers busy.
    """
    run, judge = fleet_plan(config), config.judge
    server = replace(run.reward_server, config=replace(run.reward_server.config, judge=judge))
    sampler = replace(run.sampler, config=replace(run.sampler.config, own_weights=True))
    calls = sampler.max_groups * sampler.depth * sampler.max_count
    servers = (server, *run.reward_pools)
    calls += sum(role.max_groups * role.depth * role.max_count for role in servers)
    return replace(
        run,
        sampler=sampler,
        reward_server=server,
        moments_server=replace(run.moments_server, count=0),
        learner=replace(run.learner, count=0),
        slots=max(config.slots, calls),
        max_staleness=0,
        adapters_alone=False,
    )


def scoring_plan(config: RunConfig) -> FleetPlan:
    """The plan of an evaluation of given images: reward servers alone."""
    plan = sampling_plan(config)
    return replace(plan, sampler=replace(plan.sampler, count=0))


def _sampler_role(config: RunConfig) -> Role:
    return Role(
        name="sampler",
        factory=Sampler,
        config=SamplerConfig(
            policy=config.policy,
            tokenizer=config.tokenizer,
            resources=config.sampler,
            reproducible=config.reproducible,
        ),
        resources=config.sampler,
        environment=_environment(config),
        count=config.num_samplers,
        max_groups=config.sampler.max_groups,
        # groups of evaluations and galleries may be larger than those of training
        max_rows=config.sampler.max_groups * config.rollouts_per_group * config.sampling.rows,
    )


def _reward_role(
    config: RunConfig,
    pool: str,
    servers: RewardServerResources,
    count: int,
    runtime_env: Mapping[str, Any] | None = None,
) -> Role:
    """A pool of reward servers; the main one has no name, and serves the evaluations."""
    together = 1 if config.reproducible else _scored_together(config, servers)
    depth = DEPTH
    if not config.reproducible:
        depth = servers.depth(config.rollouts_per_group * together)
    judge = config.judge if config.evaluation.num_images and not pool else None
    ranked = judge is not None and judge.r_precision
    server = RewardServerConfig(
        rewards=config.rewards,
        judge=judge,
        texts=distinct_texts(config.conditions.conditions()) if ranked else (),
        pool=pool,
        batching=servers.batching,
        device=servers.device,
        num_threads=servers.num_threads,
        timeout_s=config.timeout_s,
        reproducible=config.reproducible,
    )
    return Role(
        name=f"reward-{pool or 'server'}",
        factory=RewardServer,
        config=server,
        resources=servers,
        count=servers.bounded(count) if servers.on else count,
        depth=depth,
        max_groups=together,
        concurrency=depth + CONTROL_THREADS,
        autoscale=servers,
        panels=(REWARDS,) if pool else (),
        scorers=server.scorer_names(),
        spaces=server.spaces(),
        feature_panels=(REWARDS,) if pool and pool == config.rewards.features_pool else (),
        runtime_env=runtime_env,
        environment=_environment(config),
    )


def _scored_together(config: RunConfig, servers: RewardServerResources) -> int:
    """Groups that one call of a reward server may hold: as many as one of samplers, a power of two,
    and no more than a batch of images."""
    batch = max(servers.batching.max_batch // config.rollouts_per_group, 1)
    return min(config.sampler.max_groups, 1 << (batch.bit_length() - 1))


def _environment(config: RunConfig) -> Mapping[str, str]:
    """Variables that CUDA's libraries read when they start; values that are set already stay."""
    if not config.reproducible:
        return {}
    return {name: os.environ.get(name, value) for name, value in DETERMINISTIC.items()}
