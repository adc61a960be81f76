"""A folder of images, at any depth."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cluster.errors import DataError
from cluster.model_files.file_kinds import REMEDIES, FileKind, file_kind
from cluster.program.streams import escaped
from rewards.images.class_labels import ClassLabels, class_numbers
from rewards.images.decoding import SUFFIXES, Loaded, decode, digest

JUNK = frozenset(("thumbs.db", "desktop.ini", "__macosx", "@eadir", "lost+found", "$recycle.bin"))
"""Files and folders of operating systems; never data, as names with a leading dot."""
RAW = (".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw")
"""Raw files of cameras; Pillow reads them as TIFF and finds a thumbnail."""
ADVICE = (
    (
        (FileKind.TAR, FileKind.ZIP, FileKind.GZIP, FileKind.ARCHIVE, FileKind.CUT_ZIP),
        "unpack them first",
    ),
    ((FileKind.ARROW,), REMEDIES[FileKind.ARROW]),
    ((FileKind.NPZ, FileKind.NPY), "name the file itself, if it holds images"),
)
"""What to do with other files in a folder without images."""
SUMMARIES = ("metadata", "common_metadata")
"""Summaries that Spark and Dask write beside Parquet files, after a `_`."""
SPLITS = frozenset(
    ("train", "training", "val", "valid", "validation", "dev", "eval", "test", "testing")
)
"""Names of folders, in lower case, that are splits of a data set, not classes."""
HUB = ("blobs", "snapshots")  # folders of a repository in the Hugging Face hub's cache
NAMED = 5  # files in a message


@dataclass
class FolderContents:
    """Contents of a folder at any depth; names are relative to it, with slashes."""

    images: dict[str, int] = field(default_factory=dict)
    """Name -> bytes, -1 if unknown; sorted by name."""
    parquet: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """Names with the reason in brackets."""
    folders: list[str] = field(default_factory=list)
    """Direct subfolders, including empty ones."""
    again: list[str] = field(default_factory=list)
    """Images that link to the same outside file as an earlier image."""

    def remarks(self) -> tuple[str, ...]:
        """Lines about left out files, repeated links and splits."""
        lines = []
        if self.left_out:
            lines.append(f"left out {len(self.left_out)}: {by_reason(self.left_out)}")
        if self.again:
            lines.append(
                f"{len(self.again)} images are links to files that others link to as well; each "
                f"counts, as its copy would: {shortened(self.again)}"
            )
        counts = Counter(name.partition("/")[0] for name in self.images if "/" in name)
        splits = [name for name in counts if name.lower() in SPLITS]
        if len(splits) > 1:
            parts = ", ".join(f"{escaped(name)} ({counts[name]})" for name in splits)
            lines.append(f"images of {len(splits)} splits together: {parts}")
        return tuple(lines)


def shortened(names: list[str]) -> str:
    """The first few names."""
    more = ", ..." if len(names) > NAMED else ""
    return ", ".join(map(escaped, names[:NAMED])) + more


def by_reason(left_out: list[str]) -> str:
    """The left out files: all of a few, else the first one of every reason."""
    if len(left_out) <= NAMED:
        return shortened(left_out)
    reasons: dict[str, list[str]] = {}
    for entry in left_out:
        reason = entry.rpartition(" (")[2].partition(" as ")[0]
        reasons.setdefault(reason, []).append(entry)
    shown = [
        f"{entries[0]} and {len(entries) - 1} more like it" if len(entries) > 1 else entries[0]
        for entries in reasons.values()
    ]
    return ", ".join(map(escaped, shown[: 2 * NAMED])) + (", ..." if len(shown) > 2 * NAMED else "")


def walk(root: Path) -> FolderContents:
    """The contents of a folder at any depth; links are followed.

    Each real folder is entered once, so that cycles of links end. A link to a file that is also in
    the folder is left out. Each link to a file elsewhere is an image: caches of the hub, git-annex
    and DVC store equal images once. Pipes, sockets and devices are not opened.

    Raises:
        DataError: a folder cannot be listed, or this is a repository of the hub's cache.
    """
    if all((root / name).is_dir() for name in HUB):
        revisions = sorted(os.listdir(root / "snapshots"))
        raise DataError(
            f"{escaped(root)}: a repository in the cache of the Hugging Face hub: name one of "
            f"its snapshots, {', '.join(escaped(root / 'snapshots' / name) for name in revisions)}"
        )
    return _Walk(root).contents


class _Walk:
    def __init__(self, root: Path) -> None:
        self._root = root
        self.contents = FolderContents()
        real = os.path.realpath(root)
        self._folders = {real: "."}  # real path -> name
        self._files: dict[str, str] = {}  # real path -> name
        self._inodes: dict[tuple[int, int], str] = {}
        self._links: list[tuple[str, str]] = []
        self._linked_files: list[tuple[str, str]] = []
        self._linked_to: set[str] = set()
        self._down("", real)
        while self._links:  # after everything else; links below linked folders last
            links, self._links = sorted(self._links), []
            for name, real in links:
                self._follow(name, real)
        for name, real in sorted(self._linked_files):  # all files of the folder are known now
            self._file(name, real, linked=True)
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
                f"{escaped(self._root / name)}: the folder cannot be listed ({error.strerror}), "
                "so its contents are unknown: make it readable, or move it away"
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
        """Record a folder; False if it is known."""
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
                self.contents.images[name] = -1  # an error when it is read
            else:
                self.contents.left_out.append(f"{name} (a dangling link: {error.strerror})")
            return
        if not stat.S_ISDIR(found.st_mode):
            self._linked_files.append((name, real))
        elif os.path.dirname(place).startswith(os.path.join(real, "")):
            self.contents.left_out.append(f"{name}/ (a link to a folder that contains it)")
        elif self._enter(name, real):
            self._down(name, real)

    def _file(self, name: str, real: str, *, linked: bool = False) -> None:
        contents, suffix = self.contents, _suffix(name)
        try:
            found = os.lstat(real)
        except OSError:  # removed meanwhile
            contents.images[name] = -1
            return
        if not stat.S_ISREG(found.st_mode):
            contents.left_out.append(f"{name} (no regular file)")
            return
        inode = (found.st_dev, found.st_ino) if found.st_nlink > 1 and found.st_ino else None
        same = self._files.get(real) or (self._inodes.get(inode) if inode else None)
        if same:
            contents.left_out.append(f"{name} (the same file as {same})")
            return
        if not linked:
            self._files[real] = name
            if inode:
                self._inodes[inode] = name
        if name.rpartition("/")[2] in [f"_{summary}" for summary in SUMMARIES]:
            contents.left_out.append(f"{name} (a summary of Parquet files)")
        elif suffix in SUFFIXES:
            contents.images[name] = found.st_size
        elif suffix == ".parquet":
            contents.parquet.append(name)
        else:
            self._by_content(name, found.st_size)
        if linked and name in contents.images:
            if real in self._linked_to:
                contents.again.append(name)
            self._linked_to.add(real)

    def _by_content(self, name: str, size: int) -> None:
        """Record a file whose kind depends on its content."""
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
    """Every image file below a folder, in the order of the paths; its direct subfolders are the
    classes (`rewards.images.class_labels`), including empty ones."""

    def __init__(self, root: Path, contents: FolderContents | None = None) -> None:
        """
        Raises:
            DataError: no image below the folder.
        """
        contents = walk(root) if contents is None else contents
        self._root, self._folders = root, contents.folders
        self._names = list(contents.images)
        self.remarks = contents.remarks()
        if not self._names:
            raise DataError(f"{escaped(root)}: no images in it or below{_instead(contents)}")
        lines = (f"{name} {size}" for name, size in contents.images.items())
        self.fingerprint = digest(os.fsencode("\n".join(lines)))

    def __len__(self) -> int:
        return len(self._names)

    def read(self, start: int, stop: int) -> Iterator[Loaded]:
        for name in self._names[start:stop]:
            yield decode(str(self._root / name), self._root / name)

    def classes(self, names: tuple[str, ...] = ()) -> ClassLabels:
        folders = [name.partition("/")[0] if "/" in name else "" for name in self._names]
        root = escaped(self._root)
        if "" in folders:
            stray = escaped(self._names[folders.index("")])
            raise DataError(
                f"{root}: classes are the folders right below it, but {stray} is in none"
            )
        if not names:
            self._check_level(folders)
        numbers, known = class_numbers(self._folders, root, names)
        return ClassLabels(np.array([numbers[folder] for folder in folders], np.int64), known)

    def _check_level(self, folders: list[str]) -> None:
        """
        Raises:
            DataError: the folders are splits, or one folder that holds the classes.
        """
        one, found = escaped(self._root / folders[0]), sorted(set(folders))
        if all(name.lower() in SPLITS for name in found):
            raise DataError(
                f"{escaped(self._root)}: classes are the folders right below it, but these are "
                f"splits of a data set ({', '.join(map(escaped, found))}): name one, such as {one}"
            )
        if len(found) > 1:
            return
        below = {name.split("/")[1] if name.count("/") > 1 else "" for name in self._names}
        if len(below) > 1 and "" not in below:
            raise DataError(
                f"{escaped(self._root)}: classes are the folders right below it, and that is one; "
                f"are those below it meant ({shortened(sorted(below))})? Then name {one}"
            )


def _instead(contents: FolderContents) -> str:
    """The other files, and what to do with them."""
    if not contents.left_out:
        return ": it is empty"
    return f"; found {advice(contents.left_out) or by_reason(contents.left_out)}"


def advice(left_out: list[str]) -> str:
    """Files that may contain the images, and what to do with them; empty without such files."""
    for kinds, remedy in ADVICE:
        ends = tuple(f"({kind.value})" for kind in kinds)
        if found := [name for name in left_out if name.endswith(ends)]:
            return f"{shortened(found)}; {remedy}"
    return ""


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder, not a link; False if unknown (an error when it is read)."""
    try:
        return entry.is_dir(follow_symlinks=False)
    except OSError:
        return False


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()
