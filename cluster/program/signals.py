"""Signals that end a program: SIGINT (Ctrl-C), SIGTERM (kill, scancel), SIGHUP (the terminal was
closed), SIGUSR1 and SIGUSR2 (Slurm's `--signal`, some time before the limit), SIGXCPU (a limit of
CPU time, some time before its end).

A run stops at a safe point; other commands are interrupted, as by Ctrl-C. Schedulers send such
signals to every process of a job: those of a private Ray are started with them blocked, and workers
leave them to the driver, so that the driver still has somebody to make the checkpoint with.
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
"""Those of which a second one ends the program at once. The others warn: they are often followed by
one of these, or come again by themselves."""
STOPPING = (*URGENT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
ONE_REQUEST_S = 0.2
"""Signals that come closer together are one request: `timeout` and shells send theirs twice."""
POLL_S = 0.1

Handler = Callable[[int, FrameType | None], Any]
logger = logging.getLogger(__name__)


class StopFlag:
    """Set by the first signal: the run then ends where nothing is lost. A second SIGINT or SIGTERM
    ends it at once, by a KeyboardInterrupt; while the run starts, where nothing can be lost, so
    does the first signal."""

    def __init__(self) -> None:
        self._asked = self._started = False
        self._insisted: float | None = None  # since when
        self._passed_on = False  # by a thread, which wakes the main one (`deferred_signals`)
        self.checkpoint = True
        """Whether the run is to write a checkpoint where it ends."""

    def __call__(self) -> bool:
        return self._asked

    def begin(self) -> None:
        """The fleet is there, and work begins that may be lost."""
        self._started = True

    def handle(self, number: int, frame: FrameType | None) -> None:
        """A signal's handler."""
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
        """What `python -m cluster.stop` does."""
        if not self._asked:
            self._asked, self.checkpoint = True, checkpoint
            how = "with" if checkpoint else "without"
            logger.info(f"asked to stop: stopping at the next safe point, {how} a checkpoint")


def ignore_signals() -> None:
    """From here on the program ends by itself, with its own status."""
    if threading.current_thread() is threading.main_thread():
        _install(dict.fromkeys(handled_signals(), signal.SIG_IGN))


def interrupt(number: int, frame: FrameType | None) -> None:
    """A handler: as Ctrl-C."""
    raise KeyboardInterrupt


def handled_signals() -> list[signal.Signals]:
    """All of them, but for a SIGHUP that is ignored: `nohup` wants it so."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [each for each in STOPPING if not (ignored and each is signal.SIGHUP)]


@contextmanager
def signal_handler(handler: Handler) -> Iterator[None]:
    """Have the signals handled while the block runs, if this is the main thread."""
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
        if handler is not None:  # one that is not Python's cannot be put back
            signal.signal(number, handler)


def _forward_signals(handlers: Mapping[signal.Signals, Any], ended: threading.Event) -> None:
    interrupted: float | None = None  # when
    while not ended.is_set():
        found = signal.sigtimedwait(list(handlers), POLL_S)
        if found is None or found.si_signo not in handlers:  # Python's, after an EINTR, is random
            continue
        number = signal.Signals(found.si_signo)
        if handlers[number] is signal.SIG_DFL:
            os._exit(128 + number)
        if interrupted is not None:
            if number in URGENT and time.monotonic() - interrupted > ONE_REQUEST_S:
                os._exit(128 + number)  # the main thread may be somewhere where it hears nothing
            continue
        try:
            if callable(handlers[number]):
                handlers[number](number, None)
        except KeyboardInterrupt:
            interrupted = time.monotonic()
            _thread.interrupt_main()


def ignoring_signals(factory: Callable[..., Any]) -> Callable[..., Any]:
    """The same role, in whose process the signals do nothing: its driver has them, too, and ends
    it. Processes that the role starts are ended by them as usual."""

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
    """Between fork and `_restore_defaults`, a signal would be lost on the child."""
    _before_fork.mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)


def _unblock() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _before_fork.mask)


def _restore_defaults() -> None:
    for number in STOPPING:
        usual = signal.default_int_handler if number is signal.SIGINT else signal.SIG_DFL
        signal.signal(number, usual)
    _unblock()
