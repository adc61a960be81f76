"""What the evaluations of a run cost, by the arithmetic of its iterations."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from cluster.messages import SamplingSpec
from learner.capacity import seconds
from learner.capacity.budget import sampling_seconds
from learner.capacity.cards import Card
from learner.capacity.gpus import evaluated_group, pack, processes
from learner.capacity.seconds import Phase, Sampling
from learner.capacity.workload import Models, sampling_of, transformer
from learner.config import RunConfig
from learner.evaluation.held_out import base_rows, tuned_row
from learner.fleet_plan import fleet_plan
from rewards.preflight import judge_work


@dataclass(frozen=True)
class EvaluationCost:
    """Evaluations of a run."""

    each: float
    """Seconds of one of the tuned policy, while nothing else is computed."""
    count: int
    """How many: rows of the base policy, those while training, the last one."""
    total: float
    """Seconds of all, without those of the real images' features."""
    unknown: tuple[str, ...] = ()
    """Networks whose work is not counted."""


def evaluation_cost(config: RunConfig, models: Models, card: Card) -> EvaluationCost:
    """Seconds of a run's evaluations: sampling, judging, and the figures, which the driver computes
    afterwards."""
    if not config.evaluation.num_images:
        return EvaluationCost(0.0, 0, 0.0)
    gpus = pack(processes(config, models.policy, models.tokenizer))
    figures = seconds.figures(config.evaluation.num_images)

    def of(spec: SamplingSpec) -> float:
        phases = evaluation_phases(config, models, spec, card)
        calls = len(evaluated(config, spec, models).calls)
        return sampling_seconds(phases, gpus, calls) + figures

    before = [of(row.spec) for row in base_rows(config)]
    each = of(tuned_row(config).spec)
    every = config.evaluation.every or config.iterations
    after = -(-config.iterations // every)  # the last one while training is the tuned policy's
    unknown = tuple(name for name, work in judge_work(config.judge).items() if work is None)
    return EvaluationCost(each, len(before) + after, sum(before) + after * each, unknown)


def evaluation_phases(
    config: RunConfig, models: Models, spec: SamplingSpec, card: Card
) -> list[Phase]:
    """Sampling and judging of one policy; roles without a GPU are left out. The main pool of reward
    servers judges."""
    found, work = list[Phase](), evaluated(config, spec, models)
    if config.sampler.num_gpus:
        model = transformer(models.policy)
        found += [seconds.sample(model, work, card), seconds.decode_images(work, card)]
    role = fleet_plan(config).reward_server
    if role.resources.num_gpus:
        networks = [each for each in judge_work(config.judge).values() if each]
        images = work.groups * work.drawn * config.num_samplers / role.count
        found.append(seconds.score("judge", role.name, images, networks, card))
    return found


def evaluated(config: RunConfig, spec: SamplingSpec, models: Models) -> Sampling:
    """One sampler's part of an evaluation."""
    groups, drawn = evaluated_group(config)
    return dataclasses.replace(
        sampling_of(config, models),
        groups=-(-groups // config.num_samplers),
        rows=drawn * (2 if spec.guided_sampling else 1),
        drawn=drawn,
    )
