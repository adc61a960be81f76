"""Isolates user code (user rewards): its changes of process-wide settings affect only itself.

Such settings are torch's default dtype and threads, warning filters, the working directory and
others. All roles of the inline fleet share them, as do all scorers of a server. `Isolation` keeps
the settings of a user reward and applies them during its calls.
"""

from __future__ import annotations

import gc
import locale
import logging
import operator
import os
import random
import resource
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.overrides import _len_torch_function_stack, _pop_mode

from cluster.program.logs import PACKAGES
from cluster.program.streams import printable

logger = logging.getLogger(__name__)

MAX_MESSAGE = 500  # characters of a user error's message
_OURS = ("scorers/isolation.py", "scorers/user_rewards.py", "servers/panel.py")
_CALLERS = {Path(__file__).parents[1] / name for name in _OURS}
_SMALL = 1e-310  # denormal
_guards: list[Any] = []  # keeps inference modes alive
_TIMERS = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)
_lock = threading.RLock()  # concurrent blocks would restore each other's settings


class Setting(NamedTuple):
    """A process-wide setting."""

    get: Callable[[], Any]
    set: Callable[[Any], Any]
    kept: bool = True
    """Whether the user code's value is applied in its next call; else it is only undone."""


def _flag(owner: Any, name: str) -> Setting:
    return Setting(lambda: getattr(owner, name), lambda value: setattr(owner, name, value))


def _autocast(device: str) -> Setting:
    def set_it(value: tuple[bool, torch.dtype]) -> None:
        torch.set_autocast_enabled(device, value[0])
        torch.set_autocast_dtype(device, value[1])

    return Setting(
        lambda: (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)), set_it
    )


def _gpu() -> int:
    return torch.cuda.current_device() if torch.cuda.is_initialized() else 0


def _set_gpu(index: int) -> None:
    if torch.cuda.is_initialized():
        torch.cuda.set_device(index)


def _set_inference(value: bool) -> None:
    guard = torch.inference_mode(value)
    guard.__enter__()
    _guards.append(guard)  # when it is collected, its mode ends


def _leave_modes(count: int) -> None:
    """Leave torch's function modes, such as `torch.device(...)`, that are still entered."""
    while _len_torch_function_stack() > count:
        _pop_mode()


def _working_directory() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it was removed
        return None


def _set_environment(values: dict[str, str]) -> None:
    zone = os.environ.get("TZ")
    for name in os.environ.keys() - values.keys():
        del os.environ[name]
    for name, value in values.items():
        if os.environ.get(name) != value:
            os.environ[name] = value
    if zone != os.environ.get("TZ"):
        time.tzset()


def _umask() -> int:
    value = os.umask(0o022)  # affects files that another thread creates now
    os.umask(value)
    return value


def _limit(number: int) -> Setting:
    """A soft limit of the process: open files, file size, memory."""
    return Setting(
        lambda: resource.getrlimit(number)[0],
        lambda soft: resource.setrlimit(number, (soft, resource.getrlimit(number)[1])),
        kept=False,
    )


def _stop_timers(before: list[bool]) -> None:
    """Stop new timers, whose signal would end the process; earlier ones are not restarted."""
    for timer, on in zip(_TIMERS, before):
        if not on:
            signal.setitimer(timer, 0)


def _set_filters(value: list[Any]) -> None:
    warnings.filters = list(value)
    with warnings.catch_warnings():
        pass  # on exit Python resets its record of shown warnings


def _set_handlers(value: dict[int, Any]) -> None:
    for number, handler in value.items():
        if handler is not None and signal.getsignal(number) is not handler:
            signal.signal(number, handler)


_UNTOUCHED: tuple[Any, ...] = (logging.NOTSET, False, True, [], [])
"""State of a logger that is not configured or does not exist."""


def _our_loggers() -> dict[str, logging.Logger]:
    """The program's loggers and the root; user code may configure other libraries' loggers."""
    known = list(logging.root.manager.loggerDict.items())
    named = {name: log for name, log in known if isinstance(log, logging.Logger)}
    ours = {name: log for name, log in named.items() if name.split(".")[0] in PACKAGES}
    return {**ours, "": logging.root}


def _loggers() -> dict[str, tuple[Any, ...]]:
    """State of the configured ones."""
    found = {
        name: (
            log.level,
            log.disabled,
            log.propagate,
            list(log.filters),
            [(each, each.level, list(each.filters)) for each in log.handlers],
        )
        for name, log in _our_loggers().items()
    }
    return {name: state for name, state in found.items() if state != _UNTOUCHED}


