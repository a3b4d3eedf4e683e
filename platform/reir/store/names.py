"""Names: what a gallery or version may be called, and what Milvus calls it.

Milvus allows letters, digits and `_`, 255 in all. A gallery or version name is written so that it
holds no `__` and does not end in `_`; the separator `__` is then unambiguous and two different
pairs of names never share a collection.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from reir.errors import ConfigError

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
    """Return `name` if it may name a gallery or a version.

    Args:
        kind: "gallery" or "version", for the message.
        name: the name to check.

    Raises:
        ConfigError: it may not; the message says what is allowed.
    """
    if len(name) > MAX_NAME_LENGTH or not _ALLOWED.fullmatch(name):
        raise ConfigError(
            f"{kind} name {name!r} is not allowed: use 1 to {MAX_NAME_LENGTH} ASCII letters, "
            f"digits, '_' or '-', starting with a letter or digit"
        )
    return name


def instances_collection(gallery: str, version: str) -> str:
    """Collection that holds the instances of a version."""
    return f"{_stem(gallery, version)}__instances"


def images_collection(gallery: str, version: str) -> str:
    """Collection that holds the ledger of a version."""
    return f"{_stem(gallery, version)}__images"


def live_alias(gallery: str) -> str:
    """Alias that points to the instances collection of the live version."""
    return f"{_encode_first(check_name('gallery', gallery))}__live"


def parse_instances_collection(collection: str) -> VersionKey | None:
    """Return the version whose instances `collection` holds, or None if it is not one of ours."""
    match = _COLLECTION.fullmatch(collection)
    if match is None:
        return None
    key = VersionKey(_decode(match[1]), _decode(match[2]))
    try:
        ours = instances_collection(*key) == collection
    except ConfigError:
        return None
    return key if ours else None


def collection_key(collection: str) -> VersionKey | None:
    """Return the version whose instances or ledger a collection holds; None if it holds neither."""
    return parse_instances_collection(_LEDGER_ENDING.sub("__instances", collection))


def _stem(gallery: str, version: str) -> str:
    first = _encode_first(check_name("gallery", gallery))
    return f"{first}__{_encode(check_name('version', version))}"


def _encode_first(name: str) -> str:
    """Encode a name that starts a collection name: there Milvus allows no digit."""
    encoded = _encode(name)
    return f"_{encoded}" if encoded[0].isdigit() else encoded


def _encode(name: str) -> str:
    """Write '-' as `_m`, and '_' as `_u` wherever the plain one could be misread."""
    parts = []
    for char, following in zip(name, name[1:] + "_", strict=True):
        ambiguous = following in "mu_-"
        parts.append(_ESCAPES[char] if char == "-" or (char == "_" and ambiguous) else char)
    return "".join(parts)


def _decode(encoded: str) -> str:
    plain = encoded.removeprefix("_") if re.match(r"_\d", encoded) else encoded
    return re.sub("_([mu])", lambda match: "-" if match[1] == "m" else "_", plain)
