"""Exact float32 arithmetic, also on GPUs."""

from __future__ import annotations

import torch


def exact_fp32() -> None:
    """Turn off TF32 for matrix products and convolutions (cuDNN's default), since features, scores
    and logprobs are compared across devices and programs.

    The flags are global to the process and other threads may be computing, so they are set once,
    at the start of every process that computes, and never reset.
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
