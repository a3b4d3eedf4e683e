"""Globs over paths by segments, in bytes, for folders and buckets alike."""

from __future__ import annotations

from fnmatch import fnmatchcase

Parts = tuple[bytes, ...]

ANY_DEPTH = b"**"
"""Stands for any number of folders."""

_MAGIC = frozenset(b"*?[")


def has_magic(text: bytes) -> bool:
    """Whether a text holds a character that only patterns need."""
    return not _MAGIC.isdisjoint(text)


def is_listed(name: bytes, endings: tuple[str, ...]) -> bool:
    """Whether a file of this name is listed: it has one of the endings and is not hidden."""
    text = name.lower().decode("latin-1")
    return text.endswith(endings) and not text.startswith(".")


def split_pattern(path: bytes) -> tuple[bytes, Parts]:
    """Return the folder above the first segment with magic, and the segments from there on."""
    parts = path.split(b"/")
    fixed = next(i for i, part in enumerate(parts) if has_magic(part))
    return b"/".join(parts[:fixed]), tuple(parts[fixed:])


def matches(parts: Parts, pattern: Parts) -> bool:
    """Whether a path, by segments, matches the whole pattern."""
    if not pattern:
        return not parts
    if pattern[0] == ANY_DEPTH:
        return matches(parts, pattern[1:]) or (bool(parts) and matches(parts[1:], pattern))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and matches(parts[1:], pattern[1:])


def may_lie_below(folder: Parts, pattern: Parts) -> bool:
    """Whether some path below `folder` could match the pattern."""
    if not folder or not pattern:
        return bool(pattern)
    if pattern[0] == ANY_DEPTH:
        return True
    return fnmatchcase(folder[0], pattern[0]) and may_lie_below(folder[1:], pattern[1:])
