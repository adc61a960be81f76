"""Whether a text encoder reads a text as it is written: one rule for T5, CLIP and SigLIP.

A text that is cut, that its tokenizer does not know, or of which cleaning leaves nothing gives
features like any other, of something else than was asked for. Pure functions on what a tokenizer
made of it.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

LongCaptions = Literal["error", "truncate"]
SHOWN = 60  # characters of a text in a message
INVISIBLE = ("Cc", "Cf", "Zs", "Zl", "Zp")
"""Unicode's categories of controls, marks without a width and separators. Tokenizers of bytes have
tokens for them like for any letter."""
BLANK = " \u2581\u0120"
"""What tokenizers write for a space: sentencepiece, and byte-level BPE."""


@dataclass(frozen=True)
class Reading:
    """What a tokenizer makes of a text."""

    tokens: int
    """With those that mark its start and end, before anything is cut."""
    limit: int
    """Tokens that the encoder reads, marks included."""
    known: int
    """Tokens with a letter or a digit that the vocabulary has."""
    unknown: int = 0
    """Tokens that stand for what the vocabulary does not have."""
    empty: bool = False
    """Nothing is left of it but marks and white space."""


def reading_of_ids(tokenizer: Any, ids: Sequence[int], limit: int, added: int = 0) -> Reading:
    """A text by its tokens.

    Tokens without a letter or digit (the mark of a word's beginning, punctuation) do not count as
    known, so that of Chinese in flan-T5's vocabulary nothing is.

    Args:
        tokenizer: of transformers, that made them.
        ids: of the whole text, before it is cut.
        added: marks that are not among them.
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
    """Why an encoder does not read a text as it is written, and what to do; empty if it does.

    Args:
        option: that `long_captions` is set by.
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
    """What is wrong with some of many texts: how many, and the first; empty if nothing is."""
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
    """What is allowed, and worth saying: texts that are cut, or of which parts are unknown."""
    cut = [at for at, found in enumerate(readings) if found.tokens > found.limit]
    partly = [at for at, found in enumerate(readings) if found.unknown and found.known]
    said = []
    for which, what in ((cut, "cut at what the encoder reads"), (partly, "unknown to it in parts")):
        if which:
            first = f"the first is number {which[0] + 1}: {shortened(texts[which[0]])!r}"
            said.append(f"{len(which)} of {len(texts)} captions are {what}; {first}")
    return said


def shortened(text: str, limit: int = SHOWN) -> str:
    """A text for a message."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
