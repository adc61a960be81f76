"""Random weights and pictures under which errors of text-image models show, and hpsv2's side.

    python -m tests.parity.text_image make ARCHITECTURE CHECKPOINT
    python -m tests.parity.text_image package|ours ARCHITECTURE CHECKPOINT BACKEND

The second form prints scores as JSON: for models that fit the memory once, but not twice.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from cluster.messages import Condition
from cluster.model_files.torchvision_ops import ensure_torchvision
from rewards.scorers.hpsv2 import HpsConfig, HpsReward
from rewards.scorers.hpsv2_package import import_hpsv2

PROMPTS = ("a red car in the snow", "Two cats, 3 dogs & {braces}")
SIZES = ((224, 224), (256, 256), (384, 384), (512, 384))
TINY = "tessera-tiny-test"
TINY_CONFIG = {
    "embed_dim": 64,
    "vision_cfg": {
        "image_size": 224,
        "layers": 3,
        "width": 128,
        "head_width": 32,
        "patch_size": 14,
    },
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 49408,
        "width": 64,
        "heads": 2,
        "layers": 2,
    },
}
"""ViT-H-14's image size and patches, and the vocabulary of all CLIP models."""


def pictures(count: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """(count, height, width, 3) uint8: smooth colours that differ between pictures, and noise."""
    generator = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        coarse = generator.integers(0, 256, (*generator.integers(2, 9, 2), 3), np.uint8)
        smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        noisy = np.asarray(smooth) + generator.normal(0, 20, (height, width, 3))
        made.append(np.clip(noisy, 0, 255).astype(np.uint8))
    return np.stack(made)


def spread(model: torch.nn.Module) -> torch.nn.Module:
    """Make a freshly initialised model look at its image: scores of pictures then differ by 0.02.

    As they come, random weights attend evenly to all patches, and every image gets the same score.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("in_proj_weight"):
                parameter[: 2 * parameter.shape[1]] *= 4  # queries and keys
            elif name.endswith("class_embedding"):
                parameter *= 0.2
    return model.eval()


def register_tiny(folder: Path) -> None:
    """Make `TINY` known to open_clip, and to hpsv2's fork where that is installed."""
    ensure_torchvision()
    import open_clip

    (folder / f"{TINY}.json").write_text(json.dumps(TINY_CONFIG))
    open_clip.add_model_config(folder)


def make_checkpoint(architecture: str, file: Path) -> None:
    """A file in the layout of HPSv2's: {"state_dict": ...}."""
    ensure_torchvision()
    import open_clip

    torch.manual_seed(0)
    model = spread(open_clip.create_model(architecture))
    torch.save({"state_dict": model.state_dict()}, file)


def pairs() -> list[tuple[np.ndarray, str]]:
    """Pictures of all sizes, each with both prompts."""
    images = [
        image
        for index, (width, height) in enumerate(SIZES)
        for image in pictures(2, height, width, seed=index)
    ]
    return [(image, prompt) for prompt in PROMPTS for image in images]


def prepare_package(
    architecture: str, config_folder: Path | None, cache: Path, device: str = "cpu"
) -> Any:
    """hpsv2.img_score with its model in place, so that it downloads nothing."""
    fork = import_hpsv2()
    module = import_hpsv2("hpsv2.img_score")
    if config_folder is not None:
        fork.factory.add_model_config(config_folder)
    model, _, transform = fork.create_model_and_transforms(
        architecture,
        None,
        precision="amp",
        device=device,
        light_augmentation=True,
        output_dict=True,
    )
    module.device = device
    module.model_dict.update(model=model, preprocess_val=transform)
    module.root_path = str(cache)  # it makes this folder
    return module


def package_scores(module: Any, checkpoint: Path) -> list[float]:
    """`hpsv2.img_score.score` of every pair."""
    scores = []
    for prompt in PROMPTS:
        images = [Image.fromarray(image) for image, text in pairs() if text == prompt]
        scores += module.score(images, prompt, cp=str(checkpoint))
    return [float(score) for score in scores]


def our_scores(architecture: str, checkpoint: Path, backend: str) -> list[float]:
    """`HpsReward` of every pair, all sizes in one batch."""
    config = HpsConfig(model=architecture, pretrained=str(checkpoint), backend=backend)  # type: ignore[arg-type]
    images, texts = zip(*pairs())
    return HpsReward(config)(images, [Condition(text=text) for text in texts]).tolist()


def main(arguments: Sequence[str]) -> None:
    side, architecture, file, *rest = arguments
    checkpoint = Path(file)
    torch.set_num_threads(2)
    if side == "make":
        make_checkpoint(architecture, checkpoint)
    elif side == "package":
        torch.load = functools.partial(torch.load, mmap=True)  # else two copies of 4 GB
        module = prepare_package(architecture, None, checkpoint.parent / "hpsv2-root")
        print(json.dumps(package_scores(module, checkpoint)))
    else:
        print(json.dumps(our_scores(architecture, checkpoint, *rest)))


if __name__ == "__main__":
    main(sys.argv[1:])
