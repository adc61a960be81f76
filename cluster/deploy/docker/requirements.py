"""Prints the dependencies of a pyproject.toml, one a line: those of the project, and of extras."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path


def requirements(text: str, extras: list[str]) -> list[str]:
    """Raises KeyError for an extra that is not there."""
    project = tomllib.loads(text)["project"]
    found = list(project["dependencies"])
    for extra in extras:
        found += project["optional-dependencies"][extra]
    return found


if __name__ == "__main__":
    file, names = sys.argv[1:]
    print("\n".join(requirements(Path(file).read_text(), [n for n in names.split(",") if n])))
