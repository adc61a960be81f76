"""Text-image models of open_clip: loading, cached text features, cosine scores.

`ClipReward` and `HpsReward` differ in weights and in preprocessing; what they share is here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.errors import CheckpointError
from cluster.tensors import PACKAGE, load_strict, locate
from cluster.torchvision_ops import ensure_torchvision

LOCAL_DIR = "local-dir:"
DIRECTORY_CONFIG = "open_clip_config.json"


class TextImageModel:
    """A CLIP-like model in eval mode, fp32.

    Args:
        model: an open_clip name ("ViT-L-14"), or a directory in open_clip's layout
            (`open_clip_config.json` and `open_clip_model.safetensors`), as a path or `package://`.
        pretrained: for a name: open_clip's pretrained tag, or a checkpoint file. Empty for a
            directory, which holds its own weights.

    Raises:
        CheckpointError: unknown name, missing file, or weights that do not fit.
    """

    def __init__(self, model: str, pretrained: str, device: str) -> None:
        ensure_torchvision()
        import open_clip

        self.device = device
        directory = _directory(model)
        try:
            if directory is not None:
                name, options = f"{LOCAL_DIR}{directory}", _tokenizer_options(directory)
                self.model = open_clip.create_model(name, device=device)
            else:
                name, options = model, {}
                if not pretrained:
                    raise CheckpointError(
                        f"open_clip model {model!r} needs weights: set pretrained to one of its "
                        f"tags ({', '.join(open_clip.list_pretrained_tags_by_model(model)) or '-'})"
                        " or to a checkpoint file"
                    )
                file = pretrained if pretrained and _is_file(pretrained) else None
                tag = None if file else pretrained
                self.model = open_clip.create_model(name, pretrained=tag, device=device)
                if file is not None:
                    state = open_clip.factory.load_state_dict(str(locate(file)), weights_only=True)
                    load_strict(self.model, state, file)
        except (RuntimeError, ValueError, FileNotFoundError, OSError) as error:
            raise CheckpointError(f"open_clip model {model!r} cannot be loaded: {error}") from error
        self.model.eval().requires_grad_(False)
        self.tokenizer = open_clip.get_tokenizer(name, **options)
        self._text: dict[str, Tensor] = {}

    @property
    def image_size(self) -> int:
        """Side of the square the image tower takes, pixels."""
        size = self.model.visual.image_size
        return size if isinstance(size, int) else size[0]

    def transform(self) -> Callable[[Any], Tensor]:
        """The model's own evaluation transform: PIL image -> (3, S, S) fp32."""
        import open_clip

        config = open_clip.transform.PreprocessCfg(**self.model.visual.preprocess_cfg)
        return open_clip.transform.image_transform_v2(config, is_train=False)

    def mean_std(self) -> tuple[Tensor, Tensor]:
        """Normalisation constants, (3, 1, 1) fp32 each, for pixels in [0, 1]."""
        config = self.model.visual.preprocess_cfg
        return torch.tensor(config["mean"]).view(3, 1, 1), torch.tensor(config["std"]).view(3, 1, 1)

    @torch.inference_mode()
    def cosine(self, pixels: Tensor, texts: Sequence[str]) -> Tensor:
        """Cosine of each image with its text: (N, 3, S, S) normalised, N texts -> (N,) fp32."""
        image = F.normalize(self.model.encode_image(pixels.to(self.device)), dim=-1)
        return (image * self.text_features(texts)).sum(-1).float().cpu()

    @torch.inference_mode()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """(N, E) unit rows, encoded once for each distinct text."""
        new = [text for text in dict.fromkeys(texts) if text not in self._text]
        if new:
            encoded = self.model.encode_text(self.tokenizer(new).to(self.device))
            self._text.update(zip(new, F.normalize(encoded, dim=-1)))
        return torch.stack([self._text[text] for text in texts])


def _directory(model: str) -> Path | None:
    if model.startswith(PACKAGE):
        return locate(model, directory=True)
    path = Path(model).expanduser()
    return path if path.is_dir() else None


def _is_file(pretrained: str) -> bool:
    return pretrained.startswith(PACKAGE) or "/" in pretrained or Path(pretrained).is_file()


def _tokenizer_options(directory: Path) -> dict[str, str]:
    """A vocabulary named in the directory's config is looked for beside that config."""
    text = (directory / DIRECTORY_CONFIG).read_text(encoding="utf-8")
    options = json.loads(text)["model_cfg"]["text_cfg"].get("tokenizer_kwargs", {})
    if "bpe_path" not in options:
        return {}
    return {"bpe_path": str(directory / options["bpe_path"])}
