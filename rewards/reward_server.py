"""The reward-server role: panels of scorers behind one object that answers requests."""

from __future__ import annotations

import time

import numpy as np
import torch

from cluster.messages import GroupScores, SampleRequest, Span
from rewards.classifier import ClassifierAccuracy
from rewards.clip import ClipReward
from rewards.config import RewardServerConfig
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
                load_features(rewards.features, device),
            ),
            "judge": Panel(
                {
                    "clip": ClipReward(judge.clip, device),
                    "accuracy": ClassifierAccuracy(judge.classifier, device),
                },
                load_features(judge.features, device),
            ),
        }

    def fingerprint(self, panel: str) -> str:
        """Which feature network the panel has."""
        return self._panels[panel].features.fingerprint

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

    def features(self, images: np.ndarray, panel: str, batch: int = 256) -> np.ndarray:
        """Features (N, D) float32 of real images (N, H, W, 3) uint8, in the panel's space."""
        torch.set_num_threads(self._threads)
        extract = self._panels[panel].features
        parts = [extract(images[at : at + batch]) for at in range(0, len(images), batch)]
        return np.concatenate(parts)
