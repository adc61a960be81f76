"""What the tokenizers of open_clip make of a text: how much of it a text tower reads."""

from __future__ import annotations

from typing import Any

from cluster.readable import Reading
from cluster.torchvision_ops import ensure_torchvision

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
    unknown, marks = inner.unk_token_id, set(inner.all_special_ids) - {inner.unk_token_id}
    own = [token for token in ids if token not in marks]
    pieces = [inner.convert_ids_to_tokens(token) for token in own if token != unknown]
    missing = 0 if unknown is None else own.count(unknown)
    return Reading(
        tokens=len(ids) + (CLIPS_MARKS if clips else 0),
        limit=int(tokenizer.context_length),
        known=sum(any(map(str.isalnum, piece)) for piece in pieces),
        unknown=missing,
        empty=not text or not own,
    )
