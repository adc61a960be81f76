"""Configuration of rewards, judge and reward servers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any

import tyro
from pydantic import Field

from cluster.bounds import check_at_most
from cluster.messages import MAIN_SPACE, Condition
from cluster.program.secrets import check_environment
from cluster.roles import AutoscaleConfig, Resources
from rewards.combine import Normalisation, RewardTerm
from rewards.distribution.config import MomentsConfig
from rewards.metrics.figures import SECOND_SPACE
from rewards.metrics.samples import LOGITS, SPATIAL
from rewards.networks.features import FeaturesConfig
from rewards.scorers.classifier import ClassifierConfig
from rewards.scorers.clip import ClipConfig, ClipTerm
from rewards.scorers.config import ScorerConfig, ScorerTerm
from rewards.scorers.hpsv2 import ARCHITECTURE, HpsConfig, HpsTerm
from rewards.scorers.user_reward_files import RewardFile, read_file
from rewards.scorers.user_rewards import UserReward, parse_user_reward

LOO_FID = "loo_fid"
REWARDS, JUDGE = "rewards", "judge"
"""Panels of a reward server."""
ACCURACY = "accuracy"  # score of the judge's classifier
R_PRECISION = "r_precision"  # score of the judge's CLIP
GPU_BATCH = 64  # images; ViT-H-14's activations in fp32 then take a few GiB
NETWORKS = "package://learner.miniature/networks"


OTHER_SPACES = (MAIN_SPACE, SECOND_SPACE, SPATIAL, LOGITS)
"""Names that further feature spaces cannot have."""


def check_spaces(field: str, names: Iterable[str]) -> None:
    """Refuse names of further feature spaces that are no names, or those of others.

    Raises:
        ValueError: says what a name is.
    """
    for name in names:
        if not name.isidentifier() or name in OTHER_SPACES:
            raise ValueError(
                f"{field}: expected names of letters, digits and _, other than "
                f"{', '.join(OTHER_SPACES)}, found {name!r}: name the space otherwise"
            )


def is_loo_fid(reward: str) -> bool:
    """Whether a reward is a leave-one-out FID, by its name: loo_fid, or loo_fid/SPACE."""
    return reward.partition("/")[0] == LOO_FID


@dataclass(frozen=True, kw_only=True)
class LooFidTerm(MomentsConfig, RewardTerm):
    """Leave-one-out FID: the distribution reward."""

    weight: float = 4.0
    """Factor of the normalised reward; 0 logs it only."""
    normalise: Normalisation = "batch"
    """Divisor of the centred reward. group: the standard deviation within the group. batch: that
    over the batch. anchored: that within groups of the first iteration. centred: none."""
    reference: str = "digits:train"
    """Moments of real images: an .npz file with mu and sigma; imagenet256 (64, 128, 512) for ADM's,
    after `python -m rewards.reference fetch imagenet256`; or "digits:train" to compute them."""
    seed_images: int = 1000
    """Images of the base policy that start the moving average; at least two groups' worth."""
    seed_from: str = ""
    """File with moments of the base policy's images that start the moving average instead of
    sampled images. It is made by `python -m rewards.reference` from a folder of samples, or is
    pretrained_gen_stats.npz of the public code of 2603.23086."""
    joint: bool = False
    """Conditional LOO-FID, of features joined with the condition's class."""
    joint_weight: float = 0.0
    """Factor of the class embeddings; 0: their total variance equals the features'."""
    joint_dim: int = 0
    """Dimensions of the class embeddings; 0 is one for each class."""

    def __post_init__(self) -> None:
        MomentsConfig.__post_init__(self)
        RewardTerm.__post_init__(self)
        if not self.joint_weight >= 0:
            raise ValueError(
                f"joint_weight must be >= 0 (0 is automatic), found {self.joint_weight}"
            )
        check_at_most(self, joint_weight=1e6)
        if self.seed_from and (self.joint or self.kind == "sliding"):
            why = (
                "joint, which needs every image's class"
                if self.joint
                else "kind=sliding, which needs every image's features"
            )
            raise ValueError(
                f"seed_from {self.seed_from!r} does not go with {why}: leave it empty "
                "(seed_images of the base policy are then sampled), or change that"
            )


@dataclass(frozen=True, kw_only=True)
class FurtherSpace(LooFidTerm):
    """Leave-one-out FID in a further feature space, with reference and history of its own."""

    features: FeaturesConfig = field(default_factory=FeaturesConfig)


@dataclass(frozen=True)
class Distribution:
    """A distribution reward: the leave-one-out FID in one feature space."""

    reward: str
    """Its name among the rewards."""
    term: LooFidTerm
    features: FeaturesConfig
    option: str
    """Of the term, as messages name it."""
    features_option: str
    fid: str
    """What the names of its metrics begin with."""


