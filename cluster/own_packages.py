"""Makes sure that the four packages, whose names are common, are imported from one place.

Alone: the packages run this file by its path before they import anything (`check`), and so does the
command `tessera` (`import_own_packages`), since the name `cluster`
may belong to another package.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any

NAMES = ("actors", "cluster", "learner", "rewards")
REFUSED = 2  # exit status, as of other command lines that cannot be started


def check(package: str) -> None:
    """Check that all four packages come from the same folder.

    Args:
        package: the `__init__.py` of one of them.

    Raises:
        ImportError: names the file or folder that shadows a package.
        SystemExit: under `python -m`, after printing the same.
    """
    home = Path(package).resolve().parents[1]
    for name in NAMES:
        found = _location(name)
        if found is None or found == home / name:
            continue
        message = _two_copies(home, found) if _is_copy(found) else _hidden(name, found)
        if sys.argv and sys.argv[0] == "-m":  # `python -m` is still importing its module
            print(f"error: {message}", file=sys.stderr)
            raise SystemExit(REFUSED)
        raise ImportError(message)


class OwnPackageFinder:
    """Finder of the four packages in one folder; first in `sys.meta_path`."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [str(self.home)]) if name in NAMES else None


def import_own_packages(home: Path) -> bool:
    """Import the four packages from a folder from now on, whatever the module path has.

    Returns:
        Whether other modules with these names came first, on the path or already imported.
    """
    others = [name for name in NAMES if (at := _location(name)) and at != home / name]
    sys.meta_path.insert(0, OwnPackageFinder(home))
    for module in list(sys.modules):
        if module.partition(".")[0] in others:
            del sys.modules[module]
    return bool(others)


def _location(name: str) -> Path | None:
    """The folder or file that `import name` finds; None: nothing."""
    module = sys.modules.get(name)
    spec = getattr(module, "__spec__", None) if module is not None else find_spec(name)
    if spec is None:
        return None
    if spec.has_location and spec.origin:
        file = Path(spec.origin).resolve()
        return file.parent if file.stem == "__init__" else file
    folders = list(spec.submodule_search_locations or ())  # a folder without an __init__.py
    return Path(folders[0]).resolve() if folders else None


def _is_copy(found: Path) -> bool:
    """Whether it is another copy of this program."""
    return all((found.parent / name / "__init__.py").is_file() for name in NAMES)


def _two_copies(home: Path, found: Path) -> str:
    return (
        f"two copies of this program are mixed: packages are found in {home} and in "
        f"{found.parent}; take one off PYTHONPATH, or start in another directory"
    )


def _hidden(name: str, found: Path) -> str:
    try:
        shown = f"./{found.relative_to(Path.cwd())}"
    except (ValueError, OSError):  # not below it, or there is none
        shown = str(found)
    what = "folder" if found.is_dir() else "file"
    return (
        f"the {what} {shown} hides this program's package {name!r}: rename {shown}, or use the "
        "command `tessera`, which does not mind"
    )
