"""Figures of GPUs, from their makers' data sheets: peaks, of which `learner.capacity.seconds` takes
the shares that programs reach.

H100 SXM, H200 SXM, A100 SXM 80 GB, L40S: NVIDIA's data sheets of these products (bf16 dense, that
is, half of the figure "with sparsity"). RTX 4090: NVIDIA's Ada architecture whitepaper, appendix A
(bf16 with fp32 accumulation). PCIe: 16 lanes of generation 5 or 4, of which a pinned copy reaches
55 or 25 GB/s. Link: NVLink one way (half of the data sheet's total), PCIe where there is none.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from cluster.errors import ConfigError, did_you_mean

DEFAULT_CARD = "h100"


@dataclass(frozen=True)
class Card:
    """A GPU: bytes, bytes/s, FLOP/s."""

    name: str
    memory: float
    bandwidth: float
    """Of its memory."""
    bf16: float
    """Dense products of bf16 with fp32 accumulation."""
    fp32: float
    """Of the vector units: no TF32, which this program turns off."""
    pcie: float
    """Copies between pinned host memory and the GPU, one way."""
    link: float
    """Between GPUs of a node, one way."""


CARDS = {
    "h200": Card("H200", 141e9, 4.8e12, 989e12, 67e12, 55e9, 450e9),
    "h100": Card("H100", 80e9, 3.35e12, 989e12, 67e12, 55e9, 450e9),
    "a100": Card("A100", 80e9, 2.04e12, 312e12, 19.5e12, 25e9, 300e9),
    "l40s": Card("L40S", 48e9, 0.864e12, 362e12, 91.6e12, 25e9, 25e9),
    "4090": Card("RTX 4090", 24e9, 1.008e12, 165e12, 82.6e12, 25e9, 25e9),
}
"""Name in --gpu -> figures."""
NETWORK = {"h200": 400, "h100": 400, "a100": 200, "l40s": 100, "4090": 25}
"""Name in --gpu -> Gbit/s between nodes, one way, assumed: one port of the usual network."""


def card_named(name: str) -> Card:
    """Raises ConfigError for an unknown name."""
    if name.lower() not in CARDS:
        raise ConfigError(
            f"--gpu: expected one of {', '.join(CARDS)}, found {name!r}"
            f"{did_you_mean(name.lower(), CARDS)}"
        )
    return CARDS[name.lower()]


def this_gpu() -> tuple[str, float]:
    """Name and bytes of memory of this machine's first GPU; nothing without one."""
    import torch

    if not torch.cuda.is_available():
        return "", 0.0
    return torch.cuda.get_device_name(0), float(torch.cuda.get_device_properties(0).total_memory)


def recognised(device: str, memory: float) -> Card | None:
    """The card of a device name as CUDA tells it ("NVIDIA H100 80GB HBM3"); None if the table has
    none of its kind. Other forms (PCIe, NVL) get the table's figures, with their own memory."""
    key = key_of(device)
    return replace(CARDS[key], name=device, memory=memory) if key else None


def key_of(device: str) -> str:
    """The name in --gpu of a device or a card; empty: the table has none of its kind."""
    words = ((key, rf"\b{key}\b") for key in CARDS)  # a GH200 is no H200
    return next((key for key, word in words if re.search(word, device.lower())), "")
