"""What the tokenizers of open_clip make of a text: how much of it a text tower reads."""

from __future__ import annotations

from typing import Any

from cluster.model_files.torchvision_ops import ensure_torchvision
from cluster.text_limits import Reading, reading_of_ids

CLIPS_MARKS = 3  # start, end and class


def reading_of(tokenizer: Any, text: str) -> Reading:
    """A text by one of open_clip's tokenizers, before it is cut."""
    if hasattr(tokenizer, "encode"):  # open_clip's own, of bytes: it knows every text
        count = len(tokenizer.encode(text))
        limit = int(tokenizer.context_length)
        return Reading(tokens=count + 2, limit=limit, known=count, empty=not count)
    ensure_torchvision()
    from open_clip import tokenizer as cleaning

    if hasattr(tokenizer, "clean_fn"):
        text = tokenizer.clean_fn(text)
    else:  # SigLIP's
        text = cleaning.canonicalize_text(cleaning.basic_clean(text))
    clips = getattr(tokenizer, "tokenizer_mode", "") == "clips"
    inner = tokenizer.tokenizer
    ids = inner(text, add_special_tokens=not clips).input_ids
    return reading_of_ids(
        inner, ids, int(tokenizer.context_length), added=CLIPS_MARKS if clips else 0
    )
