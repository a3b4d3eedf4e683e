"""Glob patterns for local paths and for keys of buckets.

Paths and patterns are tuples with one item per segment. The segments are bytes, because a file name
need not be valid UTF-8.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

Segments = tuple[bytes, ...]

ANY_DEPTH = b"**"
"""Segment that matches any number of folders, including none."""

_WILDCARDS = frozenset(b"*?[")


def has_wildcard(text: bytes) -> bool:
    """Return whether a path contains a wildcard."""
    return not _WILDCARDS.isdisjoint(text)


def is_listed(name: bytes, suffixes: tuple[str, ...]) -> bool:
    """Return whether a file is listed: it has one of the suffixes and is not hidden."""
    # Latin-1 decodes any bytes, and suffixes are ASCII.
    text = name.lower().decode("latin-1")
    return text.endswith(suffixes) and not text.startswith(".")


def split_pattern(path: bytes) -> tuple[bytes, Segments]:
    """Return the folder above the first segment with a wildcard, and the segments from there.

    The path must contain a wildcard.
    """
    parts = path.split(b"/")
    fixed = next(i for i, part in enumerate(parts) if has_wildcard(part))
    return b"/".join(parts[:fixed]), tuple(parts[fixed:])


def matches(parts: Segments, pattern: Segments) -> bool:
    """Return whether a path matches the whole pattern."""
    if not pattern:
        return not parts
    if pattern[0] == ANY_DEPTH:
        # Either "**" ends here, or it takes one more segment.
        return matches(parts, pattern[1:]) or (bool(parts) and matches(parts[1:], pattern))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and matches(parts[1:], pattern[1:])


def may_match_below(folder: Segments, pattern: Segments) -> bool:
    """Return whether a path below `folder` could match the pattern.

    A listing skips the folders for which this is false.
    """
    # A folder that the pattern leads to may contain matches if segments of the pattern are left.
    if not folder or not pattern:
        return bool(pattern)
    if pattern[0] == ANY_DEPTH:
        return True
    return fnmatchcase(folder[0], pattern[0]) and may_match_below(folder[1:], pattern[1:])
