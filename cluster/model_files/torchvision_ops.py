"""Makes torchvision's CUDA build importable with a CPU-only torch.

Its compiled operators cannot be loaded then, and its Python part fails on undeclared operators.
Declaring two of them is enough for open_clip, timm and transformers' text models. If the real
operators load, this does nothing.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path

import torch

_OPERATORS = ("nms", "qnms")


@functools.cache
def ensure_torchvision() -> torch.library.Library | None:
    """Call before the first import of open_clip, timm, transformers or torchvision.

    Returns:
        The library that holds the declarations (cached: it must stay alive), or None where the real
        operators loaded.
    """
    spec = importlib.util.find_spec("torchvision")
    if "torchvision" in sys.modules or spec is None or spec.origin is None:
        return None
    for compiled in Path(spec.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(compiled)
        except OSError:  # a CUDA library is missing: the case this module is for
            continue
        return None
    declared = torch.library.Library("torchvision", "DEF")
    for operator in _OPERATORS:
        declared.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return declared
