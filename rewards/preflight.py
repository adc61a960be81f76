"""What reward servers load and take, before any starts: files, downloads, texts, GPU memory.

No network is loaded. Scorers of pools with their own runtime environment cannot be checked here.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from cluster.messages import Condition
from cluster.preflight import Findings
from rewards.base import ImageWork
from rewards.config import NETWORKS, JudgeConfig, RewardsConfig, RewardServerConfig
from rewards.metrics.figures import prefix_of
from rewards.networks.features import FeaturesConfig, convnet_file
from rewards.networks.features_check import check_features, features_memory, features_work
from rewards.scorers.config import ScorerConfig
from rewards.scorers.prompts import PromptConfig
from rewards.scorers.text_image import TextImageConfig
from rewards.scorers.user_rewards import UserReward

MAX_CONDITIONS = 20_000  # conditions whose texts are checked: seconds


def check_rewards(
    rewards: RewardsConfig, skipped_pools: Collection[str], side: int, findings: Findings
) -> None:
    """Check scorers and feature network of the rewards.

    Args:
        skipped_pools: pools with their own runtime environment.
        side: pixels a side of the policy's images; 0 if unknown.
    """
    for each in rewards.spaces().values():
        if each.term.rebuild_every:
            findings.notes.append(
                f"{each.option}.rebuild_every is not used any more and goes in the next release: "
                "the history is decomposed when the next iteration needs it; leave it out"
            )
    for name, scorer in rewards.scorers().items():
        if scorer.pool not in skipped_pools:
            scorer.check(f"rewards.{name}", findings)
    if rewards.features_pool not in skipped_pools:
        for each in rewards.spaces().values():
            check_features(each.features_option, each.features, side, findings)


def check_judge(
    judge: JudgeConfig, side: int, classes: Collection[int] | None, findings: Findings
) -> None:
    """Check the networks of the evaluation.

    Args:
        classes: of the conditions; None if conditions are captions.
    """
    for name, scorer in judge.scorers().items():
        scorer.check(f"judge.{name}", findings)
    judge.classifier.check(side, classes, findings)
    for option, features in judge.feature_options().items():
        check_features(option, features, side, findings, judge=True)


def check_texts(
    rewards: RewardsConfig,
    judge: JudgeConfig | None,
    skipped_pools: Collection[str],
    conditions: Sequence[Condition],
    findings: Findings,
    *,
    shipped: bool = False,
) -> None:
    """Check that every scorer reads the conditions' texts, with the tokenizers on this machine.

    Args:
        judge: None without an evaluation.
        shipped: the conditions are the miniature's, which its networks read: no tokenizer is loaded
            for these (a second at every start).
    """
    scorers: dict[str, ScorerConfig] = {
        f"rewards.{name}": scorer
        for name, scorer in rewards.scorers().items()
        if scorer.pool not in skipped_pools
    }
    if judge is not None:
        scorers |= {f"judge.{name}": scorer for name, scorer in judge.scorers().items()}
    for option, scorer in scorers.items():
        if not (shipped and _is_miniature(scorer)):
            with findings.of(f"{option}.prompts"):
                scorer.check_texts(option, conditions[:MAX_CONDITIONS], findings)


def _is_miniature(scorer: ScorerConfig) -> bool:
    return (
        isinstance(scorer, TextImageConfig)
        and scorer.model.startswith(NETWORKS)
        and scorer.prompts == PromptConfig()
    )


@dataclass
class ServerMemory:
    """Bytes of a reward server on its GPU: weights counted, activations estimated."""

    weights: float = 0.0
    activations: float = 0.0
    """Of the network that takes most; networks run one after the other."""
    unknown: list[str] = field(default_factory=list)
    """Parts of unknown size: user rewards, networks of other kinds."""

    @property
    def total(self) -> float:
        return self.weights + self.activations

    def add(self, name: str, part: tuple[float, float]) -> None:
        weights, activations = part
        if not weights:
            self.unknown.append(name)
        self.weights += weights
        self.activations = max(self.activations, activations)


def server_memory(config: RewardServerConfig, *, features: bool) -> ServerMemory:
    """Memory of one server of a pool, with the judge if the server has one.

    Args:
        features: the pool runs the feature networks of the rewards.
    """
    found = ServerMemory()
    for name, scorer in _scorers(config).items():
        found.add(name, scorer.memory())
    judge = config.judge
    spaces = _of_rewards(config) if features else {}
    if judge is not None:
        for name, scorer in judge.scorers().items():
            found.add(f"judge.{name}", scorer.memory())
        if judge.classifier.enabled:
            found.add("judge.classifier", judge.classifier.memory())
        spaces |= judge.feature_options()
    for name, space in spaces.items():
        if space.network != "pixels":
            found.add(name, features_memory(space))
    return found


def server_work(config: RewardServerConfig, *, features: bool) -> dict[str, ImageWork | None]:
    """What one server of a pool computes for a training image, by option; None: unknown."""
    found = {name: scorer.work() for name, scorer in _scorers(config).items()}
    if features:
        found |= {name: features_work(space) for name, space in _of_rewards(config).items()}
    return found


def _of_rewards(config: RewardServerConfig) -> dict[str, FeaturesConfig]:
    """Option -> feature network of the rewards."""
    return {each.features_option: each.features for each in config.rewards.spaces().values()}


def judge_work(judge: JudgeConfig) -> dict[str, ImageWork | None]:
    """What the judge's networks compute for an evaluated image, by option; None: unknown."""
    found = {f"judge.{name}": scorer.work() for name, scorer in judge.scorers().items()}
    if judge.classifier.enabled:
        found["judge.classifier"] = judge.classifier.work()
    spaces = judge.feature_options()
    return found | {name: features_work(space) for name, space in spaces.items()}


