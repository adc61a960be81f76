"""Shared by text-image scorers: options, checks, batches of mixed sizes, cached text features.

Shapes: N images, E feature dimensions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.errors import ConfigError, DataError
from cluster.messages import Condition
from cluster.preflight import Findings
from cluster.text_limits import Reading, fault, faults, notes
from rewards.base import ImageErrors, Images, ImageWork, by_size
from rewards.networks.extractor import in_order
from rewards.networks.open_clip_check import check_model, clip_memory, clip_work, local_tokenizer
from rewards.networks.open_clip_models import Precision, reading_of
from rewards.scorers.config import ScorerConfig
from rewards.scorers.prompts import LONG_CAPTIONS, PromptConfig, Prompts

CACHED_TEXTS = 4096  # conditions whose text features are kept
TEXT_BATCH = 64  # sentences in a forward pass
IMAGE_BATCH = {"cpu": 8, "cuda": 64}
"""Images in a forward pass; larger batches take memory and are no faster."""

Sentences = tuple[str, ...]


class Towers(Protocol):
    """A text-image model with unit features of both."""

    device: torch.device

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images it takes."""
        ...

    def encode_images(self, pixels: Tensor) -> Tensor:
        """(N, 3, h, w) normalised pixels on the device -> (N, E) fp32 unit rows."""
        ...

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """N texts -> (N, E) fp32 unit rows on the device."""
        ...

    def reading(self, text: str) -> Reading:
        """What the model's tokenizer makes of a text."""
        ...


class TextFeatures:
    """Unit features of texts; an LRU cache of `limit` entries.

    A text is a tuple of sentences; several are averaged and normalised again.
    """

    def __init__(
        self, encode: Callable[[Sequence[str]], Tensor], limit: int = CACHED_TEXTS
    ) -> None:
        self._encode = encode
        self._limit = limit
        self._kept: OrderedDict[Sentences, Tensor] = OrderedDict()

    def __contains__(self, text: Sentences) -> bool:
        return text in self._kept

    @torch.inference_mode()
    def __call__(self, texts: Sequence[Sentences]) -> Tensor:
        """N texts -> (N, E) fp32 unit rows."""
        wanted = dict.fromkeys(texts)
        new = self._compute([text for text in wanted if text not in self._kept])
        rows = {text: new[text] if text in new else self._kept[text] for text in wanted}
        for text, row in rows.items():
            self._kept[text] = row
            self._kept.move_to_end(text)
        while len(self._kept) > self._limit:
            self._kept.popitem(last=False)
        return torch.stack([rows[text] for text in texts])

    def _compute(self, texts: Sequence[Sentences]) -> dict[Sentences, Tensor]:
        sentences = list(dict.fromkeys(sentence for text in texts for sentence in text))
        encoded: dict[str, Tensor] = {}
        for start in range(0, len(sentences), TEXT_BATCH):
            batch = sentences[start : start + TEXT_BATCH]
            encoded.update(zip(batch, self._encode(batch)))
        return {text: _mean([encoded[sentence] for sentence in text]) for text in texts}


@dataclass(frozen=True, kw_only=True)
class TextImageConfig(ScorerConfig):
    """Options of every text-image scorer."""

    precision: Precision = "fp32"
    """Precision of the network. bf16: linear maps and convolutions in bf16; faster on hardware that
    supports it."""
    tag: str = ""
    """open_clip's pretrained tag of a checkpoint file's weights, or of those that they were tuned
    from. It sets preprocessing and activation. Empty: as in the configuration beside the file, or
    as in the model's tags if all agree."""
    prompts: PromptConfig = field(default_factory=PromptConfig)
    batch_size: int = 0
    """Images in a forward pass; 0 is 8 on a CPU and 64 on a GPU."""
    model: str
    """open_clip model name, hf-hub:owner/name, or a directory in open_clip's layout."""
    pretrained: str = ""
    """open_clip pretrained tag or a checkpoint file."""

    def __post_init__(self) -> None:
        if self.batch_size < 0:
            raise ConfigError(f"batch_size must be >= 0 (0 chooses), found {self.batch_size}")

    def check(self, field: str, findings: Findings) -> None:
        check_model(field, self.model, self.pretrained, self.tag, findings)

    def check_texts(self, field: str, conditions: Sequence[Condition], findings: Findings) -> None:
        tokenizer = local_tokenizer(self.model)
        if tokenizer is None:
            return
        prompts = Prompts(self.prompts)
        # the longest sentence of a condition stands for all
        texts = [max(prompts(condition), key=len) for condition in conditions]
        readings = [reading_of(tokenizer, text) for text in texts]
        option = f"{field}.{LONG_CAPTIONS}"
        if wrong := faults(texts, readings, self.prompts.long_captions, option):
            raise DataError(
                f"{field}: the conditions' texts, by the tokenizer of {self.model}: {wrong}"
            )
        findings.notes += [f"{field} ({self.model}): {note}" for note in notes(texts, readings)]

    def memory(self) -> tuple[float, float]:
        batch = self.batch_size or IMAGE_BATCH["cuda"]
        return clip_memory(self.model, self.precision, batch)

    def work(self) -> ImageWork | None:
        return clip_work(self.model, self.precision)


