"""HPSv2: a CLIP model fine-tuned on human preferences (Wu et al. 2023, 2306.09341).

The checkpoints (v2.0, v2.1) fit open_clip's ViT-H-14. The preprocessing differs from CLIP's: to
float, longest side to the model's size (bicubic, antialiased), zero padding, then normalisation.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from cluster.errors import CheckpointError, ConfigError
from cluster.model_files.tensors import SCHEMES
from cluster.preflight import Findings
from rewards.networks.open_clip_check import check_model
from rewards.networks.open_clip_models import TextImageModel
from rewards.networks.open_clip_sources import has_own_weights, is_file, tags_of
from rewards.networks.preprocessing import (
    Preprocess,
    fit_floats,
    longest_size,
    normalise,
    to_device,
    too_narrow,
)
from rewards.networks.weight_files import check_hub
from rewards.scorers.config import ScorerTerm
from rewards.scorers.hpsv2_package import PackageModel
from rewards.scorers.text_image import TextImageConfig, TextImageScorer

REPOSITORY = "xswu/HPSv2"
PUBLISHED = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}
"""Version -> file in the Hugging Face repository."""
FILE_SIZE = 1.97e9  # bytes: 986 M weights in half precision
ARCHITECTURE = "ViT-H-14"
TUNED_FROM = "laion2b_s32b_b79k"
"""The architecture's tag of the weights that HPSv2 was tuned from."""


@dataclass(frozen=True, kw_only=True)
class HpsConfig(TextImageConfig):
    """Human preference score."""

    model: str = "package://learner.miniature/networks/preference"
    """ViT-H-14 for the published checkpoints, or a directory in open_clip's layout."""
    pretrained: str = ""
    """Published checkpoint v2.0 or v2.1, from the Hugging Face hub or its cache, or a checkpoint
    file of that layout."""
    backend: Literal["open_clip", "package"] = "open_clip"
    """Implementation of the model. open_clip: the checkpoint in open_clip's model. package: the
    hpsv2 package's own model and transform (needs the extra tessera-rl[hpsv2])."""

    def __post_init__(self) -> None:
        TextImageConfig.__post_init__(self)
        if self.pretrained in PUBLISHED and self.model.startswith(SCHEMES):
            raise ConfigError(
                f"pretrained {self.pretrained!r} is a checkpoint of {ARCHITECTURE}: set model to "
                f"{ARCHITECTURE}, found {self.model!r}"
            )
        if self.pretrained in PUBLISHED and self.tag:
            raise ConfigError(
                f"tag: what {self.pretrained!r} was tuned from is known, found {self.tag!r}: leave "
                "it empty"
            )
        if self.backend == "package" and self.tag:
            raise ConfigError(
                f"tag: the hpsv2 package has a transform of its own, found {self.tag!r}: leave it "
                "empty, or set backend to open_clip"
            )

    def load(self, device: str) -> HpsReward:
        return HpsReward(self, device)

    def check(self, field: str, findings: Findings) -> None:
        if self.backend == "package" and importlib.util.find_spec("hpsv2") is None:
            findings.problem(
                f"{field}.backend",
                "the hpsv2 package to be installed",
                "none",
                "pip install 'tessera-rl[hpsv2]', or set the backend to open_clip",
            )
        if self.pretrained in PUBLISHED:
            if self.model != ARCHITECTURE:
                findings.problem(
                    f"{field}.model",
                    f"{ARCHITECTURE}, which the published checkpoints are of",
                    repr(self.model),
                    f"set it to {ARCHITECTURE}",
                )
            file, name = PUBLISHED[self.pretrained], f"HPS {self.pretrained}"
            path = f"/resolve/main/{file}"
            check_hub(findings, field, name, REPOSITORY, (file,), FILE_SIZE, path)
        elif (
            self.model == ARCHITECTURE
            and not is_file(self.pretrained)
            and self.pretrained not in tags_of(ARCHITECTURE)
        ):
            findings.problem(
                f"{field}.pretrained",
                "a published checkpoint of HPS, or a file",
                repr(self.pretrained),
                f"choose one of {', '.join(PUBLISHED)}",
            )
        else:
            check_model(field, self.model, self.pretrained, tag_of(self), findings)


