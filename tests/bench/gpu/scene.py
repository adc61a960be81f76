"""What a check is given: the device, sizes, models with random weights, and a place for figures."""

from __future__ import annotations

import functools
import gc
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from actors.models.llamagen import LlamaGen, LlamaGenConfig
from cluster.program.precision import start_computing
from tests.bench.measuring import random_llamagen, size_config


class SkippedError(Exception):
    """A check cannot run here; the message says why."""


class Scene:
    """See the module.

    Args:
        tell: sends an event to the supervisor.
        device: "cuda" or "cpu".
        tiny: sizes that take no time, to try the checks' code.
        quick: fewer variants.
        official: a checkout of FoundationVision/LlamaGen; empty is none.
        folder: holds this process's own; the supervisor removes it.
    """

    def __init__(
        self,
        tell: Callable[..., None],
        device: str,
        tiny: bool,
        quick: bool,
        official: str,
        folder: str,
    ) -> None:
        self.device, self.tiny, self.quick, self.official = device, tiny, quick, official
        self.check = ""
        self.figures: dict[str, float] = {}
        """Of this process so far."""
        self._tell = tell
        self._parent, self._folder = folder, ""

    def begin(self) -> None:
        """Start as every process that computes does, and name what computes."""
        start_computing()
        if self.tiny:
            torch.set_num_threads(1)
        name = "cpu"
        if self.on_gpu:
            if not torch.cuda.is_available():
                sys.exit(
                    f"torch {torch.__version__} sees no CUDA device: run this on a machine with a "
                    "GPU and torch built for CUDA (nvidia-smi lists the GPUs), or try the checks' "
                    "code with --device cpu --tiny"
                )
            torch.zeros(1, device=self.device)
            name = torch.cuda.get_device_name()
        self._tell("device", name=name)

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def threads(self) -> int:
        """Of a role."""
        return self.size(2, 1)

    @property
    def small(self) -> str:
        """The size that stands for LlamaGen-L."""
        return "tiny" if self.tiny else "L"

    @property
    def grid(self) -> int:
        return 3 if self.tiny else 16

    @property
    def num_tokens(self) -> int:
        return self.grid**2

    @property
    def rows(self) -> int:
        """Of a full decoding batch: 256 images with guidance."""
        return self.size(512, 3)

    def figure(self, name: str, value: float) -> None:
        """A figure of `expected.EXPECTED`, printed at once."""
        self.figures[name] = float(value)
        self._tell("figure", check=self.check, name=name, value=float(value))

    def note(self, text: str) -> None:
        """A line for people."""
        self._tell("note", check=self.check, text=text)

    def size(self, full: int, tiny: int) -> int:
        return tiny if self.tiny else full

    def config(self, **changes: Any) -> LlamaGenConfig:
        """LlamaGen-L's architecture, class-conditional unless changed."""
        if self.tiny:
            changes = {"vocab_size": 64, "num_classes": 10, **changes}
        return size_config(self.small, self.grid, **changes)

    @functools.cache  # noqa: B019
    def policy(self, dtype: torch.dtype) -> LlamaGen:
        """LlamaGen-L; in bf16 the fp32 weights rounded. Checks that write into it restore it."""
        policy = random_llamagen(self.config(), self.device, dtype)
        if dtype != torch.float32:
            policy.load_state_dict(self.policy(torch.float32).state_dict())
        return policy

    def folder(self) -> Path:
        """A temporary folder of this process."""
        self._folder = self._folder or tempfile.mkdtemp(dir=self._parent)
        return Path(self._folder)

    def clean_up(self) -> bool:
        """Free what a check left; returns whether the device still works."""
        gc.collect()
        if not self.on_gpu:
            return True
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            return bool(torch.ones(1, device=self.device).item() == 1)
        except RuntimeError:
            return False
