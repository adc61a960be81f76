"""Reference moments of real images: built from a set of images, or fetched where published."""

from __future__ import annotations

import sys

from rewards.distribution.reference import (
    Reference,
    StoredReference,
    read_reference,
    read_stored,
    write_reference,
)

__all__ = [
    "Reference",
    "StoredReference",
    "main",
    "read_reference",
    "read_stored",
    "write_reference",
]


def main(arguments: list[str] | None = None) -> int:
    """The command `python -m rewards.reference`; returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["fetch"]:
        from rewards.reference.fetch import run as fetch

        return fetch(list(given[1:]))
    from rewards.reference.build import run

    return run(arguments)
