"""DINOv2 and CLIP as feature spaces.

Shapes: N images, S the side the network takes, D feature dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cluster.errors import CheckpointError
from cluster.model_files.torchvision_ops import ensure_torchvision
from rewards.networks.open_clip_models import TextImageModel
from rewards.networks.preprocessing import Preprocess
from rewards.networks.timm_models import create_model, known_model, preprocessing_of
from rewards.networks.weight_files import is_user_file, weights_digest

DINOV2 = "vit_large_patch14_dinov2.lvd142m"
DINOV2_SIZE = 224  # pixels a side, as in Stein et al. 2023; the weights were made with 518
CLIP = "ViT-B-32-quickgelu"  # CLIP-FID's (Kynkäänniemi et al. 2023, 2203.06026), with these weights
CLIP_TAG = "openai"


def load_dinov2(model: str = "", checkpoint: str = "") -> tuple[nn.Module, Preprocess, str]:
    """A vision transformer of timm whose output is its features, (N, D), on the CPU.

    DINOv2's features (Oquab et al. 2023, 2304.07193) are the class token after the last norm. timm
    resamples position embeddings for another image size (bicubic, antialiased), slightly
    differently from the authors' code.

    Args:
        model: a timm name; empty is `DINOV2`. For a file, with the tag of its weights if timm's
            tags differ in their transform.
        checkpoint: .safetensors or .pth, of timm or of DINOv2's authors; empty or "published"
            fetches timm's.

    Returns:
        The network, its preprocessing, and the digest of the weights before resampling, whose last
        bits may differ between machines.

    Raises:
        ConfigError: no vision transformer of that name, or unknown preprocessing.
        CheckpointError: no such file, not reachable, or the file of another model.
    """
    model, known = known_tower(model or DINOV2, checkpoint)
    settings = preprocessing_of(known, model, DINOV2_SIZE)
    network = create_model(model, checkpoint, num_classes=0)
    digest = weights_digest(network)
    network.set_input_size((DINOV2_SIZE, DINOV2_SIZE))
    return network, settings, digest


def known_tower(model: str, checkpoint: str = "") -> tuple[str, Any]:
    """The name of a vision transformer, with a tag, and timm's description of its weights.

    Raises:
        ConfigError: as `known_model`.
    """
    ensure_torchvision()
    import timm

    return known_model(
        model, checkpoint, "vision transformers", timm.list_models(module="vision_transformer")
    )


def tower_dim(model: str, checkpoint: str = "") -> int:
    """D of a vision transformer of timm, without loading weights.

    Raises:
        ConfigError: as `known_tower`.
    """
    known_tower(model, checkpoint)
    ensure_torchvision()
    import timm

    with torch.device("meta"):
        network: Any = timm.create_model(model, pretrained=False, num_classes=0)
    return int(network.num_features)


def _activation(visual: nn.Module) -> str:
    """Fingerprint of GELU in towers that exist with QuickGELU; empty for QuickGELU (CLIP-FID's),
    as in older references."""
    ensure_torchvision()
    from open_clip.transformer import QuickGELU, VisionTransformer

    quick = any(isinstance(module, QuickGELU) for module in visual.modules())
    return "-gelu" if isinstance(visual, VisionTransformer) and not quick else ""


class ClipTower:
    """An open_clip model's image features, (N, D), not normalised, as in CLIP-FID.

    Args:
        model: an open_clip name or a directory in its layout; empty is `CLIP`.
        checkpoint: a pretrained tag or a file, for a name; empty or "published" is `CLIP_TAG` for
            the default model.
        tag: for a file, the pretrained tag of its weights.

    Raises:
        CheckpointError: unknown name, no such file, not reachable, or weights that do not fit.
    """

    def __init__(self, model: str, checkpoint: str, device: str, tag: str = "") -> None:
        pretrained = checkpoint if is_user_file(checkpoint) else "" if model else CLIP_TAG
        try:
            loaded = TextImageModel(model or CLIP, pretrained, device, tag=tag, pack=False)
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}; for features, the tag or file goes into `checkpoint`: without a network "
                "a file that was fetched elsewhere"
            ) from error
        self.network: Any = loaded.model
        self.visual: nn.Module = loaded.model.visual
        self.settings = Preprocess.of(loaded.preprocess_config)
        self.fingerprint = self.settings.fingerprint + _activation(loaded.model.visual)

    def __call__(self, pixels: Tensor) -> Tensor:
        """(N, 3, S, S) fp32 -> (N, D)."""
        return self.network.encode_image(pixels)