@dataclass(frozen=True, kw_only=True)
class RewardsConfig:
    """The rewards of a run. Every `ScorerTerm` among the fields is a shipped scorer."""

    clip: ClipTerm = field(default_factory=ClipTerm)
    hps: HpsTerm = field(default_factory=HpsTerm)
    loo_fid: LooFidTerm = field(default_factory=LooFidTerm)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    features_pool: str = ""
    """Reward servers that run the feature network: a name of reward_pools; empty: the main pool."""
    further: Annotated[Mapping[str, FurtherSpace], tyro.conf.Suppress] = field(default_factory=dict)
    """Further feature spaces by name, each with a leave-one-out FID of its own beside loo_fid; set
    in a YAML file: {NAME: {features: {network: ...}, weight: ..., ...}}, the other options as
    loo_fid's. The servers that run the main network run theirs, too."""
    extra: tuple[str, ...] = ()
    """User rewards, each module:Class=weight[,option=value...], or with ./file.py in place of the
    module (rewards/README.md)."""
    files: Annotated[Mapping[str, RewardFile], tyro.conf.Suppress] = field(default_factory=dict)
    """Files named in extra, as they were when the run began; written by the run."""

    def __post_init__(self) -> None:
        check_spaces("further", self.further)
        names = [extra.name for extra in self.user_rewards()]
        doubled = {name for name in names if names.count(name) > 1 or hasattr(self, name)}
        if doubled:
            raise ValueError(
                f"extra: {sorted(doubled)} name more than one reward: add name=... to one of them"
            )

    def user_rewards(self) -> list[UserReward]:
        """The parsed user rewards."""
        parsed = [parse_user_reward(text) for text in self.extra]
        return [replace(extra, kept=self.files.get(extra.file)) for extra in parsed]

    def with_files(self) -> RewardsConfig:
        """This configuration with the text of the files in `extra`, read now unless known.

        Raises:
            ConfigError: a file cannot be read.
        """
        named = dict.fromkeys(extra.file for extra in self.user_rewards() if extra.file)
        files = {name: self.files.get(name) or read_file(name) for name in named}
        return replace(self, files=files)

    def scorers(self) -> dict[str, ScorerTerm]:
        """Name -> enabled scorer, the shipped ones first; the order of columns in records."""
        shipped = {item.name: getattr(self, item.name) for item in fields(self)}
        scorers = shipped | {reward.name: reward for reward in self.user_rewards()}
        return {
            name: scorer
            for name, scorer in scorers.items()
            if isinstance(scorer, ScorerTerm) and scorer.enabled
        }

    def terms(self) -> dict[str, RewardTerm]:
        """Name -> reward."""
        return {**self.scorers(), **{each.reward: each.term for each in self.spaces().values()}}

    def spaces(self) -> dict[str, Distribution]:
        """Feature space -> the reward in it."""
        main = Distribution(
            LOO_FID, self.loo_fid, self.features, "rewards.loo_fid", "rewards.features", "fid/"
        )
        further = {
            name: Distribution(
                f"{LOO_FID}/{name}",
                space,
                space.features,
                f"rewards.further.{name}",
                f"rewards.further.{name}.features",
                f"fid/{name}/",
            )
            for name, space in self.further.items()
        }
        return {MAIN_SPACE: main, **further}

    @property
    def sampled_for_seed(self) -> int:
        """Images of the base policy that start the histories; 0: all start from files."""
        terms = [each.term for each in self.spaces().values()]
        return max((term.seed_images for term in terms if not term.seed_from), default=0)

    def lowered(self) -> dict[str, FeaturesConfig]:
        """Option -> feature network of a distribution reward with a weight."""
        spaces = self.spaces().values()
        return {each.features_option: each.features for each in spaces if each.term.weight}

    def pools(self) -> dict[str, str]:
        """ "features" or a scorer's name -> name of its pool."""
        return {"features": self.features_pool} | {k: t.pool for k, t in self.scorers().items()}


@dataclass(frozen=True, kw_only=True)
class JudgeHps(HpsConfig):
    """HPSv2 as a figure of evaluations."""

    enabled: bool = False
    """Whether evaluations have it. As a reward of the same checkpoint it is no judge."""
    model: str = ARCHITECTURE
    """ViT-H-14 for the published checkpoints, or a directory in open_clip's layout."""
    pretrained: str = "v2.1"
    """Published checkpoint v2.0 or v2.1, from the Hugging Face hub or its cache, or a checkpoint
    file of that layout."""


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """The networks of evaluations. A figure of a network that a reward uses, too, is what the
    policy was tuned for: it judges nothing."""

    clip: ClipConfig = field(default_factory=lambda: ClipConfig(model=f"{NETWORKS}/judge_clip"))
    hps: JudgeHps = field(default_factory=JudgeHps)
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    features: FeaturesConfig = field(
        default_factory=lambda: FeaturesConfig(checkpoint=f"{NETWORKS}/judge.safetensors")
    )
    second: FeaturesConfig = field(default_factory=lambda: FeaturesConfig(network="pixels"))
    """A second feature space, since FIDs of two networks can rank differently."""
    r_precision: bool = False
    """Whether evaluations have the R-precision: the share of images for which `clip` ranks the own
    text first among the run's distinct texts (1,000 of them, if there are more)."""
    further: Annotated[Mapping[str, FeaturesConfig], tyro.conf.Suppress] = field(
        default_factory=dict
    )
    """Further feature spaces by name; set in a YAML file. NAME's figures are NAME/fid and so on."""

    def __post_init__(self) -> None:
        check_spaces("judge.further", self.further)

    def scorers(self) -> dict[str, ScorerConfig]:
        """Name -> text-image scorer."""
        return {"clip": self.clip} | ({"hps": self.hps} if self.hps.enabled else {})

    def spaces(self) -> dict[str, FeaturesConfig]:
        """Space -> feature network."""
        return {MAIN_SPACE: self.features, SECOND_SPACE: self.second, **self.further}

    def feature_options(self) -> dict[str, FeaturesConfig]:
        """Option -> feature network."""
        own = {"judge.features": self.features, "judge.second": self.second}
        return own | {f"judge.further.{name}": each for name, each in self.further.items()}

    def score_names(self) -> tuple[str, ...]:
        """Names of all scores."""
        ranked = (R_PRECISION,) if self.r_precision else ()
        return (*self.scorers(), *ranked, *((ACCURACY,) if self.classifier.enabled else ()))


