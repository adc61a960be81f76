"""Names of a VQGAN's tensors in taming's files, to ours and back."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from actors.checkpoints.taming import POLICY, TOKENIZER
from cluster.errors import CheckpointError

LOSS = "loss."
MIDDLE = {"block_1": "0", "attn_1": "1", "block_2": "2"}


def tokenizer_tensors(state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The VQGAN's tensors under our names, of a VQGAN's own file or of a whole policy's. What
    belongs to its loss is left out.

    Raises:
        CheckpointError: the file has no VQGAN.
    """
    inside = any(name.startswith((POLICY, TOKENIZER)) for name in state)
    prefix = TOKENIZER if inside else ""
    found = {
        name.removeprefix(prefix): tensor
        for name, tensor in state.items()
        if name.startswith(prefix) and not name.removeprefix(prefix).startswith(LOSS)
    }
    numbers = [re.match(r"decoder\.up\.(\d+)\.", name) for name in found]
    levels = 1 + max((int(number[1]) for number in numbers if number), default=-1)
    if not levels:
        raise CheckpointError(f"{source}: no tensors {prefix}decoder.up.*: there is no VQGAN in it")
    return {_tokenizer_name(name, levels): tensor for name, tensor in found.items()}


def _tokenizer_name(name: str, levels: int) -> str:
    """Ours for an official name: levels are one list in the order of the data, and so is the
    middle. taming counts the decoder's from the finest, which comes last."""
    match name.split("."):
        case ["encoder", "down", level, part, *rest]:
            new = ["encoder", "conv_blocks", level, part.replace("block", "res"), *rest]
        case ["decoder", "up", level, part, *rest]:
            place = str(levels - 1 - int(level))
            new = ["decoder", "conv_blocks", place, part.replace("block", "res"), *rest]
        case ["encoder" | "decoder" as half, "mid", part, *rest] if part in MIDDLE:
            new = [half, "mid", MIDDLE[part], *rest]
        case _:
            return name
    return ".".join(new)


def official_tokenizer_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A VQGAN's tensors under the names of its own official file; what belongs to the loss of its
    training (discriminator, perceptual network) is not among them."""
    numbers = [re.match(r"decoder\.conv_blocks\.(\d+)\.", name) for name in state]
    levels = 1 + max(int(number[1]) for number in numbers if number)
    return {_official_tokenizer_name(name, levels): tensor for name, tensor in state.items()}


def _official_tokenizer_name(name: str, levels: int) -> str:
    """Undoes `_tokenizer_name`."""
    match name.split("."):
        case ["encoder", "conv_blocks", level, part, *rest]:
            new = ["encoder", "down", level, part.replace("res", "block"), *rest]
        case ["decoder", "conv_blocks", place, part, *rest]:
            level = str(levels - 1 - int(place))
            new = ["decoder", "up", level, part.replace("res", "block"), *rest]
        case ["encoder" | "decoder" as half, "mid", number, *rest]:
            official = {ours: part for part, ours in MIDDLE.items()}
            new = [half, "mid", official[number], *rest]
        case _:
            return name
    return ".".join(new)