@dataclass(frozen=True, kw_only=True)
class HpsTerm(HpsConfig, ScorerTerm):
    """Preference score."""

    weight: float = 0.5
    """Factor of the normalised reward; 0 logs it only."""

    def __post_init__(self) -> None:
        HpsConfig.__post_init__(self)
        ScorerTerm.__post_init__(self)


class HpsReward(TextImageScorer):
    """Cosine of image and text features of the preference model; higher is preferred."""

    def __init__(self, config: HpsConfig, device: str = "cpu") -> None:
        checkpoint = config.pretrained
        if checkpoint in PUBLISHED:
            checkpoint = fetch_published(checkpoint)
        model: TextImageModel | PackageModel
        if config.backend == "package":
            if has_own_weights(config.model) or not checkpoint:
                raise ConfigError(
                    f"backend 'package' needs the name of an architecture ({ARCHITECTURE}) as "
                    f"model and a checkpoint as pretrained, found {config.model!r} and "
                    f"{config.pretrained!r}"
                )
            model = PackageModel(config.model, checkpoint, device, config.precision)
            self._constants = None
        else:
            model = TextImageModel(
                config.model, checkpoint, device, config.precision, tag=tag_of(config)
            )
            transform = Preprocess.of(model.preprocess_config)
            self._constants = transform.mean, transform.std
        height, width = model.image_size
        if height != width:
            raise CheckpointError(
                f"{config.model} takes {height} x {width} images; HPSv2's preprocessing is for "
                "square ones"
            )
        self._size = height
        self._package = model if isinstance(model, PackageModel) else None
        super().__init__(model, config.prompts, config.batch_size)

    def preprocess(self, images: np.ndarray) -> Tensor:
        """(n, H, W, 3) uint8 -> (n, 3, S, S) fp32 on the device, normalised."""
        if self._package is not None:
            return self._package.preprocess(images)
        assert self._constants is not None
        pixels = fit_floats(to_device(images, self._model.device), self._size)
        return normalise(pixels, *self._constants)

    def size_fault(self, height: int, width: int) -> str | None:
        if min(longest_size(height, width, self._size)) < 1:
            return too_narrow(height, width, self._size)
        if self._package is not None and max(height, width) == self._size and height != width:
            return (
                f"the hpsv2 package does not pad an image of {height} x {width} pixels, whose "
                f"longer side is {self._size} already, and its model then refuses it: set backend "
                "to open_clip"
            )
        return None


def tag_of(config: HpsConfig) -> str:
    """The tag that the weights were tuned from; a file for HPSv2's architecture has its layout."""
    file = config.pretrained in PUBLISHED or is_file(config.pretrained)
    known = TUNED_FROM if config.model == ARCHITECTURE and file else ""
    return config.tag or known


def fetch_published(version: str) -> str:
    """The path of a published checkpoint in the hub's cache; downloads it if needed.

    Raises:
        CheckpointError: not in the cache, and the hub cannot be reached.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    file = PUBLISHED[version]
    # The HTTP client differs between versions of the library; this base is its transport error.
    unreachable: tuple[type[BaseException], ...] = (OSError, *HfHubHTTPError.__bases__)
    try:
        return huggingface_hub.hf_hub_download(REPOSITORY, file)
    except unreachable as error:
        raise CheckpointError(
            f"HPSv2 {version}: {file} is not in the Hugging Face cache and was not fetched "
            f"({type(error).__name__}). With access to the hub, run: hf download {REPOSITORY} "
            f"{file}; without, copy the file to this machine and set pretrained to its path"
        ) from None
