"""A small T5 encoder in Hugging Face's layout, and the files of caption features that it makes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actors.text.encoder import CaptionEncoder
from actors.text.features import write_caption_features
from cluster.model_files.torchvision_ops import ensure_torchvision
from learner.miniature.systems.system import Job
from learner.miniature.training import optimise

ENCODER = "t5"
"""Its directory, beside the file of features."""
SPECIAL = ("<pad>", "</s>", "<unk>")
SIZES: dict[str, Any] = {
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.0,
}
"""Of `transformers.T5Config`."""
BATCH, LR = 32, 3e-3


def text_encoder(job: Job, attributes: Tensor, captions: Sequence[str]) -> None:
    """A T5 encoder of the data's texts, its tokenizer of whole words beside it, and the features of
    captions in the job's file.

    Trained on texts alone: a linear read-out of the mean of the last hidden states, discarded
    afterwards, is to tell each attribute (cross-entropy). So the features hold what a caption says,
    each attribute along directions of its own.

    Args:
        attributes: (C, K) int64, of the data's texts.
        captions: what a policy is tuned for, with repetitions.
    """
    ensure_torchvision()
    import transformers

    folder, texts = job.file.parent / ENCODER, job.network.data().texts
    tokenizer = word_tokenizer(texts)
    generator = job.batches().generator
    model = transformers.T5EncoderModel(transformers.T5Config(vocab_size=len(tokenizer), **SIZES))
    counts = (attributes.amax(0) + 1).tolist()
    heads = nn.ModuleList(nn.Linear(SIZES["d_model"], count) for count in counts)
    read = tokenizer(texts, padding=True, return_tensors="pt")

    def loss(_: int) -> Tensor:
        index = torch.randint(len(texts), (BATCH,), generator=generator)
        mask = read["attention_mask"][index]
        hidden = model(read["input_ids"][index], attention_mask=mask).last_hidden_state
        pooled = (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(-1, keepdim=True)
        parts = zip(heads, attributes[index].T)
        return torch.stack([F.cross_entropy(head(pooled), part) for head, part in parts]).sum()

    optimise(nn.ModuleList([model, heads]), loss, job.steps, LR, job.tick)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    encoder = CaptionEncoder(str(folder))
    features = encoder.stream(captions)
    write_caption_features(job.file, captions, features, encoder.fingerprint)


def word_tokenizer(texts: Sequence[str]) -> Any:
    """A tokenizer whose tokens are the words of texts, and which ends a text with </s>, as T5's."""
    ensure_torchvision()
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
