"""Rewards that misuse their process and their arguments in every way that Python allows.

`spoil` runs when this module is imported, when a reward is built and whenever it is called.
"""

from __future__ import annotations

import asyncio
import gc
import locale
import logging
import os
import random
import resource
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from cluster.messages import Condition

_LEFT_OPEN: list[Any] = sys.__dict__.setdefault("tests_left_open", [])
# not of this module: modes that are collected some time end some time, in any thread


def _reseed() -> None:
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(99)


def _legacy_tf32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = False


def _ignore_sigterm() -> None:
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)


def _mute() -> None:
    for handler in logging.root.handlers:
        handler.setLevel(logging.CRITICAL + 1)
        handler.addFilter(lambda record: False)
    logging.getLogger("learner").addFilter(lambda record: False)


def _limits() -> None:
    for number, soft in ((resource.RLIMIT_FSIZE, 1000), (resource.RLIMIT_NOFILE, 30)):
        resource.setrlimit(number, (soft, resource.getrlimit(number)[1]))


def _silence() -> None:
    logging.disable(logging.CRITICAL)
    logging.getLogger("cluster").disabled = True
    logging.getLogger("learner.of_a_later_import").disabled = True
    logging.root.handlers.clear()
    logging.basicConfig(level=logging.DEBUG)


SPOILS: dict[str, Callable[[], object]] = {
    "dtype": lambda: torch.set_default_dtype(torch.float64),
    "device": lambda: torch.set_default_device("meta"),
    "threads": lambda: torch.set_num_threads(3),
    "seeds": _reseed,
    "draws": lambda: (random.random(), np.random.rand(5), torch.rand(5)),
    "determinism": lambda: torch.use_deterministic_algorithms(True, warn_only=True),
    "precision": lambda: torch.set_float32_matmul_precision("medium"),
    "tf32": _legacy_tf32,
    "cudnn": lambda: setattr(torch.backends.cudnn, "benchmark", True),
    "mkldnn": lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
    "denormals": lambda: torch.set_flush_denormal(True),
    "gradients": lambda: torch.set_grad_enabled(False),
    "autocast": lambda: torch.set_autocast_enabled("cpu", True),
    "anomalies": lambda: torch.autograd.set_detect_anomaly(True),
    "numpy errors": lambda: np.seterr(all="raise"),
    "warnings": lambda: warnings.simplefilter("error"),
    "directory": lambda: os.chdir("/"),
    "environment": lambda: os.environ.update(OMP_NUM_THREADS="7", HOME="/nowhere"),
    "locale": lambda: locale.setlocale(locale.LC_ALL, "C"),
    "path": lambda: sys.path.insert(0, "/nowhere"),
    "recursion": lambda: sys.setrecursionlimit(2345),
    "collector": gc.disable,
    "sockets": lambda: socket.setdefaulttimeout(0.5),
    "inference": lambda: _LEFT_OPEN.append(torch.inference_mode()) or _LEFT_OPEN[-1].__enter__(),
    "cores": lambda: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}),
    "zone": lambda: (os.environ.update(TZ="Asia/Tokyo"), time.tzset()),
    "switching": lambda: sys.setswitchinterval(0.5),
    "hooks": lambda: setattr(threading, "excepthook", print),
    "stdout": lambda: setattr(sys, "stdout", sys.__stderr__),
    "signals": _ignore_sigterm,
    "handlers": _mute,
    "logging": _silence,
    "limits": _limits,
    "file modes": lambda: os.umask(0o777),
    "timer": lambda: signal.setitimer(signal.ITIMER_REAL, 3600),
    "modes": lambda: torch.device("meta").__enter__(),
}


def spoil() -> None:
    for one in SPOILS.values():
        one()


class InPlace:
    """Negates its images, and the conditions' features, in place."""

    def __init__(self, device: str) -> None:
        pass

    def __call__(self, images: Any, conditions: Sequence[Condition]) -> np.ndarray:
        values = np.array([float(image.mean()) for image in images], np.float32)
        for image in images:
            image[...] = 255 - image
        for condition in conditions:
            if condition.features is not None:
                condition.features[...] = 0
            object.__setattr__(condition, "text", "spoiled")
        if isinstance(conditions, list):
            conditions.clear()
        return values / 255


class Spoils(InPlace):
    """Sets every setting of the process that can be set."""

    def __init__(self, device: str) -> None:
        spoil()

    def warm(self) -> None:
        spoil()

    def __call__(self, images: Any, conditions: Sequence[Condition]) -> np.ndarray:
        values = super().__call__(images, conditions)
        spoil()
        return values


class Reuses:
    """Answers with the same buffer every time, as CUDA graphs do."""

    def __init__(self, device: str) -> None:
        self._buffer = np.zeros(64, np.float32)

    def __call__(self, images: Any, conditions: Sequence[Condition]) -> np.ndarray:
        answer = self._buffer[: len(images)]
        answer[:] = [float(image.mean()) for image in images]
        return answer


class Ends:
    """Raises a given error for images that are all black."""

    def __init__(self, device: str, how: str) -> None:
        self._how = how

    def __call__(self, images: Any, conditions: Sequence[Condition]) -> np.ndarray:
        if any(not image.any() for image in images):
            raise FAULTS[self._how]
        return np.ones(len(images), np.float32)


class TimeLimit(BaseException):
    """An error that `except Exception` does not catch."""


class Unreadable(Exception):  # noqa: N818
    def __str__(self) -> str:
        raise SystemExit(3)


FAULTS: dict[str, BaseException] = {
    "exit": SystemExit(0),
    "interrupt": KeyboardInterrupt(),
    "cancelled": asyncio.CancelledError(),
    "generator": GeneratorExit(),
    "limit": TimeLimit("too slow"),
    "stop": StopIteration(),
    "memory": MemoryError(),
    "unreadable": Unreadable(),
    "surrogate": ValueError("no file \udcff"),
    "long": ValueError("x" * 100_000),
}


class FailsToStart:
    """Imports, but fails when built or warmed up."""

    def __init__(self, device: str, how: str, late: bool = False) -> None:
        self._how = how
        if not late:
            raise FAULTS[how]

    def warm(self) -> None:
        raise FAULTS[self._how]

    def __call__(self, images: Any, conditions: Sequence[Condition]) -> np.ndarray:
        return np.ones(len(images), np.float32)


spoil()
