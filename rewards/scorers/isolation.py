"""Runs users' code (their rewards) so that its changes of process-wide settings stay its own.

Such settings are torch's default dtype and threads, random generators, warning filters, the working
directory. In the inline fleet all roles share them; on Ray all scorers of a server do. `Isolation`
keeps a set of them for each piece of user code: it is in force during its calls alone.
"""

from __future__ import annotations

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

TOLD = 500  # characters of a foreign error's own words
_OURS = ("scorers/isolation.py", "scorers/user_rewards.py", "servers/panel.py")
_CALLERS = {Path(__file__).parents[1] / name for name in _OURS}
_SMALL = 1e-310  # denormal
_guards: list[Any] = []  # of inference modes
_TIMERS = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)
_lock = threading.RLock()  # two that are inside at once would restore each other's settings


class Setting(NamedTuple):
    """One thing that a process has once."""

    get: Callable[[], Any]
    set: Callable[[Any], Any]
    kept: bool = True
    """Whether user code finds again what it set; else it is only undone."""


def _flag(owner: Any, name: str) -> Setting:
    return Setting(lambda: getattr(owner, name), lambda value: setattr(owner, name, value))


def _set_device(device: torch.device) -> None:
    torch.set_default_device(None if device.type == "cpu" else device)


def _set_deterministic(value: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(value[0], warn_only=value[1])


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
    """Of torch's function modes, such as `torch.device(...)`, those that were entered and not
    left."""
    while _len_torch_function_stack() > count:
        _pop_mode()


def _flushes_denormals() -> bool:
    return _SMALL * 0.5 == 0


def _working_directory() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it was removed
        return None


def _enter_directory(path: str | None) -> None:
    if path is not None:
        os.chdir(path)


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
    value = os.umask(0o022)  # of what another thread creates at this moment
    os.umask(value)
    return value


def _limit(number: int) -> Setting:
    """A soft limit of the system's: of open files, of a file's size, of memory."""
    return Setting(
        lambda: resource.getrlimit(number)[0],
        lambda soft: resource.setrlimit(number, (soft, resource.getrlimit(number)[1])),
        kept=False,
    )


def _timers() -> list[bool]:
    return [signal.getitimer(each)[0] > 0 for each in _TIMERS]


def _stop_timers(before: list[bool]) -> None:
    """A timer that goes off later would end the process; one that was there is not started anew."""
    for timer, on in zip(_TIMERS, before):
        if not on:
            signal.setitimer(timer, 0)


def _set_filters(value: list[Any]) -> None:
    warnings.filters = list(value)
    with warnings.catch_warnings():
        pass  # leaving it makes Python forget which warnings it has shown, as it must


def _set_path(value: list[str]) -> None:
    sys.path[:] = value


def _handlers() -> dict[int, Any]:
    return {number: signal.getsignal(number) for number in signal.valid_signals()}


def _set_handlers(value: dict[int, Any]) -> None:
    for number, handler in value.items():
        if handler is not None and signal.getsignal(number) is not handler:
            signal.signal(number, handler)


_UNTOUCHED: tuple[Any, ...] = (logging.NOTSET, False, True, [], [])
"""State of a logger that nobody has set, or that is not there yet."""


def _our_loggers() -> dict[str, logging.Logger]:
    """Ours alone, and the root: whoever quietens another library means it."""
    known = list(logging.root.manager.loggerDict.items())
    named = {name: log for name, log in known if isinstance(log, logging.Logger)}
    ours = {name: log for name, log in named.items() if name.split(".")[0] in PACKAGES}
    return {**ours, "": logging.root}


def _loggers() -> dict[str, tuple[Any, ...]]:
    """State of those that are not untouched."""
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
    "torch device": Setting(torch.get_default_device, _set_device),
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
        _set_deterministic,
    ),
    "torch denormals": Setting(_flushes_denormals, torch.set_flush_denormal),
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
    # The old switch sets the new ones, and a backend's sets its operations': the first come first.
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
    "working directory": Setting(_working_directory, _enter_directory),
    "environment": Setting(lambda: dict(os.environ), _set_environment),
    "import path": Setting(lambda: list(sys.path), _set_path),
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
    "timers": Setting(_timers, _stop_timers, kept=False),
    # these belong to the run, also while user code computes
    "warnings": _flag(warnings, "showwarning")._replace(kept=False),
    "stdout": _flag(sys, "stdout")._replace(kept=False),
    "stderr": _flag(sys, "stderr")._replace(kept=False),
    "excepthook": _flag(sys, "excepthook")._replace(kept=False),
    "thread excepthook": _flag(threading, "excepthook")._replace(kept=False),
    "logging off": _flag(logging.root.manager, "disable")._replace(kept=False),
    "loggers": Setting(_loggers, _set_loggers, kept=False),
}
"""What user code may set, and gets for itself."""
SIGNALS = Setting(_handlers, _set_handlers, kept=False)  # the main thread's alone


class Isolation:
    """The settings that one piece of user code sees."""

    def __init__(self) -> None:
        self._theirs: dict[str, Any] = {}

    @contextmanager
    def __call__(self, seed: int) -> Iterator[None]:
        """Run the block with the user code's settings, then put back everyone else's.

        Args:
            seed: of the global generators (Python's, numpy's, torch's) in the block: 0 to 2^32 - 1.
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
                    for name, value in ours.items():  # one may have moved another: look again
                        _restore(name, settings[name], value)
                self._theirs = {
                    name: value
                    for name, value in found.items()
                    if settings[name].kept and value != ours[name] and value is not None
                }


def _read(setting: Setting) -> Any:
    try:
        return setting.get()
    except Exception:  # it was put into a state in which nobody can tell
        return None


def _restore(name: str, setting: Setting, value: Any) -> None:
    try:
        if _read(setting) != value:
            setting.set(value)
    except Exception as error:  # the others must be put back all the same
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
    """Whether an error that came out of user code is the user's Ctrl-C, which Python raises in
    the main thread. All others, SystemExit and its like included, are the user code's own."""
    return isinstance(error, KeyboardInterrupt) and _in_main_thread()


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def describe(error: BaseException) -> str:
    """A foreign error in one line that any file can hold: its kind, its words, and where in
    somebody's file it came from, since whoever reads it sees no traceback."""
    try:
        words = one_line(error)
    except BaseException as another:  # foreign as well
        if of_the_user(another):
            raise
        words = f"(its message cannot be read: {type(another).__name__})"
    whole = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in whole if not _passes_on(frame.filename)]
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return printable(f"{type(error).__name__}: {words}{place}")


def _passes_on(file: str) -> bool:
    """Whether code of a file calls user code, or imports it: no place of an error."""
    path = Path(file)
    return file.startswith("<frozen") or path.parent.name == "importlib" or path in _CALLERS


def one_line(words: Any) -> str:
    """Foreign words as one line of bounded length, which any file can hold."""
    text = " ".join(str(words).split())
    text = text if len(text) <= TOLD else f"{text[:TOLD]}..."
    return printable(text)
