"""A folder of images: the walk through it, and its images by number."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cluster.errors import DataError
from cluster.file_kinds import FileKind, file_kind
from cluster.streams import shown
from rewards.class_labels import ClassLabels, class_numbers
from rewards.image_files import SUFFIXES, Loaded, decode, digest

JUNK = frozenset(("thumbs.db", "desktop.ini", "__macosx", "@eadir", "lost+found", "$recycle.bin"))
"""What systems leave in folders; never data, like everything whose name begins with a dot."""
RAW = (".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw")
"""A camera's: begin as a TIFF, and what Pillow finds in them is a thumbnail."""
PACKED = (FileKind.TAR, FileKind.ZIP, FileKind.GZIP, FileKind.ARCHIVE, FileKind.CUT_ZIP)
NAMED = 5  # files that are named in a message


@dataclass
class FolderContents:
    """What lies in and below a folder; names are relative to it, with slashes."""

    images: dict[str, int] = field(default_factory=dict)
    """Name and size in bytes; -1 where it cannot be told. Sorted by name."""
    parquet: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """Each with the reason, in brackets."""
    folders: list[str] = field(default_factory=list)
    """Right below, empty ones too."""

    def remark(self) -> tuple[str, ...]:
        """A line about what was left out, if anything was."""
        if not self.left_out:
            return ()
        return (f"left out {len(self.left_out)}: {shortened(self.left_out)}",)


def shortened(names: list[str]) -> str:
    """The first few names."""
    more = ", ..." if len(names) > NAMED else ""
    return ", ".join(map(shown, names[:NAMED])) + more


def walk(root: Path) -> FolderContents:
    """Everything in and below a folder, links followed, each real file and folder once.

    Real files come before links to them, whatever their names are. A link to a folder that it lies
    in leads nowhere. Pipes, sockets and devices are not opened.

    Raises:
        DataError: a folder below cannot be listed.
    """
    return _Walk(root).contents


class _Walk:
    def __init__(self, root: Path) -> None:
        self._root = root
        self.contents = FolderContents()
        real = os.path.realpath(root)
        self._folders = {real: "."}  # real path -> the name it was found under
        self._files: dict[str, str] = {}  # real path -> the name it was found under
        self._inodes: dict[tuple[int, int], str] = {}
        self._links: list[tuple[str, str]] = []
        self._down("", real)
        while self._links:  # after everything that is no link; those below linked folders last
            links, self._links = sorted(self._links), []
            for name, real in links:
                self._follow(name, real)
        contents = self.contents
        contents.images = dict(sorted(contents.images.items()))
        contents.folders.sort()
        contents.left_out.sort()

    def _down(self, name: str, real: str) -> None:
        """A real folder, and those below it."""
        stack = [(name, real)]
        while stack:
            name, real = stack.pop()
            for entry in self._listed(name):
                inside = f"{name}/{entry.name}" if name else entry.name
                place = os.path.join(real, entry.name)
                folder = _is_folder(entry)
                if self._hidden(entry.name, inside, folder):
                    continue
                if entry.is_symlink():
                    self._links.append((inside, place))
                elif folder:
                    if self._enter(inside, place):
                        stack.append((inside, place))
                else:
                    self._file(inside, place)

    def _listed(self, name: str) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(self._root / name) as found:
                return sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(
                f"{shown(self._root / name)}: the folder cannot be listed ({error.strerror}), "
                "so nobody knows what is in it: make it readable, or move it away"
            ) from error

    def _hidden(self, name: str, inside: str, folder: bool) -> bool:
        if not name.startswith(".") and name.lower() not in JUNK:
            return False
        if folder:
            self.contents.left_out.append(f"{inside}/ (hidden)")
        elif _suffix(name) in SUFFIXES and not name.startswith("._"):
            self.contents.left_out.append(f"{inside} (hidden)")
        return True

    def _enter(self, name: str, real: str) -> bool:
        """Take in a folder, unless it was before."""
        if real in self._folders:
            self.contents.left_out.append(f"{name}/ (the same folder as {self._folders[real]})")
            return False
        self._folders[real] = name
        if "/" not in name:
            self.contents.folders.append(name)
        return True

    def _follow(self, name: str, place: str) -> None:
        real = os.path.realpath(place)
        try:
            found = os.stat(place)
        except OSError as error:
            if _suffix(name) in SUFFIXES:
                self.contents.images[name] = -1  # reading it says what is wrong
            else:
                self.contents.left_out.append(f"{name} (a dangling link: {error.strerror})")
            return
        if not stat.S_ISDIR(found.st_mode):
            self._file(name, real)
        elif os.path.dirname(place).startswith(os.path.join(real, "")):
            self.contents.left_out.append(f"{name}/ (a link to a folder that it lies in)")
        elif self._enter(name, real):
            self._down(name, real)

    def _file(self, name: str, real: str) -> None:
        contents, suffix = self.contents, _suffix(name)
        try:
            found = os.lstat(real)
        except OSError:  # it went away, or its file system did
            contents.images[name] = -1
            return
        if not stat.S_ISREG(found.st_mode):
            contents.left_out.append(f"{name} (no regular file)")
            return
        if real in self._files:
            contents.left_out.append(f"{name} (the same file as {self._files[real]})")
            return
        inode = found.st_dev, found.st_ino
        if found.st_nlink > 1 and found.st_ino:
            if inode in self._inodes:
                contents.left_out.append(f"{name} (the same file as {self._inodes[inode]})")
                return
            self._inodes[inode] = name
        self._files[real] = name
        if suffix in SUFFIXES:
            contents.images[name] = found.st_size
        elif suffix == ".parquet":
            contents.parquet.append(name)
        else:
            self._by_content(name, found.st_size)

    def _by_content(self, name: str, size: int) -> None:
        """A file whose name does not say that it is an image."""
        try:
            kind = file_kind(self._root / name)
        except OSError as error:
            self.contents.left_out.append(f"{name} (cannot be read: {error.strerror})")
            return
        if kind is FileKind.IMAGE and _suffix(name) in RAW:
            self.contents.left_out.append(f"{name} (a camera's raw file)")
        elif kind is FileKind.IMAGE:
            self.contents.images[name] = size
        elif kind is FileKind.PARQUET:
            self.contents.parquet.append(name)
        else:
            self.contents.left_out.append(f"{name} ({kind.value})")