def _set_loggers(value: dict[str, tuple[Any, ...]]) -> None:
    for name, log in _our_loggers().items():
        level, disabled, propagate, filters, handlers = value.get(name, _UNTOUCHED)
        log.setLevel(level)
        log.disabled, log.propagate, log.filters[:] = disabled, propagate, filters
        log.handlers[:] = [handler for handler, _, _ in handlers]
        for handler, its_level, its_filters in handlers:
            handler.setLevel(its_level)
            handler.filters[:] = its_filters


_cuda = torch.backends.cuda
SETTINGS: dict[str, Setting] = {
    "torch dtype": Setting(torch.get_default_dtype, torch.set_default_dtype),
    "torch device": Setting(
        torch.get_default_device,
        lambda device: torch.set_default_device(None if device.type == "cpu" else device),
    ),
    "torch modes": Setting(_len_torch_function_stack, _leave_modes, kept=False),
    "torch threads": Setting(torch.get_num_threads, torch.set_num_threads),
    "torch gradients": Setting(torch.is_grad_enabled, torch.set_grad_enabled),
    "torch inference": Setting(torch.is_inference_mode_enabled, _set_inference, kept=False),
    "torch GPU": Setting(_gpu, _set_gpu),
    "torch anomalies": Setting(torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    "torch autocast, CPU": _autocast("cpu"),
    "torch autocast, CUDA": _autocast("cuda"),
    "torch determinism": Setting(
        lambda: (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        lambda on: torch.use_deterministic_algorithms(on[0], warn_only=on[1]),
    ),
    "torch unwritten memory": _flag(torch.utils.deterministic, "fill_uninitialized_memory"),
    "torch denormals": Setting(lambda: _SMALL * 0.5 == 0, torch.set_flush_denormal),
    "cudnn": _flag(torch.backends.cudnn, "enabled"),
    "cudnn benchmark": _flag(torch.backends.cudnn, "benchmark"),
    "cudnn determinism": _flag(torch.backends.cudnn, "deterministic"),
    "mkldnn": _flag(torch.backends.mkldnn, "enabled"),
    "flash attention": Setting(_cuda.flash_sdp_enabled, _cuda.enable_flash_sdp),
    "efficient attention": Setting(_cuda.mem_efficient_sdp_enabled, _cuda.enable_mem_efficient_sdp),
    "plain attention": Setting(_cuda.math_sdp_enabled, _cuda.enable_math_sdp),
    "cudnn attention": Setting(_cuda.cudnn_sdp_enabled, _cuda.enable_cudnn_sdp),
    "bf16 sums": _flag(_cuda.matmul, "allow_bf16_reduced_precision_reduction"),
    "fp16 sums": _flag(_cuda.matmul, "allow_fp16_reduced_precision_reduction"),
    # In this order: the old switch sets the new ones, a backend's sets its operations'.
    "matmul precision": Setting(
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision
    ),
    **{
        f"{name} fp32": _flag(owner, "fp32_precision")
        for name, owner in {
            "all": torch.backends,
            "cudnn": torch.backends.cudnn,
            "mkldnn": torch.backends.mkldnn,
            "cuda matmul": _cuda.matmul,
            "cudnn conv": torch.backends.cudnn.conv,  # type: ignore[attr-defined]
            "cudnn rnn": torch.backends.cudnn.rnn,
            "mkldnn matmul": torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]
            "mkldnn conv": torch.backends.mkldnn.conv,  # type: ignore[attr-defined]
            "mkldnn rnn": torch.backends.mkldnn.rnn,  # type: ignore[attr-defined]
        }.items()
    },
    "numpy errors": Setting(np.geterr, lambda value: np.seterr(**value)),
    "numpy error call": Setting(np.geterrcall, np.seterrcall),
    "warning filters": Setting(lambda: list(warnings.filters), _set_filters),
    "locale": Setting(
        lambda: locale.setlocale(locale.LC_ALL),
        lambda value: locale.setlocale(locale.LC_ALL, value),
    ),
    "working directory": Setting(_working_directory, lambda path: os.chdir(path or ".")),
    "environment": Setting(lambda: dict(os.environ), _set_environment),
    "import path": Setting(
        lambda: list(sys.path), lambda value: operator.setitem(sys.path, slice(None), value)
    ),
    "recursion limit": Setting(sys.getrecursionlimit, sys.setrecursionlimit),
    "garbage collection": Setting(
        gc.isenabled, lambda value: gc.enable() if value else gc.disable()
    ),
    "cores": Setting(lambda: os.sched_getaffinity(0), lambda value: os.sched_setaffinity(0, value)),
    "switch interval": Setting(sys.getswitchinterval, sys.setswitchinterval),
    "socket timeout": Setting(socket.getdefaulttimeout, socket.setdefaulttimeout),
    **{
        f"limit {name[7:]}": _limit(getattr(resource, name))
        for name in dir(resource)
        if name.startswith("RLIMIT_") and name != "RLIMIT_OFILE"  # NOFILE's other name
    },
    "file modes": Setting(_umask, os.umask, kept=False),
    "timers": Setting(
        lambda: [signal.getitimer(timer)[0] > 0 for timer in _TIMERS], _stop_timers, kept=False
    ),
    # settings of the run, undone but never applied again
    "warnings": _flag(warnings, "showwarning")._replace(kept=False),
    "stdout": _flag(sys, "stdout")._replace(kept=False),
    "stderr": _flag(sys, "stderr")._replace(kept=False),
    "excepthook": _flag(sys, "excepthook")._replace(kept=False),
    "thread excepthook": _flag(threading, "excepthook")._replace(kept=False),
    "logging off": _flag(logging.root.manager, "disable")._replace(kept=False),
    "loggers": Setting(_loggers, _set_loggers, kept=False),
}
"""Settings that user code may change for itself."""
SIGNALS = Setting(
    lambda: {number: signal.getsignal(number) for number in signal.valid_signals()},
    _set_handlers,
    kept=False,
)  # of the main thread only


class Isolation:
    """The settings of one user reward."""

    def __init__(self) -> None:
        self._theirs: dict[str, Any] = {}

    @contextmanager
    def __call__(self, seed: int) -> Iterator[None]:
        """Run the block with the user code's settings, then restore the process's.

        Args:
            seed: of Python's, numpy's and torch's global generators in the block, 0 to 2^32 - 1.
        """
        settings = dict(SETTINGS)
        if _in_main_thread():
            settings["signals"] = SIGNALS
        with _lock, _generators(seed):
            ours = {name: setting.get() for name, setting in settings.items()}
            found: dict[str, Any] = {}
            try:
                for name, value in self._theirs.items():
                    settings[name].set(value)
                yield
            finally:
                found = {name: _read(setting) for name, setting in settings.items()}
                if found != ours:
                    for name, value in ours.items():  # setting one may change another
                        _restore(name, settings[name], value)
                self._theirs = {
                    name: value
                    for name, value in found.items()
                    if settings[name].kept and value != ours[name] and value is not None
                }


def _read(setting: Setting) -> Any:
    try:
        return setting.get()
    except Exception:  # unreadable after the user code's change
        return None


def _restore(name: str, setting: Setting, value: Any) -> None:
    try:
        if _read(setting) != value:
            setting.set(value)
    except Exception as error:  # the others must still be restored
        logger.warning("a reward changed the process's %s for good: %s", name, describe(error))


@contextmanager
def _generators(seed: int) -> Iterator[None]:
    """Seed the global random generators for the block."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed takes a millisecond for GPUs
    if gpus:
        torch.cuda.manual_seed_all(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if gpus:
            torch.cuda.set_rng_state_all(gpus)


def of_the_user(error: BaseException) -> bool:
    """Whether an error is the user's Ctrl-C, raised in the main thread, not the user code's."""
    return isinstance(error, KeyboardInterrupt) and _in_main_thread()


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def describe(error: BaseException) -> str:
    """A user code's error as one printable line: type, message, file and line."""
    try:
        words = one_line(error)
    except BaseException as another:  # str() of an error is user code, too
        if of_the_user(another):
            raise
        words = f"(its message cannot be read: {type(another).__name__})"
    whole = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in whole if not _passes_on(frame.filename)]
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return printable(f"{type(error).__name__}: {words}{place}")


def _passes_on(file: str) -> bool:
    """Whether a file only calls or imports user code, so that an error is not located in it."""
    path = Path(file)
    return file.startswith("<frozen") or path.parent.name == "importlib" or path in _CALLERS


def one_line(words: Any) -> str:
    """A user code's message as one printable line of bounded length."""
    text = " ".join(str(words).split())
    text = text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]}..."
    return printable(text)
