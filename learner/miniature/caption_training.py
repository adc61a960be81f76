"""Training of the networks of captioned digits, seeded: text encoder, policy, CLIP.

An augmented image is measured anew, since a rotation changes its slant: every image has the caption
that fits it.

Shapes: N images, A distinct captions, C tokens of a caption, D width of the text encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actors.models.base import Conditions
from actors.models.llamagen import CaptionEmbedding, LlamaGen, LlamaGenConfig
from actors.models.vq import VQTokenizer
from cluster.messages import Condition
from learner.data.digit_captions import (
    SLANTS,
    WEIGHTS,
    all_attributes,
    numbers_of,
    training_cuts,
)
from learner.data.digits import CLASS_NAMES
from learner.miniature.training import (
    AUGMENTED_COPIES,
    CONDITION_DROPOUT,
    Batches,
    Tick,
    _optimise,
)

SPECIAL = ("<pad>", "</s>", "<unk>")


def caption_numbers(pixels: Tensor, labels: Tensor) -> Tensor:
    """Numbers (N,) of the captions, in `all_attributes`, that images (N, 3, 8, 8) in [-1, 1]
    with labels (N,) measure to."""
    ink = ((pixels.mean(1) + 1) / 2).clamp(0, 1).numpy()
    return torch.from_numpy(numbers_of(training_cuts().attributes(ink, labels.numpy())))


def train_text_encoder(
    folder: Path, texts: Sequence[str], generator: torch.Generator, steps: int, tick: Tick
) -> Any:
    """A T5 encoder and its tokenizer of whole words, in Hugging Face's layout.

    Trained on captions alone: a linear read-out of the mean of the last hidden states, discarded
    afterwards, is to tell each attribute (cross-entropy). The features then hold what a caption
    says along directions of about equal spread, whatever the order of its words.

    Args:
        folder: written.
        texts: (A,) all captions, in the order of `all_attributes`.

    Returns:
        The encoder, a `transformers.T5EncoderModel`.
    """
    import transformers

    tokenizer = word_tokenizer(texts)
    tokenizer.save_pretrained(folder)
    config = transformers.T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    model = transformers.T5EncoderModel(config)
    heads = nn.ModuleList(
        nn.Linear(config.d_model, len(words)) for words in (CLASS_NAMES, WEIGHTS, SLANTS)
    )
    read = tokenizer(list(texts), padding=True, return_tensors="pt")
    mask = read["attention_mask"].unsqueeze(-1)
    attributes = torch.from_numpy(all_attributes())

    def loss(_: int) -> Tensor:
        index = torch.randint(len(texts), (32,), generator=generator)
        given = {key: read[key][index] for key in ("input_ids", "attention_mask")}
        hidden = model(**given).last_hidden_state
        pooled = (hidden * mask[index]).sum(1) / mask[index].sum(1)
        parts = zip(heads, attributes[index].T)
        return torch.stack([F.cross_entropy(head(pooled), part) for head, part in parts]).sum()

    _optimise(nn.ModuleList([model, heads]), loss, steps, 3e-3, tick)
    model.eval().save_pretrained(folder)
    return model


def word_tokenizer(texts: Sequence[str]) -> Any:
    """A tokenizer whose tokens are the words of texts, and which ends a text with </s>, as T5's."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = [*SPECIAL, *dict.fromkeys(" ".join(texts).split())]
    words = Tokenizer(
        models.WordLevel({word: at for at, word in enumerate(vocabulary)}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary.index("</s>"))]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


@dataclass(frozen=True)
class _Prompts:
    """All captions and, after them, the empty caption in each of their lengths."""

    conditions: Conditions
    empty: Tensor
    """(A,) index of the empty caption that is as long as each caption."""

    @classmethod
    def of(cls, policy: LlamaGen, captions: Sequence[Condition]) -> _Prompts:
        given = policy.encode(captions)
        assert given.mask is not None
        lengths = given.mask.sum(-1)
        kinds, kind_of = lengths.unique(return_inverse=True)
        first = torch.stack([(lengths == kind).nonzero()[0, 0] for kind in kinds])
        null = policy.null_conditions(given[first])
        assert null.mask is not None
        values = torch.cat([given.values, null.values[null.value_index()]])
        mask = torch.cat([given.mask, null.mask[null.value_index()]])
        return cls(Conditions(values, mask), len(captions) + kind_of)

    def draw(self, numbers: Tensor, dropped: Tensor) -> Conditions:
        """The captions of numbers (B,), the empty one where `dropped` (B,)."""
        index = torch.where(dropped, self.empty[numbers], numbers)
        return Conditions(self.conditions.values, self.conditions.mask, index)[:]


def train_policy(
    batches: Batches,
    tokenizer: VQTokenizer,
    config: LlamaGenConfig,
    captions: Sequence[Condition],
    steps: int,
    tick: Tick,
) -> LlamaGen:
    """Next-token cross-entropy with caption dropout; short, so that RL has headroom.

    Args:
        captions: (A,) all captions with features, in the order of `all_attributes`.
    """
    policy = LlamaGen(config)
    for name, parameter in policy.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.02, generator=batches.generator)
        if name == "output.weight":
            nn.init.zeros_(parameter)
    assert isinstance(policy.cls_embedding, CaptionEmbedding)
    empty = policy.cls_embedding.uncond_embedding
    empty.copy_(torch.randn(empty.shape, generator=batches.generator) / empty.shape[1] ** 0.5)
    projection = policy.cls_embedding.cap_proj
    for weight in (projection.fc1.weight, projection.fc2.weight):
        nn.init.normal_(weight, std=weight.shape[1] ** -0.5, generator=batches.generator)

    with torch.no_grad():  # each image in several augmentations, encoded once
        images, labels = batches.draw(AUGMENTED_COPIES * len(batches.data.pixels))
        codes = tokenizer.encode(images).flatten(1)
    numbers, prompts = caption_numbers(images, labels), _Prompts.of(policy, captions)

    def loss(_: int) -> Tensor:
        index = torch.randint(len(codes), (64,), generator=batches.generator)
        dropped = torch.rand(len(index), generator=batches.generator) < CONDITION_DROPOUT
        conditions = prompts.draw(numbers[index], dropped)
        return F.cross_entropy(
            policy(codes[index], conditions).flatten(0, 1), codes[index].flatten()
        )

    _optimise(policy, loss, steps, 2e-3, tick)
    return policy


def train_clip(
    batches: Batches, model: nn.Module, text_tokens: Tensor, steps: int, tick: Tick
) -> None:
    """Images against all distinct captions (A,): CLIP's loss for repeated captions."""

    def loss(_: int) -> Tensor:
        images, labels = batches.draw(64)
        image, text, scale = model(images, text_tokens)
        return F.cross_entropy(scale * image @ text.T, caption_numbers(images, labels))

    _optimise(model, loss, steps, 1e-3, tick)
