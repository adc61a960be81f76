"""Checks that a text encoder (T5, CLIP, SigLIP) encodes the whole text.

Truncated, unknown or empty texts would silently give features of another text. Pure functions on
the output of a tokenizer.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

LongCaptions = Literal["error", "truncate"]
SHOWN = 60  # characters of a text in a message
INVISIBLE = ("Cc", "Cf", "Zs", "Zl", "Zp")
"""Unicode categories of control characters, zero-width marks and separators, for which byte
tokenizers have tokens."""
BLANK = " \u2581\u0120"
"""Space in tokens: of sentencepiece, and of byte-level BPE."""


@dataclass(frozen=True)
class Reading:
    """Token counts of a text."""

    tokens: int
    """With start and end tokens, before truncation."""
    limit: int
    """Maximum of the encoder, with start and end tokens."""
    known: int
    """Tokens of the vocabulary with a letter or a digit."""
    unknown: int = 0
    """Unknown tokens."""
    empty: bool = False
    """Only special tokens and white space are left."""


def reading_of_ids(tokenizer: Any, ids: Sequence[int], limit: int, added: int = 0) -> Reading:
    """Token counts of a text.

    Tokens without a letter or digit (word-start marks, punctuation) do not count as known: flan-T5
    has such tokens for Chinese, for example.

    Args:
        tokenizer: of transformers.
        ids: of the whole text, before truncation.
        added: number of special tokens that are not in `ids`.
    """
    unknown = tokenizer.unk_token_id
    marks = {*tokenizer.all_special_ids} - {unknown}
    missing = 0 if unknown is None else list(ids).count(unknown)
    own = [token for token in ids if token != unknown and token not in marks]
    pieces = tokenizer.convert_ids_to_tokens(own)
    return Reading(
        tokens=len(ids) + added,
        limit=limit,
        known=sum(any(map(str.isalnum, piece)) for piece in pieces),
        unknown=missing,
        empty=not missing and not any(piece.strip(BLANK) for piece in pieces),
    )


def fault(text: str, found: Reading, long_captions: LongCaptions, option: str) -> str:
    """Why an encoder would not encode the whole text, and what to do; empty if it would.

    Args:
        option: name of the option `long_captions`.
    """
    name = f"the text {shortened(text)!r}"
    if found.empty:
        return f"{name} has nothing left after the encoder's cleaning: leave it out"
    if found.unknown and not found.known:
        return (
            f"{name} is unknown to the encoder, whole ({found.unknown} unknown tokens): choose an "
            "encoder of its language, or leave it out"
        )
    if all(unicodedata.category(letter) in INVISIBLE for letter in text):
        return f"{name} has nothing in it that shows: leave it out"
    if found.tokens > found.limit and long_captions == "error":
        return (
            f"{name} has {found.tokens} tokens, but the model reads {found.limit}: shorten it, or "
            f"set {option} to truncate"
        )
    return ""


def faults(
    texts: Sequence[str],
    readings: Sequence[Reading],
    long_captions: LongCaptions,
    option: str,
) -> str:
    """Number of texts with a fault, and the first one; empty if there are none."""
    found = [
        (at, reason)
        for at, (text, reading) in enumerate(zip(texts, readings, strict=True))
        if (reason := fault(text, reading, long_captions, option))
    ]
    if not found:
        return ""
    at, reason = found[0]
    count = f"{len(found)} of {len(texts)} are not read as written"
    return f"{count}; the first is number {at + 1}: {reason}"


def notes(texts: Sequence[str], readings: Sequence[Reading]) -> list[str]:
    """Warnings: texts that are truncated or partly unknown."""
    cut = [at for at, found in enumerate(readings) if found.tokens > found.limit]
    partly = [at for at, found in enumerate(readings) if found.unknown and found.known]
    found_notes = []
    for which, what in ((cut, "cut at what the encoder reads"), (partly, "unknown to it in parts")):
        if which:
            first = f"the first is number {which[0] + 1}: {shortened(texts[which[0]])!r}"
            found_notes.append(f"{len(which)} of {len(texts)} captions are {what}; {first}")
    return found_notes


def shortened(text: str, limit: int = SHOWN) -> str:
    """A text, shortened for a message."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
