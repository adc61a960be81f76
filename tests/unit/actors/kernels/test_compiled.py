"""Every kernel compiles for a GPU, without one: not all that an interpreter takes does."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton exists on Linux only")

COMPILES = """
import sys, torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction
from actors.kernels import fused
from actors.kernels.interface import Window
from cluster.messages import SamplingSpec

class Driver:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)

triton.runtime.driver.set_active(Driver())
run, compiled = JITFunction.run, []

def compile_only(self, *args, grid, warmup, **options):
    kernel = run(self, *args, grid=grid, warmup=True, **options)
    compiled.append((self.__name__, len(kernel.asm["cubin"]) > 0))

JITFunction.run = compile_only

for width, dtype in ((64, torch.bfloat16), (100, torch.float32)):
    qkv = torch.zeros(3, 2, 2, 1, width, dtype=dtype)
    cache = torch.zeros(2, 2, 2, 9, width, dtype=dtype)
    turn, bias = torch.zeros(1, width), torch.zeros(2, 1, 1, 9)
    fused.attention(qkv, cache, Window(torch.zeros(1, dtype=torch.int64), 9, bias), (turn, turn))
    x = torch.zeros(2, 1, width, dtype=dtype)
    fused.add_rms_norm(x, x, x[0, 0], 1e-5)
    layers = [torch.nn.Linear(width, 8, bias=False, dtype=dtype) for _ in range(2)]
    fused.gated_silu(x, *layers)
spec = SamplingSpec(cfg_scale=2, temperature=0.9, guidance="guided")
fused.draw(torch.zeros(4, 16384), torch.zeros(2, dtype=torch.float64), spec)
print(*(name for name, done in compiled if done))
"""


def test_all_kernels_compile_for_an_h100() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILES], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    layer = "_attention _add_rms_norm _gated_silu "
    assert done.stdout.strip() == 2 * layer + "_draw"
