"""A run's configuration as the plain sizes that `learner.capacity.seconds` computes with."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from actors.checkpoints.loading import count_parameters
from actors.kernels.attention import padded_head_dim
from actors.models.base import PolicyArchitecture
from actors.models.vq import VQConfig, VQDecoder
from cluster.roles import Role
from learner.capacity import seconds
from learner.capacity.cards import Card
from learner.capacity.gpus import WIDTH, rollouts_of
from learner.capacity.seconds import Learning, Phase, Sampling, Transformer
from learner.config import RunConfig
from learner.fleet_plan import fleet_plan
from rewards.base import ImageWork
from rewards.config import RewardServerConfig
from rewards.networks.features_check import feature_dim
from rewards.preflight import server_work


@dataclass(frozen=True)
class Models:
    """What a run decodes with."""

    policy: PolicyArchitecture
    tokenizer: VQConfig


@functools.cache
def transformer(policy: PolicyArchitecture) -> Transformer:
    parameters = count_parameters(policy)
    one_less = dataclasses.replace(policy, num_layers=policy.num_layers - 1)
    return Transformer(
        layers=policy.num_layers,
        dim=policy.dim,
        cached=policy.num_heads * padded_head_dim(policy.head_dim, "cuda"),
        tokens=policy.num_tokens,
        vocabulary=policy.vocab_size,
        block=parameters - count_parameters(one_less),
        parameters=parameters,
    )


@functools.cache
def image_flops(tokenizer: VQConfig, grid: int) -> float:
    """Operations of decoding one image, counted on a network without memory."""
    with torch.device("meta"):
        decoder = VQDecoder(tokenizer)
        latents = torch.empty(1, tokenizer.codebook_dim, grid, grid)
    with FlopCounterMode(display=False) as counter:
        decoder.decode_latents(latents)
    return float(counter.get_total_flops())


def sampling_of(config: RunConfig, models: Models) -> Sampling:
    """The part of the sampler that has most groups."""
    rollouts, spec = config.rollouts_per_group, config.sampling
    return Sampling(
        groups=-(-config.groups_per_iteration // config.num_samplers),
        rows=rollouts * (2 if spec.guided_sampling else 1),
        drawn=rollouts,
        max_groups=config.sampler.max_groups,
        width=WIDTH[config.sampler.dtype],
        fused=config.sampler.kernels == "auto",
        image_flops=image_flops(models.tokenizer, models.policy.grid),
        image_bf16=config.sampler.image_dtype == "bfloat16",
    )


def learning_of(config: RunConfig) -> Learning:
    """The part of the learner that has most rollouts."""
    options, loss = config.learner, config.loss
    proximal = options.minibatches > 1 or loss.needs_proximal
    return Learning(
        rollouts=rollouts_of(config),
        rows=2 if config.sampling.learned().guided_sampling else 1,
        microbatch=options.microbatch,
        passes_before=(loss.kl_coef > 0) + proximal,
        updates=options.updates_per_iteration,
        checkpointing=options.checkpointing,
        bf16=options.precision == "bf16",
        compiled=options.compile != "never",
        learners=config.num_learners,
    )


def scoring_of(config: RunConfig) -> list[tuple[Role, dict[str, ImageWork | None]]]:
    """Pool -> what its servers compute for each image."""
    plan, found = fleet_plan(config), []
    for role in plan.servers:
        assert isinstance(role.config, RewardServerConfig)
        features = role is plan.feature_server("rewards")
        found.append((role, server_work(role.config, features=features)))
    return found


def phases_of(config: RunConfig, models: Models, card: Card) -> tuple[list[Phase], list[str]]:
    """Phases of an iteration in order, and the options whose work is not known.

    Roles without a GPU are left out: a CPU's figures are not in the table.
    """
    model, found, unknown = transformer(models.policy), list[Phase](), list[str]()
    wire, images = WIDTH[config.weights.wire(config.sampler.dtype)], _images(config)
    if config.sampler.num_gpus:
        work = sampling_of(config, models)
        found += [seconds.sample(model, work, card), seconds.decode_images(work, card)]
    for role, networks in scoring_of(config):
        unknown += [name for name, work in networks.items() if work is None]
        each = images / role.count
        spaces = {each.features_option for each in config.rewards.spaces().values()}
        if role.resources.num_gpus:
            known = {name: work for name, work in networks.items() if work}
            parts = {
                "score": [work for name, work in known.items() if name not in spaces],
                "features": [work for name, work in known.items() if name in spaces],
            }
            for name, these in parts.items():
                if these:
                    found.append(seconds.score(name, role.name, each, these, card))
    side = models.policy.grid * models.tokenizer.downsampling
    sizes = [
        (feature_dim(each.features, side), each.term.covariance == "full")
        for each in config.rewards.spaces().values()
    ]
    found.append(seconds.moments(images, sizes))
    if config.learner.num_gpus:
        found.append(seconds.learn(model, learning_of(config), card))
        found.append(seconds.publish(model, wire, card))
    if config.sampler.num_gpus:
        found.append(seconds.load(model, wire, card))
    return found, unknown


def _images(config: RunConfig) -> int:
    return config.groups_per_iteration * config.rollouts_per_group
