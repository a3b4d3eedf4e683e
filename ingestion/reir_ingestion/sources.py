"""What there is to index: the image files of a folder, of a glob, or one file.

Listing streams, one folder at a time, and opens no image. Knows file names and nothing of pixels,
models or stores. Works on the bytes of names, so any name that a file can have survives.
"""

from __future__ import annotations

import os
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from reir.errors import SourceError
from reir.images import canonical_uri, path_of_uri

# fmt: off
IMAGE_ENDINGS = (
    ".avif", ".bmp", ".gif", ".heic", ".heif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg",
    ".jxl", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp",
)
# fmt: on
"""Endings of the files that are listed, in any case; formats that are not decoded get a reason."""

_ENDINGS = tuple(os.fsencode(ending) for ending in IMAGE_ENDINGS)
_MAGIC = frozenset("*?[")
_ANY_DEPTH = b"**"

Parts = tuple[bytes, ...]
OnError = Callable[[str, OSError], None]


def ignore_error(folder: str, error: OSError) -> None:
    """Do nothing about a folder that cannot be listed."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One listed file.

    Attributes:
        path: absolute; bytes in no valid encoding are kept as `os.fsdecode` keeps them.
        size_bytes, mtime_ns: of what the path leads to; 0 when it leads nowhere.
    """

    path: str
    size_bytes: int
    mtime_ns: int

    @property
    def uri(self) -> str:
        """Canonical URI, the name under which the image is kept."""
        return canonical_uri(self.path)


@dataclass(frozen=True)
class Source:
    """A place to list images from; `open_source` makes one.

    Attributes:
        text: as the user wrote it.
        root: absolute path of a folder, or of the one file.
        pattern: segments that a path below `root` must match, `**` for any number of folders;
            empty when `root` is a file.
    """

    text: str
    root: bytes
    pattern: Parts

    def paths(self, on_error: OnError = ignore_error) -> Iterator[bytes]:
        """Absolute paths of the images, sorted within each folder, the folders depth first.

        Hidden names are left out. Links to folders are followed after everything else; no folder
        is listed twice, so links may form loops.

        Args:
            on_error: called for each folder that cannot be listed; it counts as empty.
        """
        if not self.pattern:
            yield self.root
            return
        seen: set[tuple[int, int]] = set()
        waiting: deque[Parts] = deque([()])  # at its end the links
        while waiting:
            parts = waiting.popleft()
            path = os.path.join(self.root, *parts)
            try:
                entries = _scan(path) if _first_visit(path, seen) else _Entries()
            except OSError as error:
                on_error(os.fsdecode(path), error)
                continue
            for name in entries.images:
                if _matches((*parts, name), self.pattern):
                    yield os.path.join(path, name)
            waiting.extendleft(self._worth_a_visit(parts, reversed(entries.folders)))
            waiting.extend(self._worth_a_visit(parts, entries.links))

    def files(self, on_error: OnError = ignore_error) -> Iterator[SourceFile]:
        """The images in the order of `paths`, with what tells a changed file from an old one."""
        for path in self.paths(on_error):
            size_bytes, mtime_ns = _size_and_time(path)
            yield SourceFile(os.fsdecode(path), size_bytes, mtime_ns)

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
        return path.startswith(prefix) and _matches(parts, self.pattern)

    def _worth_a_visit(self, parent: Parts, names: Iterable[bytes]) -> list[Parts]:
        below = [(*parent, name) for name in names]
        return [each for each in below if _may_lie_below(each, self.pattern)]


def open_source(source: str | Path) -> Source:
    """Return the source that `source` names: a folder, one file, or a glob.

    Args:
        source: a path; or a pattern such as `photos/**/*.jpg`, in which `**` stands for any number
            of folders. What exists under the literal name is never taken for a pattern.

    Raises:
        SourceError: it does not exist or holds no image; the message says what was looked for.
    """
    text = os.fspath(source)
    path = os.path.abspath(os.path.expanduser(text))
    if os.path.isdir(path):
        found = Source(text, os.fsencode(path), (_ANY_DEPTH,))
    elif os.path.lexists(path):
        return Source(text, os.fsencode(path), ())
    elif _MAGIC & set(path):
        found = _glob_source(text, path)
    else:
        raise SourceError(
            f"source {text!a} does not exist; give a folder, an image file, or a pattern "
            f"such as 'photos/**/*.jpg'"
        )
    if next(found.paths(), None) is None:
        raise SourceError(
            f"source {text!a} holds no image; looked for files ending in "
            f"{' '.join(IMAGE_ENDINGS)} that are not hidden"
        )
    return found


def _glob_source(text: str, path: str) -> Source:
    parts = os.fsencode(path).split(b"/")
    fixed = next(i for i, part in enumerate(parts) if _MAGIC & set(os.fsdecode(part)))
    root = b"/".join(parts[:fixed]) or b"/"
    if not os.path.isdir(root):
        raise SourceError(
            f"source {text!a} does not exist: there is no folder {os.fsdecode(root)!a}"
        )
    return Source(text, root, tuple(parts[fixed:]))


def _matches(parts: Parts, pattern: Parts) -> bool:
    """Whether a path, by segments, matches the whole pattern."""
    if not pattern:
        return not parts
    if pattern[0] == _ANY_DEPTH:
        return _matches(parts, pattern[1:]) or (bool(parts) and _matches(parts[1:], pattern))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _may_lie_below(folder: Parts, pattern: Parts) -> bool:
    """Whether some path below `folder` could match the pattern."""
    if not folder or not pattern:
        return bool(pattern)
    if pattern[0] == _ANY_DEPTH:
        return True
    return fnmatchcase(folder[0], pattern[0]) and _may_lie_below(folder[1:], pattern[1:])


@dataclass
class _Entries:
    """What is in a folder: names in order, hidden ones left out."""

    images: list[bytes] = field(default_factory=list)
    folders: list[bytes] = field(default_factory=list)
    links: list[bytes] = field(default_factory=list)


def _scan(folder: bytes) -> _Entries:
    found = _Entries()
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(b"."):
                continue
            if _is_folder(entry):
                (found.links if entry.is_symlink() else found.folders).append(entry.name)
            elif entry.name.lower().endswith(_ENDINGS):
                found.images.append(entry.name)
    for names in (found.images, found.folders, found.links):
        names.sort()
    return found


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


def _size_and_time(path: bytes) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:
        return 0, 0
    if not stat.S_ISREG(status.st_mode):
        return 0, 0
    return status.st_size, status.st_mtime_ns


def _exists(path: bytes) -> bool:
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True
