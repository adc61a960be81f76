"""The arithmetic of a process: float32 is float32, on GPUs, too."""

from __future__ import annotations

import torch


def exact_fp32() -> None:
    """Matrix products and convolutions of float32 in float32, not in TF32, which cuDNN takes by
    default: features, scores and logprobs are compared across devices and programs.

    The flags are the whole process's. Every process that computes calls this once, when it starts
    or loads, and nobody sets them back: whoever toggled them would change what another thread
    computes at that moment. Later calls change nothing.
    """
    # The old switches first: with the new ones alone, torch refuses to tell the old.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    for place in fp32_flags().values():
        place.fp32_precision = "ieee"


def fp32_flags() -> dict[str, torch.backends._FP32Precision]:
    """What `exact_fp32` sets: name -> owner of `fp32_precision`."""
    cudnn = torch.backends.cudnn
    return {
        "products": torch.backends.cuda.matmul,  # type: ignore[dict-item]
        "convolutions": cudnn.conv,  # type: ignore[attr-defined]
        "recurrences": cudnn.rnn,  # type: ignore[dict-item]
    }
