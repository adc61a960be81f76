"""Findings before a run starts: problems that prevent it, and downloads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from cluster.errors import ConfigError, NotBuiltError, TesseraError

GB, MB = 1e9, 1e6


@dataclass(frozen=True, kw_only=True)
class Download:
    """A file that must be downloaded."""

    field: str
    """Configuration field that needs it."""
    name: str
    url: str
    size: float = 0.0
    """Bytes; 0: unknown."""
    command: str = ""
    """Command that downloads it; empty: the run does, where the file is needed."""

    def __str__(self) -> str:
        how = self.command or "fetched by the run itself"
        return f"{self.field}: {self.name}, {size_of(self.size)}, {self.url}; {how}"


@dataclass
class Findings:
    """Problems, downloads and notes, in the order of the checks."""

    problems: list[str] = field(default_factory=list)
    """Why the run cannot start: field, what was expected and found, what to do."""
    downloads: list[Download] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Allowed settings that are probably mistakes."""

    def problem(self, field: str, expected: str, found: str, remedy: str) -> None:
        self.problems.append(f"{field}: expected {expected}, found {found}: {remedy}")

    @contextmanager
    def of(self, field: str) -> Iterator[None]:
        """Record an error of the block as a problem of a field."""
        try:
            yield
        except NotBuiltError as error:  # of all fields that name one of the networks
            if str(error) not in self.problems:
                self.problems.append(str(error))
        except TesseraError as error:
            text = str(error) if str(error).startswith(field) else f"{field}: {error}"
            if text not in self.problems:  # a file that is needed twice is reported once
                self.problems.append(text)

    def enforce(self) -> None:
        """
        Raises:
            ConfigError: there are problems; lists all of them.
        """
        if self.problems:
            raise ConfigError("\n".join(self.refusal()))

    def refusal(self) -> list[str]:
        """The problems as lines; empty if there are none."""
        if not self.problems:
            return []
        count = len(self.problems)
        listed = [f"  {problem}" for problem in self.problems]
        return [f"the run cannot start, {count} problem{'s' * (count > 1)}:", *listed]

    def fetched(self, download: Download, *, offline: bool) -> None:
        """Record a file that the run downloads by itself."""
        self.downloads.append(download)
        if offline:
            self.problem(
                download.field,
                f"{download.name} in the cache of the Hugging Face hub",
                "none, and HF_HUB_OFFLINE forbids to fetch it",
                f"fetch {download.url} into the cache elsewhere, or unset HF_HUB_OFFLINE",
            )


def size_of(size: float) -> str:
    """A download size, for messages."""
    if not size:
        return "of unknown size"
    return f"about {size / GB:.2g} GB" if size >= GB / 10 else f"about {size / MB:.0f} MB"