class TextImageScorer(ABC):
    """Cosine of image and text features; subclasses preprocess the images."""

    def __init__(self, model: Towers, prompts: PromptConfig, batch_size: int = 0) -> None:
        self._model = model
        self._prompts = Prompts(prompts)
        self._long_captions = prompts.long_captions
        self._batch = batch_size or IMAGE_BATCH.get(model.device.type, IMAGE_BATCH["cuda"])
        self._texts = TextFeatures(model.encode_texts)

    @abstractmethod
    def preprocess(self, images: np.ndarray) -> Tensor:
        """(n, H, W, 3) uint8 -> (n, 3, h, w) normalised fp32 on the model's device."""

    @abstractmethod
    def size_fault(self, height: int, width: int) -> str | None:
        """Why an image of that size cannot be scored, or None."""

    def warm(self) -> None:
        """Score a black image: libraries load before the first request."""
        image = np.zeros((1, *self._model.image_size, 3), np.uint8)
        self(image, [Condition(text="warm", class_index=0)])

    def __call__(self, images: Images, conditions: Sequence[Condition]) -> np.ndarray:
        """N uint8 images of any sizes and N conditions -> (N,) float32.

        Raises:
            ImageErrors: images whose text or size cannot be scored, each with the reason.
        """
        texts, errors = self._read(conditions)
        for index, image in enumerate(images):
            error = self.size_fault(*image.shape[:2])
            if error is not None:
                errors.setdefault(index, error)
        if errors:
            raise ImageErrors(dict(sorted(errors.items())))
        words = self._texts(texts)
        pictures = self._encode(images)
        return (pictures * words).sum(-1).cpu().numpy()

    @torch.inference_mode()
    def cosines(self, images: Images, conditions: Sequence[Condition]) -> Tensor:
        """Of every one of N images with every text of A conditions: (N, A) fp32.

        Raises:
            ImageErrors: by the condition's index, a text that cannot be read.
        """
        texts, errors = self._read(conditions)
        if errors:
            raise ImageErrors(errors)
        return self._encode(images) @ self._texts(texts).T

    def _read(self, conditions: Sequence[Condition]) -> tuple[list[Sentences], dict[int, str]]:
        """The texts of the images, and the errors of those without one, by index."""
        seen: dict[tuple[str, int | None], Sentences | str] = {}
        texts: list[Sentences] = []
        errors: dict[int, str] = {}
        for index, condition in enumerate(conditions):
            key = condition.text, condition.class_index
            if key not in seen:
                seen[key] = self._sentences(condition)
            found = seen[key]
            if isinstance(found, str):
                errors[index] = found
            else:
                texts.append(found)
        return texts, errors

    def _sentences(self, condition: Condition) -> Sentences | str:
        """The text of a condition, or why it cannot be read."""
        try:
            sentences = self._prompts(condition)
        except DataError as error:
            return str(error)
        if sentences in self._texts:
            return sentences
        for sentence in sentences:
            reading = self._model.reading(sentence)
            if wrong := fault(sentence, reading, self._long_captions, LONG_CAPTIONS):
                return wrong
        return sentences

    @torch.inference_mode()
    def _encode(self, images: Images) -> Tensor:
        """(N, E) unit rows; preprocessed images of all sizes share a forward pass."""
        parts = []
        for start in range(0, len(images), self._batch):
            batch = images[start : start + self._batch]
            made = [(indices, self.preprocess(same)) for indices, same in by_size(batch)]
            parts.append(self._model.encode_images(in_order(made)))
        return torch.cat(parts)


def _mean(rows: list[Tensor]) -> Tensor:
    """The normalised mean of unit rows."""
    return rows[0] if len(rows) == 1 else F.normalize(torch.stack(rows).mean(0), dim=-1)
