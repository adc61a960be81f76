"""Damaged files for readers, which must give a clear error or the last good state.

Every case is a function of its number, so that a failure can be repeated by its number alone.
"""

from __future__ import annotations

import random
import signal
import struct
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from cluster.errors import TesseraError

LONGEST = 20.0  # seconds for one case
OTHER_KINDS = (
    b"",
    b"<!DOCTYPE html><html><body>Not found</body></html>",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    b"\x1f\x8b\x08\x00junk",
    b"PK\x05\x06" + bytes(18),
    b"\x80\x04]\x94.",
    b"\x89PNG\r\n\x1a\n\x00\x00",
    b"{}",
    b"\x00" * 64,
)


class HungError(AssertionError):
    """A reader that did not return in time."""


def damage(data: bytes, case: int) -> bytes:
    """Other bytes than `data` (which is not empty), by the number of the case."""
    draw = random.Random(case)
    kind = draw.choice(
        [
            "flip",
            "flip",
            "flip",
            "cut",
            "overwrite",
            "insert",
            "drop",
            "zero",
            "swap",
            "repeat",
            "length",
            "other",
        ]
    )
    at = draw.randrange(min(len(data), 400) if draw.random() < 0.5 else len(data))
    span = draw.randrange(1, 16)
    if kind == "flip":
        changed = data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :]
    elif kind == "cut":
        changed = data[:at]
    elif kind == "overwrite":
        changed = data[:at] + draw.randbytes(span) + data[at + span :]
    elif kind == "insert":
        changed = data[:at] + draw.randbytes(span) + data[at:]
    elif kind == "drop":
        changed = data[:at] + data[at + span :]
    elif kind == "zero":  # a hole, as a crashed download leaves it
        hole = draw.randrange(1, 4096)
        changed = data[:at] + bytes(min(hole, len(data) - at)) + data[at + hole :]
    elif kind == "swap":
        changed = data[at:] + data[:at]
    elif kind == "repeat":
        changed = data[: at + span] + data[at:]
    elif kind == "length":  # a size that no file has
        width = draw.choice(("<I", "<Q", ">I"))
        huge = draw.choice((0, (1 << 31) - 1, (1 << 32) - 1))
        changed = data[:at] + struct.pack(width, huge) + data[at + struct.calcsize(width) :]
    else:
        changed = draw.choice(OTHER_KINDS)
    return changed if changed != data else data[:-1]


def check_reader(
    path: Path,
    read: Callable[[Path], object],
    cases: int,
    *,
    first: int = 0,
    good: Callable[[object], bool] = lambda _: True,
    errors: tuple[type[BaseException], ...] = (TesseraError,),
) -> None:
    """Damage the file in `cases` ways, and read each; the file is restored afterwards.

    Args:
        read: what is tested; it must raise one of `errors`, or return something `good`.
        first: number of the first case; a failure names its number.
        good: whether what was read is right. Most damage to numbers cannot be noticed without a
            checksum; what a reader returned must then at least be well-formed.

    Raises:
        AssertionError: names the case: another library's exception, a hang, an error without a
            message, or something returned that is not good.
    """
    whole = path.read_bytes()
    try:
        for case in range(first, first + cases):
            path.write_bytes(damage(whole, case))
            _check_one(path, read, good, errors, case)
    finally:
        path.write_bytes(whole)


def damaged(data: bytes, count: int, seed: int = 0) -> Iterator[tuple[int, bytes]]:
    """`count` damaged copies, each with its number, for readers that take bytes."""
    for case in range(seed, seed + count):
        yield case, damage(data, case)


def _check_one(
    path: Path,
    read: Callable[[Path], object],
    good: Callable[[object], bool],
    errors: tuple[type[BaseException], ...],
    case: int,
) -> None:
    def too_long(_signal: int, frame: FrameType | None) -> None:
        raise HungError(f"case {case}: {LONGEST:g} s\n{''.join(traceback.format_stack(frame))}")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, LONGEST)
    started = time.monotonic()
    try:
        found = read(path)
    except errors as error:
        if not str(error).strip():
            raise AssertionError(f"case {case}: an error without a message") from error
    except HungError:
        raise
    except Exception as error:
        raise AssertionError(f"case {case}: {type(error).__name__}: {error}") from error
    else:
        assert good(found), f"case {case}: read something wrong: {found!r:.200}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - started < LONGEST, f"case {case}: too long"
