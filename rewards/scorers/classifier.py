"""Class accuracy as a score: whether a classifier predicts the condition's class."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

from cluster.errors import ConfigError
from cluster.messages import Condition
from cluster.preflight import Findings
from rewards.base import ImageErrors, Images, ImageWork, by_size
from rewards.networks.convnet import check_convnet, load_convnet
from rewards.networks.extractor import NetworkFeatures
from rewards.networks.open_clip_check import WIDTH
from rewards.networks.open_clip_models import Precision
from rewards.networks.preprocessing import preprocess, to_device
from rewards.networks.timm_models import (
    IMAGENET_CLASSES,
    known_classifier,
    load_classifier,
    preprocessing_of,
    sizes_of,
)
from rewards.networks.weight_files import check_hub, check_weights, is_user_file

MINIATURE = "package://learner.miniature/networks/judge.safetensors"
MAPS = 3  # of the largest activation, held at a time


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """The classifier behind class accuracy."""

    model: str = ""
    """A timm classifier of ImageNet's thousand classes, with the tag of its weights, as
    convnext_base.fb_in22k_ft_in1k; empty: the small convolutional network in `checkpoint`."""
    checkpoint: str = MINIATURE
    """Weights. Of a `model`: a file in timm's layout; empty, "published" or the default fetches
    timm's. Without a model: a safetensors file of a small convolutional network; empty: no class
    accuracy."""
    precision: Precision = "fp32"
    """Precision of a `model`; bf16 is faster on GPUs."""
    batch: int = 32
    """Images in a forward pass of a `model`."""

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ConfigError(f"batch must be >= 1, found {self.batch}")

    @property
    def enabled(self) -> bool:
        """Whether there is a classifier."""
        return bool(self.model or self.checkpoint)

    @property
    def weights(self) -> str:
        """The `checkpoint` of a model; empty for the published one."""
        return "" if self.checkpoint == MINIATURE else self.checkpoint

    def check(self, side: int, classes: Collection[int] | None, findings: Findings) -> None:
        """Check the files before a run.

        Args:
            side: pixels a side of the policy's images; 0 if unknown.
            classes: of the conditions; None if conditions are captions.
        """
        if not self.enabled:
            return
        field, value = "judge.classifier.checkpoint", self.checkpoint
        remedy = "leave it empty: there is then no class accuracy"
        if self.model:
            field, value = "judge.classifier.model", self.model
            remedy = "leave it and judge.classifier.checkpoint empty: there is no class accuracy"
        if classes is None:
            findings.problem(field, "no classifier, since conditions are captions", value, remedy)
            return
        known = self._check_model(findings) if self.model else self._check_file(side, findings)
        if known and max(classes) >= known:
            found = f"{max(classes)} among the conditions"
            findings.problem(field, f"classes 0 to {known - 1} of the classifier", found, remedy)

    def _check_file(self, side: int, findings: Findings) -> int:
        """The number of its classes; 0 if it cannot be read."""
        field = "judge.classifier.checkpoint"
        config = check_convnet(field, self.checkpoint, side, findings, judge=True)
        return config.num_classes if config else 0

    def _check_model(self, findings: Findings) -> int:
        field = "judge.classifier"
        if is_user_file(self.weights):
            with findings.of(f"{field}.checkpoint"):
                check_weights(self.weights)
        with findings.of(f"{field}.model"):
            model, known = known_classifier(self.model, self.weights)
            preprocessing_of(known, model, known.input_size[-1])
            if not is_user_file(self.weights):
                repository = str(known.hf_hub_id or f"timm/{model}")
                names = ("model.safetensors", "pytorch_model.bin")
                size, path = 4.0 * sizes_of(model).parameters, "/resolve/main/model.safetensors"
                check_hub(findings, field, model, repository, names, size, path)
            return IMAGENET_CLASSES
        return 0

    def load(self, device: str) -> ClassifierAccuracy:
        """
        Raises:
            CheckpointError, ConfigError: missing weights, or of another network.
        """
        return ClassifierAccuracy(self, device)

    def memory(self) -> tuple[float, float]:
        """Bytes of weights and activations on a GPU."""
        if not self.model:
            return 1.0, 0.0  # next to nothing
        sizes, width = sizes_of(self.model), WIDTH[self.precision]
        return float(4 * sizes.parameters), float(self.batch * MAPS * sizes.largest * width)

    def work(self) -> ImageWork:
        """What the network computes for an image."""
        if not self.model:
            return ImageWork(flops=0.0)
        sizes, bf16 = sizes_of(self.model), self.precision != "fp32"
        return ImageWork(flops=sizes.flops, bf16=bf16, convolutions=sizes.convolutions)


class ClassifierAccuracy:
    """1 where the most likely class is the condition's, else 0."""

    def __init__(self, config: ClassifierConfig, device: str = "cpu") -> None:
        self._predict: Callable[[Images], np.ndarray]
        if config.model:
            self._predict, self._known = _of_imagenet(config, device), IMAGENET_CLASSES
            return
        network = load_convnet(config.checkpoint, device)
        self._known = network.config.num_classes

        def predict(images: Images) -> np.ndarray:
            predicted = np.empty(len(images), np.int64)
            for indices, same in by_size(images):
                predicted[indices] = network.run(same)[1].argmax(-1)
            return predicted

        self._predict = predict

    def __call__(self, images: Images, conditions: Sequence[Condition]) -> np.ndarray:
        """N images (S, S, 3) uint8 and N conditions -> (N,) float32.

        Raises:
            ImageErrors: a condition without a class, or with one the classifier does not know.
        """
        known = self._known
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
        return (self._predict(images) == np.array(wanted)).astype(np.float32)


def _of_imagenet(config: ClassifierConfig, device: str) -> Callable[[Images], np.ndarray]:
    """Images to the likeliest of ImageNet's classes."""
    network, settings = load_classifier(config.model, config.weights)
    logits = NetworkFeatures(
        network,
        network,
        lambda images: preprocess(to_device(images, device), settings),
        config.model,
        device=device,
        batch=config.batch,
        precision=config.precision,
    )
    return lambda images: logits(images).argmax(-1)
