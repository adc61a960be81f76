"""starts.jsonl of a run directory: one line for each start or resume, one for each end.

A start that no end follows is that of an active run, or of one that was killed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from cluster.clock import epoch
from cluster.io.files import writing
from cluster.io.run_layout import STARTS
from cluster.io.strict_json import MALFORMED, dumps

EVENT, START, END = "event", "start", "end"
HOW = "how"
"""Of an end: an `Ending`."""
Ending = Literal["finished", "stopped", "failed"]


def append_event(directory: Path, event: str, content: Mapping[str, Any]) -> None:
    """Append a line, with the time now.

    Args:
        event: START or END.

    Raises:
        StorageError: it cannot be written.
    """
    now = datetime.fromtimestamp(epoch(), UTC).isoformat(timespec="seconds")
    path = directory / STARTS
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write(dumps({EVENT: event, "time": now, **content}) + "\n")


def read_events(directory: Path) -> list[dict[str, Any]]:
    """Starts and ends, oldest first; none for runs of versions that did not record them. Lines that
    a crash cut short are left out."""
    try:
        lines = (directory / STARTS).read_bytes().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            event = json.loads(line)
        except MALFORMED:
            continue
        if isinstance(event, dict) and event.get(EVENT) in (START, END):
            found.append(event)
    return found


def last_ending(directory: Path) -> str | None:
    """How the newest start ended: an `Ending`; empty: it did not (it is active, or was killed);
    None: not recorded."""
    events = read_events(directory)
    if not events:
        return None
    return str(events[-1].get(HOW, "")) if events[-1][EVENT] == END else ""
