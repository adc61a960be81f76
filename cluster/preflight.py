"""What is found before a run starts: problems that would stop it, files that would be fetched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from cluster.errors import ConfigError, TesseraError

GB, MB = 1e9, 1e6


@dataclass(frozen=True, kw_only=True)
class Download:
    """A file that is not there yet."""

    field: str
    """Of the configuration, which asks for it."""
    name: str
    url: str
    size: float = 0.0
    """Bytes, as far as they are known; 0 is unknown."""
    command: str = ""
    """What fetches it; empty: the run does so by itself, where it is needed."""

    def __str__(self) -> str:
        how = self.command or "fetched by the run itself"
        return f"{self.field}: {self.name}, {size_of(self.size)}, {self.url}; {how}"


@dataclass
class Findings:
    """Everything that was found; the order is that of the checks."""

    problems: list[str] = field(default_factory=list)
    """Why the run could not start: field, what is expected, what was found, what to do."""
    downloads: list[Download] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What is allowed, and most likely not meant."""

    def problem(self, field: str, expected: str, found: str, remedy: str) -> None:
        self.problems.append(f"{field}: expected {expected}, found {found}: {remedy}")

    @contextmanager
    def of(self, field: str) -> Iterator[None]:
        """What the block raises is a problem of a field."""
        try:
            yield
        except TesseraError as error:
            text = str(error) if str(error).startswith(field) else f"{field}: {error}"
            if text not in self.problems:  # a file that is needed twice is missing once
                self.problems.append(text)

    def enforce(self) -> None:
        """
        Raises:
            ConfigError: there are problems; lists all of them.
        """
        if self.problems:
            raise ConfigError("\n".join(self.refusal()))

    def refusal(self) -> list[str]:
        """The problems, in lines; nothing where there are none."""
        if not self.problems:
            return []
        count = len(self.problems)
        listed = [f"  {problem}" for problem in self.problems]
        return [f"the run cannot start, {count} problem{'s' * (count > 1)}:", *listed]

    def fetched(self, download: Download, *, offline: bool) -> None:
        """A file that the run would fetch by itself, where it may."""
        self.downloads.append(download)
        if offline:
            self.problem(
                download.field,
                f"{download.name} in the cache of the Hugging Face hub",
                "none, and HF_HUB_OFFLINE forbids to fetch it",
                f"fetch {download.url} into the cache elsewhere, or unset HF_HUB_OFFLINE",
            )


def size_of(size: float) -> str:
    """Bytes as they are told."""
    if not size:
        return "of unknown size"
    return f"about {size / GB:.2g} GB" if size >= GB / 10 else f"about {size / MB:.0f} MB"