def same_networks(rewards: RewardsConfig, judge: JudgeConfig) -> list[str]:
    """Notes on networks of the judge that rewards with a weight use, too."""
    found, scorers = [], rewards.scorers()
    for name, ours in judge.scorers().items():
        theirs = scorers.get(name)
        if theirs is not None and theirs.weight and model_of(ours) == model_of(theirs):
            found.append(
                f"judge.{name} is the model of rewards.{name} ({model_of(ours)[0]}): its figure "
                "says how far the reward was raised, not whether images are better. Name another "
                f"model (judge.{name}.model, judge.{name}.pretrained)"
            )
    return found + _lowered_figures(rewards, judge)


def _lowered_figures(rewards: RewardsConfig, judge: JudgeConfig) -> list[str]:
    """Notes on feature spaces of the judge in which a distribution reward lowers the FID."""
    found, lowered = list[str](), rewards.lowered()
    own = {
        space: next((name for name, theirs in lowered.items() if same_space(theirs, ours)), "")
        for space, ours in judge.spaces().items()
    }
    others = [
        f"{prefix_of(space)}fid, in {judge.spaces()[space].network}, is of another network"
        for space, reward in own.items()
        if not reward
    ]
    for (space, reward), (option, features) in zip(own.items(), judge.feature_options().items()):
        if reward:
            said = others[0] if others else f"name another network than {reward}'s"
            found.append(
                f"{option} is the network of {reward} ({features.network}): the figure "
                f"{prefix_of(space)}fid is what the distribution reward lowers; {said}"
            )
    return found


def model_of(scorer: ScorerConfig) -> tuple[str, str]:
    """Model and weights of a text-image scorer."""
    assert isinstance(scorer, TextImageConfig)
    return scorer.model, scorer.pretrained


def same_space(first: FeaturesConfig, second: FeaturesConfig) -> bool:
    """Whether two configurations name one network."""
    names = []
    for each in (first, second):
        file = convnet_file(each) if each.network == "convnet" else each.checkpoint
        names.append((each.network, each.model, file))
    return names[0] == names[1]


def _scorers(config: RewardServerConfig) -> dict[str, ScorerConfig]:
    """Option -> scorer of a pool's rewards."""
    return {
        f"rewards.extra {name}" if isinstance(scorer, UserReward) else f"rewards.{name}": scorer
        for name, scorer in config.rewards.scorers().items()
        if scorer.pool == config.pool
    }
