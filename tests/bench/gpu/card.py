"""Check 0: the versions, and what the card's memory and matrix units do."""

from __future__ import annotations

import importlib.util
import sys

import torch

from tests.bench.gpu.scene import Scene
from tests.bench.measuring import bandwidth, product_rate


def card(scene: Scene) -> None:
    """A copy of 4 GiB, read and written, and a product of two 8,192 x 8,192 matrices."""
    found = {"python": sys.version.split()[0], "torch": torch.__version__}
    found |= {"CUDA": torch.version.cuda or "none", "triton": triton_version()}
    cudnn = torch.backends.cudnn
    found["cuDNN"] = str(cudnn.version()) if cudnn.is_available() else "none"
    if scene.on_gpu:
        about = torch.cuda.get_device_properties(0)
        found["compute capability"] = f"{about.major}.{about.minor}"
        found["multiprocessors"] = str(about.multi_processor_count)
        found["memory"] = f"{about.total_memory / 2**30:.0f} GiB"
    scene.note(", ".join(f"{name} {value}" for name, value in found.items()))
    scene.figure("copy_tb_s", bandwidth(scene.device, small=scene.tiny) / 1e12)
    rate = product_rate(scene.device, torch.bfloat16, small=scene.tiny)
    scene.figure("product_tflop_s", rate / 1e12)


def triton_version() -> str:
    if importlib.util.find_spec("triton") is None:
        return "none"
    import triton

    return str(triton.__version__)
