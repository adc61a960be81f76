"""What is rewarded and who judges: the configuration of scorers, moments and reward servers."""

from __future__ import annotations

from dataclasses import dataclass, field

from rewards.classifier import ClassifierConfig
from rewards.clip import ClipConfig
from rewards.combine import Normalisation, RewardTerm, ScorerTerm
from rewards.features import FeaturesConfig
from rewards.hpsv2 import HpsConfig
from rewards.moments_config import MomentsConfig

SECOND_SPACE = "second"
NETWORKS = "package://learner.miniature/networks"


@dataclass(frozen=True, kw_only=True)
class ClipTerm(ClipConfig, ScorerTerm):
    """Text-image score."""

    weight: float = 1.0
    """Factor of the normalised reward; 0 logs it and learns nothing from it."""


@dataclass(frozen=True, kw_only=True)
class HpsTerm(HpsConfig, ScorerTerm):
    """Preference score."""

    weight: float = 0.5
    """Factor of the normalised reward; 0 logs it and learns nothing from it."""


@dataclass(frozen=True, kw_only=True)
class LooFidTerm(MomentsConfig, RewardTerm):
    """Leave-one-out FID: the distribution reward."""

    weight: float = 4.0
    """Factor of the normalised reward; 0 logs it and learns nothing from it."""
    normalise: Normalisation = "batch"
    """group: by the deviation within the group. batch: by the deviation over the batch."""
    reference: str = "digits:train"
    """Real images' moments: an .npz file with mu and sigma, or "digits:train" to compute them."""
    seed_images: int = 1000
    """Images of the base policy that start the moving average; at least two groups' worth."""
    joint: bool = False
    """Conditional LOO-FID: of features joined with the class that was asked for, so that an image
    counts for its class alone."""
    joint_weight: float = 0.0
    """Factor of the class embeddings; 0 lets them vary as much as the features."""
    joint_dim: int = 0
    """Dimensions of the class embeddings; 0 is one for each class."""


@dataclass(frozen=True, kw_only=True)
class RewardsConfig:
    """Everything the policy is tuned for."""

    clip: ClipTerm = field(default_factory=ClipTerm)
    hps: HpsTerm = field(default_factory=HpsTerm)
    loo_fid: LooFidTerm = field(default_factory=LooFidTerm)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)

    def terms(self) -> dict[str, RewardTerm]:
        """Reward name -> its part in the advantage."""
        return {"clip": self.clip, "hps": self.hps, "loo_fid": self.loo_fid}


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """Who grades the result: networks that no reward uses."""

    clip: ClipConfig = field(default_factory=lambda: ClipConfig(model=f"{NETWORKS}/judge_clip"))
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    features: FeaturesConfig = field(
        default_factory=lambda: FeaturesConfig(checkpoint=f"{NETWORKS}/judge.safetensors")
    )
    second: FeaturesConfig = field(default_factory=lambda: FeaturesConfig(network="pixels"))
    """A second feature space: one network's FID can misrank what another sees."""


@dataclass(frozen=True, kw_only=True)
class RewardServerConfig:
    """A reward server's panels and device."""

    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    device: str = "cpu"
    num_threads: int = 1
