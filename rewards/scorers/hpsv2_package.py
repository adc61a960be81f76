"""The hpsv2 package's model and transform, in batches.

Version 1.2.0 does not import everywhere: its tokenizer's vocabulary is missing from the wheel
(open_clip has the same file), `from turtle import forward` needs Tk, and a module silences every
UserWarning of the process. `import_hpsv2` avoids all three without changing the package's files.
"""

from __future__ import annotations

import contextlib
import gzip
import importlib
import importlib.util
import os
import sys
import threading
import types
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cluster.errors import CheckpointError, ConfigError
from cluster.model_files.checkpoints import read_checkpoint
from cluster.model_files.tensors import load_strict
from cluster.model_files.torchvision_ops import ensure_torchvision
from cluster.text_limits import Reading
from rewards.networks.open_clip_models import DTYPES, Precision

EXTRA = "tessera-rl[hpsv2]"
VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
_importing = threading.Lock()


def import_hpsv2(name: str = "hpsv2.src.open_clip") -> Any:
    """A module of the hpsv2 package.

    Raises:
        ConfigError: the package, or something it needs, is not installed.
    """
    ensure_torchvision()
    if importlib.util.find_spec("hpsv2") is None:
        raise ConfigError(f"the hpsv2 package is not installed: pip install '{EXTRA}'")
    with _importing, warnings.catch_warnings(), _vocabulary(), _turtle():
        warnings.simplefilter("ignore")  # the package's deprecated imports
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"the hpsv2 package needs {error.name}, which is not installed: "
                f"pip install '{EXTRA}'"
            ) from error


@contextlib.contextmanager
def _vocabulary() -> Iterator[None]:
    """Open open_clip's copy of the vocabulary if hpsv2's is missing."""
    ensure_torchvision()
    import open_clip

    copy = Path(open_clip.__file__).with_name(VOCABULARY)
    plain_open = gzip.open

    def redirected(path: Any, *args: Any, **kwargs: Any) -> Any:
        wanted = isinstance(path, (str, os.PathLike)) and Path(path).name == VOCABULARY
        if wanted and not Path(path).exists():
            path = copy
        return plain_open(path, *args, **kwargs)

    gzip.open = redirected  # type: ignore[assignment]
    try:
        yield
    finally:
        gzip.open = plain_open


@contextlib.contextmanager
def _turtle() -> Iterator[None]:
    """A module `turtle` with a `forward`, without Tk."""
    known = sys.modules.get("turtle")
    stand_in = types.ModuleType("turtle")
    stand_in.forward = None  # type: ignore[attr-defined]
    sys.modules["turtle"] = stand_in
    try:
        yield
    finally:
        del sys.modules["turtle"]
        if known is not None:
            sys.modules["turtle"] = known


class PackageModel:
    """hpsv2's fork of open_clip with a checkpoint.

    Args:
        model: an architecture of the fork.
        checkpoint: file with a state dict, alone or under "state_dict".
        precision: overrides the package's fp16 autocast on GPUs.

    Raises:
        ConfigError: the package is not installed.
        CheckpointError: unknown architecture, missing file, weights that do not fit.
    """

    def __init__(self, model: str, checkpoint: str, device: str, precision: Precision) -> None:
        fork = import_hpsv2()
        self.device = torch.device(device)
        self.dtype = DTYPES[precision]
        try:
            # As in hpsv2.img_score, without its download of weights.
            self.model, _, self._transform = fork.create_model_and_transforms(
                model,
                None,
                precision=precision,
                device=device,
                light_augmentation=True,
                output_dict=True,
            )
        except RuntimeError as error:
            raise CheckpointError(f"hpsv2 model {model!r} cannot be made: {error}") from error
        load_strict(self.model, read_checkpoint(checkpoint), checkpoint)
        self.model.eval().requires_grad_(False)
        self._tokenize = fork.get_tokenizer(model)
        self._encode = fork.tokenizer._tokenizer.encode
        self._context = fork.get_model_config(model)["text_cfg"].get("context_length", 77)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the image tower's input, pixels."""
        size = self.model.visual.image_size
        return (size, size) if isinstance(size, int) else tuple(size)

    def preprocess(self, images: np.ndarray) -> Tensor:
        """(n, H, W, 3) uint8 -> (n, 3, S, S) fp32: the package's transform of each image."""
        done = [self._transform(Image.fromarray(image)) for image in images]
        return torch.stack(done).to(self.device)

    @torch.inference_mode()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """(N, 3, S, S) normalised pixels -> (N, E) fp32 unit rows."""
        return F.normalize(self.model.encode_image(pixels.to(self.dtype)).float(), dim=-1)

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """N texts -> (N, E) fp32 unit rows."""
        tokens = self._tokenize(list(texts), self._context).to(self.device)
        return F.normalize(self.model.encode_text(tokens).float(), dim=-1)

    def reading(self, text: str) -> Reading:
        """The text as its tokenizer, open_clip's of bytes, reads it."""
        count = len(self._encode(text))
        return Reading(tokens=count + 2, limit=self._context, known=count, empty=not count)