@dataclass(frozen=True, kw_only=True)
class BatchingConfig:
    """Batches and queue of a reward server."""

    max_batch: int = 0
    """Largest batch, images; across requests unless the run is reproducible. 0 is 64 on a GPU, and
    single requests on a CPU, where larger batches are no faster and would change the last bits of
    scores."""
    max_wait_ms: float = 2.0
    """Longest wait of a request for others in its batch, milliseconds."""
    max_queued: int = 1024
    """Images that may queue in one server; further requests block until there is room."""

    def __post_init__(self) -> None:
        if self.max_batch < 0:
            raise ValueError(f"max_batch must be >= 0 (0 is automatic), found {self.max_batch}")
        if not 0 <= self.max_wait_ms < float("inf"):
            raise ValueError(f"max_wait_ms must be >= 0, found {self.max_wait_ms}")
        if self.max_queued < 1:
            raise ValueError(f"max_queued must be >= 1, found {self.max_queued}")


@dataclass(frozen=True, kw_only=True)
class RewardServerResources(Resources, BatchingConfig, AutoscaleConfig):
    """Resources, batching and autoscaling of reward servers."""

    def __post_init__(self) -> None:
        for part in (Resources, BatchingConfig, AutoscaleConfig):
            part.__post_init__(self)

    def depth(self, group: int) -> int:
        """Groups of `group` images in flight at a server: a running batch and a queued one."""
        batch = self.max_batch or (GPU_BATCH if self.num_gpus else group)
        return 2 * -(-batch // group)

    @property
    def batching(self) -> BatchingConfig:
        """Batching with the automatic batch resolved; 0 is single requests."""
        automatic = GPU_BATCH if self.num_gpus else 0
        return BatchingConfig(
            max_batch=self.max_batch or automatic,
            max_wait_ms=self.max_wait_ms,
            max_queued=self.max_queued,
        )


@dataclass(frozen=True, kw_only=True)
class RewardPool(RewardServerResources):
    """Further reward servers, for other scorers than the main pool's."""

    num_servers: Annotated[int, Field(ge=1, le=4096)] = 1
    """Number of servers."""
    runtime_env: Mapping[str, Any] = field(default_factory=dict)
    """Ray runtime environment of these servers (pip, conda, env_vars, py_modules), for scorers with
    other packages than the run's. A value ${NAME} in env_vars is read from the run's environment
    when a server starts and never written to a file; use it for secrets."""

    def __post_init__(self) -> None:
        RewardServerResources.__post_init__(self)
        check_environment(self.runtime_env)


@dataclass(frozen=True, kw_only=True)
class RewardServerConfig:
    """Scorers and device of one reward server."""

    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    judge: JudgeConfig | None = field(default_factory=JudgeConfig)
    """None: this server takes no part in evaluations."""
    texts: tuple[Condition, ...] = ()
    """The run's distinct texts, for the judge's R-precision."""
    pool: str = ""
    """Pool of its scorers."""
    batching: BatchingConfig = field(default_factory=BatchingConfig)
    device: str = "cpu"
    num_threads: int = 1
    timeout_s: float = 600.0
    """Time limit of a batch, seconds."""
    reproducible: bool = False
    """Deterministic algorithms, and no batches across requests."""

    def spaces(self) -> dict[str, tuple[str, ...]]:
        """Panel -> names of its feature spaces, where they are known without the network."""
        own = self.rewards.features_pool == self.pool
        return {REWARDS: tuple(self.rewards.spaces()) if own else ()}

    def scorer_names(self) -> dict[str, tuple[str, ...]]:
        """Panel -> names of its scores."""
        own = (name for name, term in self.rewards.scorers().items() if term.pool == self.pool)
        panels = {REWARDS: tuple(own)}
        if self.judge is not None:
            panels[JUDGE] = self.judge.score_names()
        return panels
