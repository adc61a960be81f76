"""User rewards in a file, whose text is stored in the run's configuration.

The file is read once, when a run begins; reward servers on other machines and `--resume` use the
stored text. It is imported under a private name, so any file name works (also `rewards.py`), and
without its neighbours: its imports must be installed or be in the directory the run started from.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.abc import ExecutionLoader
from pathlib import Path
from types import ModuleType

from cluster.errors import ConfigError
from cluster.io.files import MIB
from cluster.io.paths import expand_user

PREFIX = "tessera_reward_"
LARGEST = MIB  # of a file, which every checkpoint contains


@dataclass(frozen=True, kw_only=True)
class RewardFile:
    """A file of rewards as it was when the run began."""

    path: str
    """Absolute; for messages and `__file__`."""
    sha256: str
    """Of the text."""
    text: str

    def __post_init__(self) -> None:
        if digest(self.text) != self.sha256:
            raise ValueError(f"the kept text of {self.path} is damaged, or was changed")

    @property
    def module(self) -> str:
        """Its import name."""
        return f"{PREFIX}{self.sha256[:16]}"


class _Loader(ExecutionLoader):
    """Imports a text; tracebacks and `inspect` find its lines without the file."""

    def __init__(self, file: RewardFile) -> None:
        self._file = file

    def get_filename(self, fullname: str) -> str:
        return self._file.path

    def get_source(self, fullname: str) -> str:
        return self._file.text

    def is_package(self, fullname: str) -> bool:
        return False


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def read_file(name: str) -> RewardFile:
    """Read a file of rewards named in `rewards.extra`.

    Raises:
        ConfigError: no such file, not Python, or too large.
    """
    path = expand_user(name).absolute()
    what = f"rewards.extra: {name}"
    if not path.is_file():
        found = "a directory" if path.is_dir() else "no such file"
        raise ConfigError(f"{what} is to be a Python file, found {found} ({path})")
    try:
        data = path.read_bytes()
        if len(data) > LARGEST:
            raise ConfigError(
                f"{what} has {len(data) / MIB:.1f} MiB, and at most {LARGEST / MIB:g} are kept "
                "with a run: install it as a package, and name it by its dotted path"
            )
        text = importlib.util.decode_source(data)
        compile(text, str(path), "exec", dont_inherit=True)
        return RewardFile(path=str(path), sha256=digest(text), text=text)
    except SyntaxError as error:
        place = f" (line {error.lineno})" if error.lineno else ""
        raise ConfigError(f"{what} is no Python: {error.msg}{place}") from None
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(f"{what} cannot be read: {error}") from error


def changed_since(files: Mapping[str, RewardFile]) -> list[str]:
    """A line for each file that changed since the run began."""
    lines = []
    for name, kept in files.items():
        try:
            now = importlib.util.decode_source(Path(kept.path).read_bytes())
        except (OSError, ValueError, SyntaxError):  # removed
            continue
        if digest(now) != kept.sha256:
            lines.append(
                f"{name} has changed since the run began, which continues with its first text (in "
                "config.yaml); to use the new text, start a new run"
            )
    return lines


def import_file(file: RewardFile) -> ModuleType:
    """The file as a module, run once in a process.

    Raises:
        BaseException: raised by the file.
    """
    if file.module in sys.modules:
        return sys.modules[file.module]
    spec = importlib.util.spec_from_loader(file.module, _Loader(file))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.module] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(file.module, None)
        raise
    return module
