"""The best split of N GPUs among samplers, reward servers and learners: every one that may be best
is computed, and those that do not fit a GPU's memory are left out.

Three layouts: each worker on GPUs of its own; reward servers on the samplers' GPUs; these, and the
learner on the first of them. GPUs may be left over, so that more of them are never slower.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from cluster.program.gpu_memory import CONTEXT
from learner.capacity import seconds
from learner.capacity.budget import STEP, changed
from learner.capacity.cards import Card
from learner.capacity.gpus import SPARE, Process, memory_of, processes
from learner.capacity.scale.iteration import Prediction, Setting, predict
from learner.capacity.scale.links import Host, Messages, store_bytes, traffic
from learner.capacity.service_times import ServiceTimes, from_arithmetic, score_bytes
from learner.capacity.workload import Models, learning_of, phases_of, sampling_of, transformer
from learner.config import RunConfig

OWN, PAIRED, SHARED = "own GPUs", "reward servers beside samplers", "all on each GPU"
MAIN = "reward-server"
GRADIENTS = 4  # bytes a parameter: sums are fp32


@dataclass(frozen=True, kw_only=True)
class Site:
    """The cluster that is planned for."""

    card: Card
    gpus_per_node: int
    link: float
    """Bytes/s between nodes, one way."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """Workers of each role, and how they share GPUs."""

    samplers: int
    servers: Mapping[str, int]
    """Pool, by its role's name -> servers on GPUs."""
    learners: int
    layout: str = OWN

    @property
    def gpus(self) -> int:
        """GPUs that are in use."""
        if self.layout == SHARED:
            return self.samplers
        servers = 0 if self.layout == PAIRED else sum(self.servers.values())
        return self.samplers + self.learners + servers

    def hosts(self, gpus_per_node: int) -> list[Host]:
        """Workers of each node: learners first, then samplers, then reward servers."""
        learners = 1 if self.layout == SHARED else self.learners
        own = [] if self.layout == SHARED else ["learner"] * learners
        own += ["sampler"] * self.samplers
        if self.layout == OWN:
            own += [pool for pool, count in self.servers.items() for _ in range(count)]
        found = []
        for at in range(0, len(own), gpus_per_node):
            node = own[at : at + gpus_per_node]
            servers = {pool: node.count(pool) for pool in self.servers if pool in node}
            if self.layout != OWN and "sampler" in node:
                servers = dict.fromkeys(self.servers, node.count("sampler"))
            here = node.count("learner") + (self.layout == SHARED and not at)
            found.append(Host(samplers=node.count("sampler"), servers=servers, learners=here))
        return found


@dataclass(frozen=True)
class Plan:
    """A split, and what is predicted of it."""

    split: Split
    images: int
    """Of an iteration."""
    times: ServiceTimes
    setting: Setting
    prediction: Prediction

    @property
    def seconds(self) -> float:
        return self.prediction.seconds

    @property
    def rate(self) -> float:
        """Images/s."""
        return self.images / self.seconds

    def store(self) -> float:
        """Bytes in the fullest object store."""
        messages = Messages.of(self.times, self.setting.groups, 0.0)
        return store_bytes(self.setting.hosts, messages, self.setting.staleness)


