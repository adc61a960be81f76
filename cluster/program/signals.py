"""Signals that stop a program: SIGINT (Ctrl-C), SIGTERM (kill, scancel), SIGHUP (terminal closed),
SIGUSR1 and SIGUSR2 (Slurm's `--signal`, before the time limit), SIGXCPU (before the CPU limit).

A run stops at a safe point; other commands are interrupted, as by Ctrl-C. Schedulers send these
signals to every process of a job, so workers ignore them and a private Ray starts with them
blocked: the driver needs its workers for the last checkpoint.
"""

from __future__ import annotations

import _thread
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

URGENT = (signal.SIGINT, signal.SIGTERM)
"""A second one of these ends the program at once. The others are warnings, which schedulers may
repeat."""
STOPPING = (*URGENT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
ONE_REQUEST_S = 0.2
"""Signals closer together count as one: `timeout` and shells send theirs twice."""
POLL_S = 0.1

Handler = Callable[[int, FrameType | None], Any]
logger = logging.getLogger(__name__)


class StopFlag:
    """Set by the first signal; the run then ends at the next safe point. A second SIGINT or SIGTERM
    ends it at once, by a KeyboardInterrupt, and so does any signal while the run starts."""

    def __init__(self) -> None:
        self._asked = self._started = False
        self._insisted: float | None = None  # since when
        self._passed_on = False  # by a thread, which wakes the main one (`deferred_signals`)
        self.checkpoint = True
        """Whether to write a checkpoint at the end."""

    def __call__(self) -> bool:
        return self._asked

    def begin(self) -> None:
        """The fleet has started: from now on, stop at safe points only."""
        self._started = True

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Signal handler."""
        now, first, insisted = time.monotonic(), not self._asked, self._insisted
        self._asked = True
        if insisted is None and (number in URGENT or not self._started):
            self._insisted = now
        name = signal.Signals(number).name
        why = "" if number == signal.SIGINT else f"{name}: "
        main = threading.current_thread() is threading.main_thread()
        if first and not self._started:
            logger.info(f"{why}stopping")
            self._passed_on = not main
            raise KeyboardInterrupt
        if self._passed_on and main:
            self._passed_on = False
            raise KeyboardInterrupt
        if first or (number in URGENT and insisted is None):
            more = "; once more to stop at once" if number in URGENT else ""
            logger.info(f"{why}stopping at the next safe point{more}")
        elif number in URGENT and insisted is not None and now - insisted > ONE_REQUEST_S:
            raise KeyboardInterrupt

    def ask(self, checkpoint: bool) -> None:
        """Stop, as `python -m cluster.stop` requests it."""
        if not self._asked:
            self._asked, self.checkpoint = True, checkpoint
            how = "with" if checkpoint else "without"
            logger.info(f"asked to stop: stopping at the next safe point, {how} a checkpoint")


def ignore_signals() -> None:
    """Ignore the signals from now on: the program is ending."""
    if threading.current_thread() is threading.main_thread():
        _install(dict.fromkeys(handled_signals(), signal.SIG_IGN))


def interrupt(number: int, frame: FrameType | None) -> None:
    """Signal handler that acts as Ctrl-C."""
    raise KeyboardInterrupt


def handled_signals() -> list[signal.Signals]:
    """All of STOPPING, except a SIGHUP that `nohup` ignores."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [each for each in STOPPING if not (ignored and each is signal.SIGHUP)]


@contextmanager
def signal_handler(handler: Handler) -> Iterator[None]:
    """Install a handler while the block runs; only in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in handled_signals()}
    try:
        yield
    finally:
        _install(before)


@contextmanager
def deferred_signals() -> Iterator[None]:
    """For a block whose code installs handlers of its own, such as `ray.init`: the signals go on to
    the handlers from before, which are there again at its end. Meanwhile they are blocked: also in
    all threads and processes that the block starts, for good."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in handled_signals()}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, handlers)
    ended = threading.Event()
    watch = threading.Thread(
        target=_forward_signals, args=(handlers, ended), name="signals", daemon=True
    )
    watch.start()
    try:
        yield
    finally:
        _install(handlers)
        ended.set()
        watch.join()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _install(handlers: Mapping[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        if handler is not None:  # None: not Python's, cannot be restored
            signal.signal(number, handler)


def _forward_signals(handlers: Mapping[signal.Signals, Any], ended: threading.Event) -> None:
    interrupted: float | None = None  # when
    while not ended.is_set():
        found = signal.sigtimedwait(list(handlers), POLL_S)
        if found is None or found.si_signo not in handlers:  # random after an EINTR
            continue
        number = signal.Signals(found.si_signo)
        if handlers[number] is signal.SIG_DFL:
            os._exit(128 + number)
        if interrupted is not None:
            if number in URGENT and time.monotonic() - interrupted > ONE_REQUEST_S:
                os._exit(128 + number)  # the main thread may be blocked
            continue
        try:
            if callable(handlers[number]):
                handlers[number](number, None)
        except KeyboardInterrupt:
            interrupted = time.monotonic()
            _thread.interrupt_main()


def ignoring_signals(factory: Callable[..., Any]) -> Callable[..., Any]:
    """A role class whose process ignores the signals, since its driver handles them. Processes that
    the role starts handle them as usual."""

    class Shielded(factory):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            _shield()
            super().__init__(*args, **kwargs)

    Shielded.__name__ = Shielded.__qualname__ = getattr(factory, "__name__", "Shielded")
    return Shielded


def _shield() -> None:
    if threading.current_thread() is not threading.main_thread():
        return
    for number in STOPPING:  # SIG_IGN, or a blocked signal, would be inherited
        signal.signal(number, _ignore_signal)
    os.register_at_fork(before=_block, after_in_parent=_unblock, after_in_child=_restore_defaults)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


def _ignore_signal(number: int, frame: FrameType | None) -> None:
    pass


_before_fork = threading.local()


def _block() -> None:
    """Before a fork: between it and `_restore_defaults` the child would lose a signal."""
    _before_fork.mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)


def _unblock() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _before_fork.mask)


def _restore_defaults() -> None:
    for number in STOPPING:
        usual = signal.default_int_handler if number is signal.SIGINT else signal.SIG_DFL
        signal.signal(number, usual)
    _unblock()
