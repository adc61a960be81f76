"""Class accuracy as a score: whether a classifier predicts the condition's class."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from cluster.messages import Condition
from cluster.preflight import Findings
from rewards.base import ImageErrors, Images, by_size
from rewards.networks.convnet import check_convnet, load_convnet


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """The classifier behind class accuracy."""

    checkpoint: str = "package://learner.miniature/networks/judge.safetensors"
    """Safetensors file of a small convolutional network; empty: no class accuracy."""

    def check(self, side: int, classes: Collection[int] | None, findings: Findings) -> None:
        """Check the file before a run.

        Args:
            side: pixels a side of the policy's images; 0 if unknown.
            classes: of the conditions; None if conditions are captions.
        """
        field = "judge.classifier.checkpoint"
        if not self.checkpoint:
            return
        config = check_convnet(field, self.checkpoint, side, findings, judge=True)
        known = config.num_classes if config else 0
        remedy = "leave it empty: there is then no class accuracy"
        if classes is None:
            findings.problem(
                field, "no classifier, since conditions are captions", self.checkpoint, remedy
            )
        elif known and max(classes) >= known:
            found = f"{max(classes)} among the conditions"
            findings.problem(field, f"classes 0 to {known - 1} of the classifier", found, remedy)


class ClassifierAccuracy:
    """1 where the most likely class is the condition's, else 0."""

    def __init__(self, config: ClassifierConfig, device: str = "cpu") -> None:
        self._network = load_convnet(config.checkpoint, device)

    def __call__(self, images: Images, conditions: Sequence[Condition]) -> np.ndarray:
        """N images (S, S, 3) uint8 and N conditions -> (N,) float32.

        Raises:
            ImageErrors: a condition without a class, or with one the classifier does not know.
        """
        known = self._network.config.num_classes
        wanted = [condition.class_index for condition in conditions]
        errors = {
            index: "class accuracy needs a condition with a class_index, found a caption"
            if wanted_class is None
            else f"class accuracy knows the classes 0..{known - 1}, found {wanted_class}"
            for index, wanted_class in enumerate(wanted)
            if wanted_class is None or not 0 <= wanted_class < known
        }
        if errors:
            raise ImageErrors(errors)
        predicted = np.empty(len(images), np.int64)
        for indices, same in by_size(images):
            predicted[indices] = self._network.run(same)[1].argmax(-1)
        return (predicted == np.array(wanted)).astype(np.float32)