class Search:
    """Predictions of a run's settings with other splits.

    Args:
        measured: replaces the arithmetic for the settings as they are given; other batches and
            other numbers of learners are scaled as the arithmetic has them.
    """

    def __init__(
        self, config: RunConfig, models: Models, site: Site, measured: ServiceTimes | None = None
    ) -> None:
        self._given, self._models, self._site = config, models, site
        self._base = on_gpus(config)
        self._measured = measured
        self._scores = score_bytes(config, models)
        self._times = from_arithmetic(self._base, models, site.card)
        self._sampling = functools.cache(self._sampling_seconds)
        self._learning = functools.cache(self._learning_seconds)
        self._fits_learner = functools.cache(self._learner_fits)
        self.pools = self._pools()
        _, self.unknown = phases_of(self._base, models, site.card)
        """Networks whose work is not counted."""

    def scaled(self, factor: float) -> Search:
        """The same with other groups an iteration."""
        groups = max(round(self._given.groups_per_iteration * factor), 1)
        config = dataclasses.replace(self._given, groups_per_iteration=groups)
        measured = self._measured
        if measured is not None:  # what an iteration takes grows with its groups
            grown = groups / self._given.groups_per_iteration
            measured = dataclasses.replace(
                measured, learn=measured.learn * grown, record=measured.record * grown
            )
        return Search(config, self._models, self._site, measured)

    def _pools(self) -> list[str]:
        found = [MAIN] if self._base.reward.num_gpus else []
        pools = self._base.reward_pools.items()
        return found + [f"reward-{name}" for name, pool in pools if pool.num_gpus]

    def best(self, gpus: int, staleness: int | None = None) -> Plan | None:
        """The fastest split of at most so many GPUs, of equals that with fewest; None: none fits.

        Args:
            staleness: None is the run's own.
        """
        ahead = self._base.max_staleness if staleness is None else staleness
        found: Plan | None = None

        def best() -> Plan | None:
            return found

        for bound, split in self._candidates(gpus, ahead, best):
            if found is not None and (bound, split.gpus) >= (found.seconds, found.split.gpus):
                continue
            plan = self.plan(split, ahead)
            if found is None or (plan.seconds, split.gpus) < (found.seconds, found.split.gpus):
                found = plan
        return found

    def _candidates(
        self, gpus: int, staleness: int, best: Callable[[], Plan | None]
    ) -> Iterator[tuple[float, Split]]:
        """Splits with their bounds. Numbers of learners and samplers that cannot be better than the
        best so far are passed over, whatever their reward servers."""
        pairs = [
            (self._bound(Split(samplers=samplers, servers={}, learners=learners), staleness),
             learners + samplers, learners, samplers)
            for learners, samplers in self._pairs(gpus)
        ]  # fmt: skip
        for bound, least, learners, samplers in sorted(pairs):
            found = best()
            if found is not None and (bound, least) >= (found.seconds, found.split.gpus):
                break  # and so are all that follow
            for split in self._with_servers(learners, samplers, gpus):
                bound, found = self._bound(split, staleness), best()
                if found is not None and bound > found.seconds and split.layout == OWN:
                    break  # those that follow have fewer reward servers
                yield bound, split
        for split in self._together(gpus):
            yield self._bound(split, staleness), split

    def _bound(self, split: Split, staleness: int) -> float:
        """Seconds that an iteration takes at least, without messages and the order of waves."""
        times, groups = self._measured or self._times, self._base.groups_per_iteration
        (sample, images), _ = self._sampling(split.samplers)
        drawn = -(-groups // split.samplers) * (sample + images)
        learn, driver = self._learning(split.learners), groups * times.driver
        scored = max(
            (-(-groups // split.servers[pool]) * times.score[pool] for pool in split.servers),
            default=0.0,
        )
        learning = times.commit + learn + times.publish + times.load
        on_sampler = drawn + times.load + scored * (split.layout != OWN)
        on_sampler += (learn + times.publish) * (split.layout == SHARED)
        loads = (on_sampler, scored, learn + times.publish, driver + times.record)
        return max(*loads, (max(drawn, scored, driver) + learning) / (staleness + 1))

    def plan(self, split: Split, staleness: int | None = None) -> Plan:
        """What is predicted of a split."""
        ahead = self._base.max_staleness if staleness is None else staleness
        (sample, images), calls = self._sampling(split.samplers)
        base = self._measured or self._times
        times = dataclasses.replace(
            base, sample=sample, images=images, learn=self._learning(split.learners)
        )
        hosts, groups = split.hosts(self._site.gpus_per_node), self._base.groups_per_iteration
        gradients = self._gradients(split.learners)
        setting = Setting(
            groups=groups,
            calls=calls,
            staleness=ahead,
            hosts=hosts,
            traffic=traffic(hosts, Messages.of(times, groups, self._scores, gradients)),
            link=self._site.link,
            paired=split.layout != OWN,
            shared=split.layout == SHARED,
        )
        images = groups * self._base.rollouts_per_group
        return Plan(split, images, times, setting, predict(times, setting))

    def _pairs(self, gpus: int) -> Iterator[tuple[int, int]]:
        """Numbers of learners and samplers: only those at which a worker's part shrinks."""
        groups = self._base.groups_per_iteration
        rollouts = groups * self._base.rollouts_per_group
        for learners in filter(self._fits_learner, steps(rollouts, gpus)):
            for samplers in steps(groups, gpus - learners):
                yield learners, samplers

    def _with_servers(self, learners: int, samplers: int, gpus: int) -> Iterator[Split]:
        if self._fits_paired:
            every = dict.fromkeys(self.pools, samplers)
            yield Split(samplers=samplers, servers=every, learners=learners, layout=PAIRED)
        if self._fits_own:
            for found in self._pooled(gpus - learners - samplers):
                yield Split(samplers=samplers, servers=found, learners=learners)

    def _together(self, gpus: int) -> Iterator[Split]:
        if self._fits_shared:
            beside = sum(self._share(role) for role in ("learner", *self.pools))
            # Ray puts two samplers on one GPU, unless each takes more than half of it
            most = gpus if round(1 - beside, 2) > 0.5 else 1
            for count in steps(self._base.groups_per_iteration, min(gpus, most)):
                every = dict.fromkeys(self.pools, count)
                yield Split(samplers=count, servers=every, learners=1, layout=SHARED)

    def _pooled(self, gpus: int) -> Iterator[dict[str, int]]:
        """Servers of each pool, most first: those of which none could be fewer without slowing the
        slowest."""
        return (dict(found) for found in self._every_pooled if sum(found.values()) <= gpus)

    @functools.cached_property
    def _every_pooled(self) -> list[dict[str, int]]:
        groups = self._base.groups_per_iteration
        scores, counts = (self._measured or self._times).score, steps(groups, groups)
        longest = sorted({-(-groups // c) * scores[p] for p in self.pools for c in counts})
        found = {
            tuple(self._fewest(scores[pool], limit, counts) for pool in self.pools)
            for limit in longest
        }
        every = (dict(zip(self.pools, each)) for each in found if all(each))
        return sorted(every, key=lambda each: -sum(each.values()))

    def _fewest(self, seconds: float, limit: float, counts: Sequence[int]) -> int:
        """Servers of a pool that score all groups within `limit` seconds; 0: no number does."""
        groups = self._base.groups_per_iteration
        slack = limit * (1 + 1e-9)
        return next((count for count in counts if -(-groups // count) * seconds <= slack), 0)

    # Seconds of other batches and groups of learners.
    def _sampling_seconds(self, samplers: int) -> tuple[tuple[float, float], list[int]]:
        """Seconds of a group's tokens and images, and groups of each call."""
        config = dataclasses.replace(self._base, num_samplers=samplers)
        work, card = sampling_of(config, self._models), self._site.card
        model = transformer(self._models.policy)
        sample = seconds.sample(model, work, card).seconds / work.groups
        images = seconds.decode_images(work, card).seconds / work.groups
        if self._measured:
            sample *= self._measured.sample / self._times.sample
            images *= self._measured.images / self._times.images
        return (sample, images), work.calls

    def _learning_seconds(self, learners: int) -> float:
        card = self._site.card
        if learners > self._site.gpus_per_node:
            card = dataclasses.replace(card, link=min(card.link, self._site.link))
        config = self._with_learners(learners)
        found = seconds.learn(transformer(self._models.policy), learning_of(config), card).seconds
        return found * (self._measured.learn / self._times.learn if self._measured else 1.0)

    def _gradients(self, learners: int) -> float:
        """Bytes over each link between learners' nodes."""
        if learners <= self._site.gpus_per_node:
            return 0.0
        return seconds.exchanged(
            transformer(self._models.policy), learning_of(self._with_learners(learners))
        )

    # What fits a GPU's memory.
    def _with_learners(self, learners: int) -> RunConfig:
        gpus = 1.0 if learners > 1 else self._base.learner.num_gpus
        learner = dataclasses.replace(self._base.learner, num_gpus=gpus)
        return dataclasses.replace(self._base, num_learners=learners, learner=learner)

    @functools.cached_property
    def _needs(self) -> dict[str, Process]:
        """One process of each role."""
        one = dataclasses.replace(self._base, num_samplers=1, num_reward_servers=1)
        found = processes(one, self._models.policy, self._models.tokenizer)
        return {process.role: process for process in found}

    def _share(self, role: str) -> float:
        """The least share of a GPU that a role needs, in steps."""
        need = self._needs[role].least_share(self._site.card.memory)
        return round(math.ceil(need / STEP - 1e-9) * STEP, 2)

    def _learner_fits(self, learners: int) -> bool:
        need = memory_of(self._with_learners(learners), self._models.policy).total + CONTEXT
        return need <= self._site.card.memory * (1 - SPARE)

    @functools.cached_property
    def _fits_own(self) -> bool:
        return all(self._share(role) <= 1 for role in ("sampler", *self.pools))

    @functools.cached_property
    def _fits_paired(self) -> bool:
        return sum(self._share(role) for role in ("sampler", *self.pools)) <= 1

    @functools.cached_property
    def _fits_shared(self) -> bool:
        roles = ("sampler", "learner", *self.pools)
        return sum(self._share(role) for role in roles) <= 1

    # The run's settings of a split.
    def configured(self, split: Split, staleness: int) -> RunConfig:
        """The run's configuration with the workers of a split."""
        shares, base = self._shares(split), self._base
        servers, pools = {MAIN: base.num_reward_servers, **split.servers}, {}
        for name, pool in base.reward_pools.items():
            role = f"reward-{name}"
            if role in shares:
                pool = dataclasses.replace(pool, num_gpus=shares[role], num_servers=servers[role])
            pools[name] = pool
        return dataclasses.replace(
            base,
            num_samplers=split.samplers,
            num_learners=split.learners,
            num_reward_servers=servers[MAIN],
            max_staleness=staleness,
            sampler=dataclasses.replace(base.sampler, num_gpus=shares["sampler"]),
            learner=dataclasses.replace(base.learner, num_gpus=shares["learner"]),
            reward=dataclasses.replace(base.reward, num_gpus=shares[MAIN]),
            reward_pools=pools,
        )

    def _shares(self, split: Split) -> dict[str, float]:
        """Share of a GPU of each worker: whole ones on their own; else what each needs, and the
        rest to the learner or the sampler."""
        if split.layout == OWN:
            return dict.fromkeys(("sampler", "learner", *self.pools), 1.0)
        roles = ["sampler", *self.pools, *(["learner"] if split.layout == SHARED else [])]
        shares = {role: self._share(role) for role in roles}
        alone = split.layout == SHARED and split.samplers == 1
        largest = "learner" if alone else "sampler"
        shares[largest] = round(shares[largest] + 1 - sum(shares.values()), 2)
        return {"learner": 1.0, **shares}


def steps(parts: int, most: int) -> list[int]:
    """Numbers of workers, up to `most`, at which the largest of their shares of `parts` shrinks."""
    found, count = list[int](), 1
    while count <= min(parts, most):
        found.append(count)
        share = -(-parts // count)
        if share == 1:
            break
        count = -(-parts // (share - 1))
    return found


def on_gpus(config: RunConfig) -> RunConfig:
    """The configuration with learners, samplers and the main reward servers on GPUs."""
    changes = {
        f"{name}.num_gpus": 1.0
        for name in ("learner", "sampler", "reward")
        if not getattr(config, name).num_gpus
    }
    return changed(config, changes) if changes else config
