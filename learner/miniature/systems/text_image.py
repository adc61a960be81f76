"""Small text-image networks in open_clip's format: directory, vocabulary, configuration."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cluster.io.strict_json import dumps
from cluster.model_files.torchvision_ops import ensure_torchvision
from learner.miniature import training
from learner.miniature.systems.system import Job
from learner.miniature.systems.trainers import read_tokenizer
from learner.miniature.training import Batches

VOCABULARY = "vocabulary.txt.gz"
CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"


@dataclass(frozen=True, kw_only=True)
class TextImageConfig:
    """Sizes of a small CLIP."""

    width: int
    depth: int
    heads: int
    patch: int = 2
    """Side of a patch, pixels."""
    context: int = 16
    """Longest text, in tokens, start and end included."""


def clip(job: Job, config: TextImageConfig) -> None:
    """CLIP on the data's images and texts."""

    def train(batches: Batches, model: nn.Module, texts: Tensor) -> None:
        training.train_clip(batches, model, texts, job.steps, job.tick)

    _build(job, config, train)


def caption_clip(job: Job, config: TextImageConfig, attributes: Callable[[], np.ndarray]) -> None:
    """CLIP on images with captions of attributes (C, K)."""

    def train(batches: Batches, model: nn.Module, texts: Tensor) -> None:
        known = torch.from_numpy(attributes())
        training.train_caption_clip(batches, model, texts, known, job.steps, job.tick)

    _build(job, config, train)


def preference(job: Job, config: TextImageConfig, tokenizer: str) -> None:
    """A preference model; `tokenizer` is the file of the one that worse images go through."""
    vq = read_tokenizer(job, tokenizer)

    def train(batches: Batches, model: nn.Module, texts: Tensor) -> None:
        training.train_preference(batches, model, texts, vq, job.steps, job.tick)

    _build(job, config, train)


def _build(
    job: Job, config: TextImageConfig, train: Callable[[Batches, nn.Module, Tensor], None]
) -> None:
    """Train a network on the job's data, tokens (C, L) of its texts included, and write its
    directory; the job's file is the weights."""
    ensure_torchvision()
    import open_clip

    directory, data = job.file.parent, job.network.data()
    write_vocabulary(directory / VOCABULARY, data.texts)
    layout = open_clip_config(config, data.image_size, data.texts)
    (directory / CONFIG).write_text(dumps(layout, indent=2) + "\n")
    batches = job.batches()
    model = open_clip.CLIP(**layout["model_cfg"])
    encode = open_clip.get_tokenizer(f"local-dir:{directory}", bpe_path=str(directory / VOCABULARY))
    train(batches, model, encode(data.texts))
    job.write(model, layout)


def vocabulary_merges(texts: Iterable[str]) -> list[str]:
    """Byte-pair merges that make each word of the texts one token.

    Raises:
        ValueError: no order of the words does so.
    """
    words = list(dict.fromkeys(" ".join(texts).split()))
    for _ in words:
        merges: dict[str, None] = {}
        for word in words:
            head, *rest = _letters(word)
            for letter in rest:
                merges[f"{head} {letter}"] = None
                head += letter
        ranks = {merge: rank for rank, merge in enumerate(merges)}
        broken = [word for word in words if len(_pieces(word, ranks)) > 1]
        if not broken:
            return list(merges)
        words = broken + [word for word in words if word not in broken]  # their merges come first
    raise ValueError(f"no order of merges makes each of these words one token: {words}")


def _letters(word: str) -> list[str]:
    return [*word[:-1], f"{word[-1]}</w>"]


def _pieces(word: str, ranks: Mapping[str, int]) -> list[str]:
    """Tokens of a word: of all neighbours that can be merged, those of the first merge are."""
    found = _letters(word)
    while True:
        at_ranks = enumerate(ranks.get(f"{a} {b}", len(ranks)) for a, b in pairwise(found))
        rank, at = min(((rank, at) for at, rank in at_ranks), default=(len(ranks), 0))
        if rank == len(ranks):
            return found
        found[at : at + 2] = [found[at] + found[at + 1]]


def write_vocabulary(path: Path, texts: Iterable[str]) -> None:
    """Write a byte-pair vocabulary in open_clip's format with the texts' words. (CLIP's has 49,152
    entries, an embedding larger than all the miniature's networks.) Other text encodes as bytes."""
    text = "\n".join(["#version: tessera", *vocabulary_merges(texts)])
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def open_clip_config(
    config: TextImageConfig, image_size: int, texts: Iterable[str]
) -> dict[str, Any]:
    """Model and preprocessing of a small CLIP, in open_clip's layout."""
    bytes_and_specials = 2 * 256 + 2
    return {
        "model_cfg": {
            "embed_dim": 32,
            "vision_cfg": {
                "image_size": image_size,
                "patch_size": config.patch,
                "layers": config.depth,
                "width": config.width,
                "head_width": config.width // config.heads,
                "mlp_ratio": 2.0,
            },
            "text_cfg": {
                "context_length": config.context,
                "vocab_size": bytes_and_specials + len(vocabulary_merges(texts)),
                "layers": 1,
                "width": config.width,
                "heads": config.heads,
                "mlp_ratio": 2.0,
                "tokenizer_kwargs": {"bpe_path": VOCABULARY},
            },
        },
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"},
    }
