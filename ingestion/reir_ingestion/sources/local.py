"""The image files of a local folder, of a glob, or one file.

Listing goes one folder at a time and opens no image. Works on the bytes of names, so any name that
a file can have survives.
"""

from __future__ import annotations

import os
import stat
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from reir.errors import SourceError
from reir.images import canonical_uri, path_of_uri, read_bytes
from reir_ingestion.sources.contract import (
    IMAGE_ENDINGS,
    NOWHERE,
    OnError,
    SourceFile,
    Status,
    ignore_error,
)
from reir_ingestion.sources.patterns import Parts, is_listed, matches, may_lie_below

HIDDEN, NO_SUFFIX, LINKS_OUT = "hidden", "no suffix", "links out of the folder"
"""Keys of `LocalSource.passed_over` for entries that are not counted by suffix."""


@dataclass(frozen=True)
class LocalSource:
    """Image files of this machine.

    Attributes:
        text: the source as the user wrote it.
        root: absolute path of the folder, or of the single file.
        pattern: segments that a path below `root` must match, `**` for any number of folders;
            empty when `root` is a file.
        endings: suffixes of the files to list, in lower case.
        follow_links: also follow symlinks whose targets are outside `root`.
    """

    text: str
    root: bytes
    pattern: Parts
    endings: tuple[str, ...] = IMAGE_ENDINGS
    follow_links: bool = False

    @property
    def passed_over(self) -> Mapping[str, int]:
        """What the last complete listing skipped: suffix in lower case -> number of files.

        A hidden folder counts as one file, and so does a symlink that leaves the root.
        """
        found: Mapping[str, int] = self.__dict__.get("_passed_over", {})
        return found

    def paths(self, on_error: OnError = ignore_error) -> Iterator[bytes]:
        """Absolute paths of the images, sorted within each folder, the folders depth first.

        Hidden names are skipped, and, unless `follow_links`, so are symlinks that leave the root.
        Symlinks to folders are followed after everything else. No folder is listed twice, so
        symlinks may form loops.

        Args:
            on_error: called for each folder that cannot be listed; it counts as empty.
        """
        if not self.pattern:
            yield self.root
            return
        seen: set[tuple[int, int]] = set()
        passed_over: Counter[str] = Counter()
        inside = None if self.follow_links else os.path.realpath(self.root)
        waiting: deque[Parts] = deque([()])  # at its end the links
        while waiting:
            parts = waiting.popleft()
            path = os.path.join(self.root, *parts)
            try:
                first = _first_visit(path, seen)
                entries = _scan(path, self.endings, inside) if first else _Entries()
            except OSError as error:
                on_error(os.fsdecode(path), error)
                continue
            for name in entries.files:
                if matches((*parts, name), self.pattern):
                    yield os.path.join(path, name)
            waiting.extendleft(self._worth_a_visit(parts, reversed(entries.folders)))
            waiting.extend(self._worth_a_visit(parts, entries.links))
            passed_over.update(
                _kind(name) for name in entries.skipped if matches((*parts, name), self.pattern)
            )
            if entries.links_out:
                passed_over[LINKS_OUT] += entries.links_out
        self.__dict__["_passed_over"] = passed_over

    def files(self, on_error: OnError = ignore_error) -> Iterator[SourceFile]:
        """The images in the order of `paths`, with what tells a changed file from an old one."""
        for path in self.paths(on_error):
            yield SourceFile(_uri(path), *status_of_file(path))

    def uris(self, on_error: OnError = ignore_error) -> Iterator[str]:
        """Canonical URIs of the images, in the order of `paths`."""
        return map(_uri, self.paths(on_error))

    def read(self, file: SourceFile) -> bytes:
        """The bytes of a listed file.

        Raises:
            ImageError: see `reir.images.read_bytes`.
        """
        return read_bytes(path_of_uri(file.uri))

    def has_lost(self, uri: str) -> bool:
        """Whether `uri` names an image of this source whose file is no longer there.

        A file that merely cannot be reached (no permission, a failing disk) is not lost.
        """
        try:
            path = os.fsencode(path_of_uri(uri))
        except SourceError:
            return False
        return self._covers(path) and not _exists(path)

    def _covers(self, path: bytes) -> bool:
        if not self.pattern:
            return path == self.root
        prefix = self.root.rstrip(b"/") + b"/"
        parts = tuple(path.removeprefix(prefix).split(b"/"))
        return path.startswith(prefix) and matches(parts, self.pattern)

    def _worth_a_visit(self, parent: Parts, names: Iterable[bytes]) -> list[Parts]:
        below = [(*parent, name) for name in names]
        return [each for each in below if may_lie_below(each, self.pattern)]


def _uri(path: bytes) -> str:
    return canonical_uri(os.fsdecode(path))


@dataclass
class _Entries:
    """The content of a folder: sorted names, and the unsorted names of skipped entries."""

    files: list[bytes] = field(default_factory=list)
    folders: list[bytes] = field(default_factory=list)
    links: list[bytes] = field(default_factory=list)
    skipped: list[bytes] = field(default_factory=list)
    links_out: int = 0


def _scan(folder: bytes, endings: tuple[str, ...], inside: bytes | None) -> _Entries:
    """List a folder; symlinks with targets outside `inside` are only counted."""
    found = _Entries()
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(b"."):
                found.skipped.append(entry.name)
            elif inside is not None and entry.is_symlink() and not _lies_in(inside, entry.path):
                found.links_out += 1
            elif _is_folder(entry):
                (found.links if entry.is_symlink() else found.folders).append(entry.name)
            elif is_listed(entry.name, endings):
                found.files.append(entry.name)
            else:
                found.skipped.append(entry.name)
    for names in (found.files, found.folders, found.links):
        names.sort()
    return found


def _lies_in(folder: bytes, path: bytes) -> bool:
    """Whether a path, once resolved, lies in `folder`, which must be resolved already."""
    real = os.path.realpath(path)
    return real == folder or real.startswith(folder.rstrip(b"/") + b"/")


def _kind(name: bytes) -> str:
    """Return the key under which a skipped name is counted."""
    if name.startswith(b"."):
        return HIDDEN
    return ascii(os.fsdecode(os.path.splitext(name)[1]).lower())[1:-1] or NO_SUFFIX


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _first_visit(folder: bytes, seen: set[tuple[int, int]]) -> bool:
    status = os.stat(folder)
    key = (status.st_dev, status.st_ino)
    if key in seen:
        return False
    seen.add(key)
    return True


def status_of_file(path: bytes) -> Status:
    """Size and time of what a path leads to, zeros when that is no regular file."""
    try:
        status = os.stat(path)
    except OSError:
        return NOWHERE
    if not stat.S_ISREG(status.st_mode):
        return NOWHERE
    return Status(status.st_size, status.st_mtime_ns)


def _exists(path: bytes) -> bool:
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True
