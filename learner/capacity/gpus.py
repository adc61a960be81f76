"""Processes on each GPU and their memory, computed. Every process has a CUDA context of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from actors.checkpoints.loading import count_parameters
from actors.models.base import PolicyArchitecture
from actors.models.vq import VQConfig
from actors.preflight import image_side
from cluster.placement.nodes import UNITS, choose_gpus
from cluster.program.gpu_memory import CONTEXT
from learner.capacity.memory import LearnerMemory, learner_memory, sampler_memory
from learner.config import RunConfig
from learner.evaluation.held_out import GROUP, base_rows
from learner.fleet_plan import fleet_plan
from rewards.config import RewardServerConfig
from rewards.preflight import server_memory

WIDTH = {"float32": 4, "bfloat16": 2}  # bytes
GB = 1e9
SPARE = 0.1  # of a process's memory, left to the allocator and to kernels' workspaces
MAPS = 3  # of the decoder's widest, held at a time


@dataclass(frozen=True)
class Process:
    """A worker with a share of a GPU, or with several."""

    name: str
    share: float
    """GPUs."""
    memory: float
    """Bytes, with its context."""
    unknown: tuple[str, ...] = ()
    """Networks of unknown size, not counted."""
    role: str = ""

    def least_share(self, size: float) -> float:
        """The part of a GPU of `size` bytes that it needs, with some to spare."""
        return self.memory / (size * (1 - SPARE))

    def fits(self, size: float) -> bool:
        """Whether it fits its share of a GPU, which bounds its memory
        (`cluster.program.gpu_memory`)."""
        return self.least_share(size) <= min(self.share, 1.0)


@dataclass
class Gpu:
    """A GPU and its processes."""

    processes: list[Process]
    free: int = UNITS
    """Units not assigned."""

    @property
    def memory(self) -> float:
        """Bytes of all processes."""
        return sum(process.memory for process in self.processes)


def processes(config: RunConfig, policy: PolicyArchitecture, tokenizer: VQConfig) -> list[Process]:
    """Every worker with a GPU, in the order in which the fleet starts them."""
    plan, found = fleet_plan(config), list[Process]()
    amounts: dict[str, tuple[float, tuple[str, ...]]] = {
        plan.learner.name: (memory_of(config, policy).total, ()),
        plan.sampler.name: (of_sampler(config, policy, tokenizer), ()),
    }
    for role in plan.servers:
        assert isinstance(role.config, RewardServerConfig)
        counted = server_memory(role.config, features=role is plan.feature_server("rewards"))
        amounts[role.name] = counted.total, tuple(counted.unknown)
    for role in plan.roles:
        if role.resources.num_gpus and role.name in amounts:
            memory, unknown = amounts[role.name]
            found += [
                Process(
                    role.worker_name(at),
                    role.resources.num_gpus,
                    memory + CONTEXT,
                    unknown,
                    role.name,
                )
                for at in range(role.count)
            ]
    return found


def memory_of(config: RunConfig, policy: PolicyArchitecture, microbatch: int = 0) -> LearnerMemory:
    """Memory of a run's learner; microbatch 0 is the configured one."""
    options = config.learner
    return learner_memory(
        policy,
        microbatch=microbatch or min(options.microbatch, rollouts_of(config)),
        precision=options.precision,
        checkpointing=options.checkpointing,
        reference=config.loss.kl_coef > 0 and options.reference_device == "learner",
        learners=config.num_learners,
        guided=config.sampling.learned().guided_sampling,
    )


def rollouts_of(config: RunConfig) -> int:
    """Most rollouts of an iteration on one learner."""
    return -(-config.groups_per_iteration * config.rollouts_per_group // config.num_learners)


def evaluated_group(config: RunConfig) -> tuple[int, int]:
    """Groups of an evaluation, and images of each; of captions, one image each is assumed."""
    images, conditions = config.evaluation.num_images, config.conditions
    if not images or conditions.captions:
        return images, min(images, 1)
    count = len(conditions.classes or conditions.class_names)
    of_class = -(-images // count)
    return count * -(-of_class // GROUP), min(of_class, GROUP)


def of_sampler(config: RunConfig, policy: PolicyArchitecture, tokenizer: VQConfig) -> float:
    """Bytes of a sampler: policy, caches, tokenizer, a group's images while they are decoded, and a
    snapshot while it is verified (with LoRA the base's, in full precision). Caches are those of the
    largest batch, of training or of an evaluation."""
    _, evaluated = evaluated_group(config)
    guided = config.evaluation.num_images and any(
        row.spec.guided_sampling for row in base_rows(config)
    )
    decoding = max(
        sampler_memory(
            policy,
            rollouts=rollouts,
            dtype=config.sampler.dtype,
            guided=with_guidance,
            max_groups=config.sampler.max_groups,
        )
        for rollouts, with_guidance in (
            (config.rollouts_per_group, config.sampling.guided_sampling),
            (evaluated, bool(guided)),
        )
    )
    widest = tokenizer.channels * tokenizer.multipliers[0] * image_side(policy, tokenizer) ** 2
    width = WIDTH[config.sampler.image_dtype]
    images = MAPS * max(config.rollouts_per_group, evaluated) * widest
    wire = "float32" if config.learner.lora.rank else config.weights.wire(config.sampler.dtype)
    snapshot = WIDTH[wire] * count_parameters(policy)
    return decoding + snapshot + width * (count_parameters(tokenizer) + images)


def fits(gpus: Sequence[Gpu], size: float) -> bool:
    """Whether every process fits its share of a GPU of `size` bytes."""
    return all(process.fits(size) for gpu in gpus for process in gpu.processes)


def share_notes(found: Sequence[Process], size: float) -> list[str]:
    """Processes that need more than their share of a GPU of `size` bytes, one of each role."""
    large = {process.role: process for process in found if not process.fits(size)}
    return [
        f"{process.name} needs {process.memory / GB:.1f} GB by the arithmetic of learner.plan, and "
        f"{SPARE:.0%} to spare; its share, {min(process.share, 1.0):g} of a GPU of "
        f"{size / GB:.3g} GB, is {min(process.share, 1.0) * size / GB:.1f}: it will probably run "
        f"out of memory (num_gpus of at least {process.least_share(size):.2f}, or a smaller "
        f"{'learner.microbatch' if process.role == 'learner' else 'batch'})"
        for process in large.values()
    ]


def pack(found: list[Process]) -> list[Gpu]:
    """Assign processes as Ray does: each to the fullest GPU with room, whole GPUs exclusively."""
    gpus: list[Gpu] = []
    for process in found:
        units = round(process.share * UNITS)
        chosen = choose_gpus([gpu.free for gpu in gpus], units)
        while chosen is None:
            gpus.append(Gpu([]))
            chosen = choose_gpus([gpu.free for gpu in gpus], units)
        for number in chosen:
            gpus[number].processes.append(process)
            gpus[number].free -= min(units, UNITS)
    return gpus
