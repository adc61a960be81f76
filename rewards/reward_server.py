"""The reward-server role: panels of scorers behind one object that answers requests."""

from __future__ import annotations

import time

import numpy as np
import torch

from cluster.messages import MAIN_SPACE, GroupScores, SampleRequest, Span
from rewards.classifier import ClassifierAccuracy
from rewards.clip import ClipReward
from rewards.config import SECOND_SPACE, RewardServerConfig
from rewards.features import load_features
from rewards.hpsv2 import HpsReward
from rewards.panel import Panel


class RewardServer:
    """Scores groups of images with the panel that their request names."""

    def __init__(self, config: RewardServerConfig, name: str = "reward-server") -> None:
        self.name = name
        self._threads = config.num_threads
        device, rewards, judge = config.device, config.rewards, config.judge
        self._panels = {
            "rewards": Panel(
                {"clip": ClipReward(rewards.clip, device), "hps": HpsReward(rewards.hps, device)},
                {MAIN_SPACE: load_features(rewards.features, device)},
            ),
            "judge": Panel(
                {
                    "clip": ClipReward(judge.clip, device),
                    "accuracy": ClassifierAccuracy(judge.classifier, device),
                },
                {
                    MAIN_SPACE: load_features(judge.features, device),
                    SECOND_SPACE: load_features(judge.second, device),
                },
            ),
        }

    def fingerprint(self, panel: str) -> str:
        """Which feature network the panel has in its main space."""
        return self._panels[panel].extractors[MAIN_SPACE].fingerprint

    def score(self, request: SampleRequest, images: np.ndarray) -> GroupScores:
        """Scores of one group's images (K, H, W, 3) uint8."""
        start = time.time()
        torch.set_num_threads(self._threads)
        conditions = [request.condition] * len(images)
        judged = self._panels[request.panel].judge(images, conditions)
        return GroupScores(
            key=request.key,
            scores=judged.scores,
            features=judged.features,
            errors=judged.errors,
            spans=(Span(self.name, "score", start, time.time()),),
        )

    def features(self, images: np.ndarray, panel: str, batch: int = 256) -> dict[str, np.ndarray]:
        """Features of real images (N, H, W, 3) uint8: space -> (N, D) float32."""
        torch.set_num_threads(self._threads)
        batches = [images[at : at + batch] for at in range(0, len(images), batch)]
        return {
            space: np.concatenate([extract(part) for part in batches])
            for space, extract in self._panels[panel].extractors.items()
        }
