"""Workers that end with the process that started them.

Ray's workers look whether the process id of their node's process exists. They outlive one that
ended but is not reaped, as in a container whose first process is no init, and hold their GPU's
memory beside the workers of the node that is started next.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any

LOOK_S = 1.0
ORPHANED = 1  # exit status


def ending_with_parent(factory: Callable[..., Any]) -> Callable[..., Any]:
    """A role class whose process ends within seconds after its parent."""

    class Attended(factory):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            watch_parent(os.getppid())
            super().__init__(*args, **kwargs)

    Attended.__name__ = Attended.__qualname__ = getattr(factory, "__name__", "Attended")
    return Attended


def watch_parent(parent: int) -> None:
    """End this process once `parent`, a process id, is not its parent any more."""

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_S)
        os._exit(ORPHANED)

    threading.Thread(target=look, name="parent", daemon=True).start()