class FolderImages:
    """Every image file below a folder, in the order of the paths; folders right below are classes
    (`rewards.class_labels`), empty ones too."""

    def __init__(self, root: Path, contents: FolderContents | None = None) -> None:
        """
        Raises:
            DataError: no image below the folder.
        """
        contents = walk(root) if contents is None else contents
        self._root, self._folders = root, contents.folders
        self._names = list(contents.images)
        self.remarks = contents.remark()
        if not self._names:
            raise DataError(f"{shown(root)}: no images in it or below{_instead(contents)}")
        lines = (f"{name} {size}" for name, size in contents.images.items())
        self.fingerprint = digest(os.fsencode("\n".join(lines)))

    def __len__(self) -> int:
        return len(self._names)

    def read(self, start: int, stop: int) -> Iterator[Loaded]:
        for name in self._names[start:stop]:
            yield decode(str(self._root / name), self._root / name)

    def classes(self, names: tuple[str, ...] = ()) -> ClassLabels:
        folders = [name.partition("/")[0] if "/" in name else "" for name in self._names]
        root = shown(self._root)
        if "" in folders:
            stray = shown(self._names[folders.index("")])
            raise DataError(
                f"{root}: classes are the folders right below it, but {stray} is in none"
            )
        numbers, known = class_numbers(self._folders, root, names)
        return ClassLabels(np.array([numbers[folder] for folder in folders], np.int64), known)


def _instead(contents: FolderContents) -> str:
    """What else was found, and what to do with it."""
    if not contents.left_out:
        return ": it is empty"
    ends = tuple(f"({kind.value})" for kind in PACKED)
    packed = [name for name in contents.left_out if name.endswith(ends)]
    advice = "; unpack them first" if packed else ""
    return f"; found {shortened(packed or contents.left_out)}{advice}"


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """And no link to one; a file where the system cannot tell: reading it says what is wrong."""
    try:
        return entry.is_dir(follow_symlinks=False)
    except OSError:
        return False


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()
