"""Allowed names of galleries and versions, and the names of their Milvus collections.

A collection name in Milvus consists of at most 255 letters, digits and `_`. Gallery and version
names are encoded so that they contain no `__` and do not end in `_`. So the separator `__` is
unambiguous, and two different pairs of names never share a collection.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from reir.errors import ConfigError

# Encoding at most doubles a name, so two names of this length, the separators and the ending fit
# into the 255 characters of a collection name.
MAX_NAME_LENGTH = 60
_ALLOWED = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_ESCAPES = {"-": "_m", "_": "_u"}
_COLLECTION = re.compile(r"(.+?)__(.+)__instances")
_LEDGER_ENDING = re.compile(r"__images$")


class VersionKey(NamedTuple):
    """One version of one gallery."""

    gallery: str
    version: str


def check_name(kind: str, name: str) -> str:
    """Return `name` if a gallery or a version may have it.

    Args:
        kind: "gallery" or "version", for the message.
        name: the name to check.

    Raises:
        ConfigError: the name is not allowed; the message says what is.
    """
    if len(name) > MAX_NAME_LENGTH or not _ALLOWED.fullmatch(name):
        raise ConfigError(
            f"{kind} name {name!r} is not allowed: use 1 to {MAX_NAME_LENGTH} ASCII letters, "
            f"digits, '_' or '-', starting with a letter or digit"
        )
    return name


def instances_collection(gallery: str, version: str) -> str:
    """Name of the collection with the instances of a version."""
    return f"{_stem(gallery, version)}__instances"


def images_collection(gallery: str, version: str) -> str:
    """Name of the collection with the ledger of a version."""
    return f"{_stem(gallery, version)}__images"


def live_alias(gallery: str) -> str:
    """Name of the alias that points to the instances collection of the live version."""
    return f"{_encode_first(check_name('gallery', gallery))}__live"


def parse_instances_collection(collection: str) -> VersionKey | None:
    """Return the version whose instances a collection contains; None for any other collection."""
    match = _COLLECTION.fullmatch(collection)
    if match is None:
        return None
    key = VersionKey(_decode(match[1]), _decode(match[2]))
    # A collection of another program may match the pattern, but not be what we would name it.
    try:
        ours = instances_collection(*key) == collection
    except ConfigError:
        return None
    return key if ours else None


def collection_key(collection: str) -> VersionKey | None:
    """Return the version whose instances or ledger a collection contains; None for any other."""
    return parse_instances_collection(_LEDGER_ENDING.sub("__instances", collection))


def _stem(gallery: str, version: str) -> str:
    first = _encode_first(check_name("gallery", gallery))
    return f"{first}__{_encode(check_name('version', version))}"


def _encode_first(name: str) -> str:
    """Encode a name for the start of a collection name, where Milvus allows no digit."""
    encoded = _encode(name)
    return f"_{encoded}" if encoded[0].isdigit() else encoded


def _encode(name: str) -> str:
    """Encode "-" as `_m`, and "_" as `_u` where a plain `_` would be ambiguous."""
    parts = []
    # The last character counts as if "_" followed, so that no encoded name ends in "_".
    for char, following in zip(name, name[1:] + "_", strict=True):
        ambiguous = following in "mu_-"
        parts.append(_ESCAPES[char] if char == "-" or (char == "_" and ambiguous) else char)
    return "".join(parts)


def _decode(encoded: str) -> str:
    # Every name starts with a letter or a digit, so this `_` can only come from `_encode_first`.
    plain = encoded.removeprefix("_") if re.match(r"_\d", encoded) else encoded
    return re.sub("_([mu])", lambda match: "-" if match[1] == "m" else "_", plain)
