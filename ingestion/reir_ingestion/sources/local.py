"""The image files of a local folder or pattern, or a single file.

Folders are listed one by one, and no image is opened for that. Paths are bytes, because a file name
need not be valid UTF-8.
"""

from __future__ import annotations

import os
import stat
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from reir.errors import SourceError
from reir.images.decode import canonical_uri, path_of_uri, read_bytes
from reir_ingestion.sources.contract import (
    ABSENT_FILE,
    IMAGE_SUFFIXES,
    FileStatus,
    OnError,
    SourceFile,
    ignore_error,
)
from reir_ingestion.sources.patterns import Segments, is_listed, matches, may_match_below

HIDDEN, NO_SUFFIX, LINKS_OUT = "hidden", "no suffix", "links out of the folder"
"""Keys of `LocalSource.skipped` for entries that are not counted by suffix."""


@dataclass(frozen=True)
class LocalSource:
    """Image files on this machine.

    Attributes:
        text: the source as the user wrote it.
        root: absolute path of the folder, or of the single file.
        pattern: segments that a path below `root` must match, `**` for any number of folders;
            empty if `root` is a file.
        suffixes: suffixes of the files to list, in lower case.
        follow_links: also follow symlinks whose targets are outside `root`.
    """

    text: str
    root: bytes
    pattern: Segments
    suffixes: tuple[str, ...] = IMAGE_SUFFIXES
    follow_links: bool = False

    @property
    def skipped(self) -> Mapping[str, int]:
        """Files that the last complete listing skipped: suffix in lower case -> number of files.

        A hidden folder counts as one file, and so does a symlink that leaves the root.
        """
        # Kept in `__dict__`, because the dataclass is frozen and this is not one of its fields.
        found: Mapping[str, int] = self.__dict__.get("_skipped", {})
        return found

    def paths(self, on_error: OnError = ignore_error) -> Iterator[bytes]:
        """Yield the absolute paths of the images, sorted within each folder, folders depth first.

        Hidden names are skipped, and unless `follow_links` is set, so are symlinks that leave the
        root. Symlinks to folders are followed last, so that an image has its real path if possible.
        No folder is listed twice, so symlinks may form loops.

        Args:
            on_error: called for each folder that cannot be listed; that folder counts as empty.
        """
        if not self.pattern:
            yield self.root
            return
        seen: set[tuple[int, int]] = set()
        skipped: Counter[str] = Counter()
        inside = None if self.follow_links else os.path.realpath(self.root)
        waiting: deque[Segments] = deque([()])  # folders first, links at the end
        while waiting:
            parts = waiting.popleft()
            path = os.path.join(self.root, *parts)
            try:
                first = _first_visit(path, seen)
                entries = _scan(path, self.suffixes, inside) if first else _FolderEntries()
            except OSError as error:
                on_error(os.fsdecode(path), error)
                continue
            for name in entries.files:
                if matches((*parts, name), self.pattern):
                    yield os.path.join(path, name)
            # `extendleft` reverses what it is given, so this puts the first folder first.
            waiting.extendleft(self._matching_below(parts, reversed(entries.folders)))
            waiting.extend(self._matching_below(parts, entries.links))
            skipped.update(
                _kind(name) for name in entries.skipped if matches((*parts, name), self.pattern)
            )
            if entries.links_out:
                skipped[LINKS_OUT] += entries.links_out
        self.__dict__["_skipped"] = skipped

    def files(self, on_error: OnError = ignore_error) -> Iterator[SourceFile]:
        """Yield the images in the order of `paths`, with size and time."""
        for path in self.paths(on_error):
            yield SourceFile(_uri(path), *status_of_file(path))

    def uris(self, on_error: OnError = ignore_error) -> Iterator[str]:
        """Yield the canonical URIs of the images, in the order of `paths`."""
        return map(_uri, self.paths(on_error))

    def read(self, file: SourceFile) -> bytes:
        """Return the bytes of an image.

        Raises:
            ImageError: see `reir.images.decode.read_bytes`.
        """
        return read_bytes(path_of_uri(file.uri))

    def has_lost(self, uri: str) -> bool:
        """Return whether `uri` is an image of this source whose file no longer exists.

        A file that merely cannot be reached (no permission, a failing disk) is not lost.
        """
        try:
            path = os.fsencode(path_of_uri(uri))
        except SourceError:  # the gallery also has images of other sources, such as buckets
            return False
        return self._covers(path) and not _exists(path)

    def _covers(self, path: bytes) -> bool:
        if not self.pattern:
            return path == self.root
        prefix = self.root.rstrip(b"/") + b"/"
        parts = tuple(path.removeprefix(prefix).split(b"/"))
        return path.startswith(prefix) and matches(parts, self.pattern)

    def _matching_below(self, parent: Segments, names: Iterable[bytes]) -> list[Segments]:
        below = [(*parent, name) for name in names]
        return [each for each in below if may_match_below(each, self.pattern)]


def _uri(path: bytes) -> str:
    return canonical_uri(os.fsdecode(path))


@dataclass
class _FolderEntries:
    """The entries of a folder, by kind; names are sorted, except those that are skipped."""

    files: list[bytes] = field(default_factory=list)
    folders: list[bytes] = field(default_factory=list)
    links: list[bytes] = field(default_factory=list)
    skipped: list[bytes] = field(default_factory=list)
    links_out: int = 0


def _scan(folder: bytes, suffixes: tuple[str, ...], inside: bytes | None) -> _FolderEntries:
    """List a folder; symlinks with targets outside `inside` are only counted."""
    found = _FolderEntries()
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(b"."):
                found.skipped.append(entry.name)
            # `is_symlink` rarely needs a system call, so only symlinks pay for being resolved.
            elif inside is not None and entry.is_symlink() and not _lies_in(inside, entry.path):
                found.links_out += 1
            elif _is_folder(entry):
                (found.links if entry.is_symlink() else found.folders).append(entry.name)
            elif is_listed(entry.name, suffixes):
                found.files.append(entry.name)
            else:
                found.skipped.append(entry.name)
    # The order of `scandir` depends on the file system; that of a listing must not.
    for names in (found.files, found.folders, found.links):
        names.sort()
    return found


def _lies_in(folder: bytes, path: bytes) -> bool:
    """Return whether the real path of `path` is in `folder`, which must be a real path."""
    real = os.path.realpath(path)
    return real == folder or real.startswith(folder.rstrip(b"/") + b"/")


def _kind(name: bytes) -> str:
    """Return the key under which a skipped name is counted."""
    if name.startswith(b"."):
        return HIDDEN
    # In ASCII, because the report prints the suffix, and a file name may contain any bytes.
    return ascii(os.fsdecode(os.path.splitext(name)[1]).lower())[1:-1] or NO_SUFFIX


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a symlink to itself
        return False


def _first_visit(folder: bytes, seen: set[tuple[int, int]]) -> bool:
    status = os.stat(folder)
    key = (status.st_dev, status.st_ino)
    if key in seen:
        return False
    seen.add(key)
    return True


def status_of_file(path: bytes) -> FileStatus:
    """Return size and time of the file at a path; zeros if it is not a regular file."""
    try:
        status = os.stat(path)
    except OSError:
        return ABSENT_FILE
    if not stat.S_ISREG(status.st_mode):
        return ABSENT_FILE
    return FileStatus(status.st_size, status.st_mtime_ns)


def _exists(path: bytes) -> bool:
    try:
        os.lstat(path)  # not `stat`: a broken symlink is still listed, so it still exists
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:  # it cannot be reached, which does not mean that it is gone
        return True
    return True
