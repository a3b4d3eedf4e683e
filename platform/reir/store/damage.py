"""What is said of a file of an embedded store that is damaged, and what to do about it.

The process that serves the store finds it; what it says reaches the user through Milvus's own
protocol, which has only a text.
"""

from __future__ import annotations

import re
from pathlib import Path

from reir.errors import StoreDamaged
from reir.store.names import collection_key

_MARK = "damaged file: "
_FOUND = re.compile(_MARK + r"(?P<said>(?:\S*?/collections/(?P<name>[^/\s]+)|\S+).*)", re.DOTALL)
ALIASES = "aliases.json"


def describe_damage(path: Path | str, why: str) -> str:
    """What the serving process says."""
    return f"{_MARK}{path} {why}"


def damage_said(address: str, text: str) -> StoreDamaged | None:
    """Return the error for the user if `text` tells of damage, else None."""
    found = _FOUND.search(text)
    if found is None:
        return None
    said = found["said"].removesuffix(")>")
    if ALIASES in said:
        return StoreDamaged(
            f"store at {address} no longer knows which versions are live: {said}. Delete "
            f"milvus/{ALIASES} and milvus/{ALIASES}.sum in its folder, then run "
            f"`reir versions GALLERY` and `reir promote GALLERY VERSION` for each gallery"
        )
    key = collection_key(found["name"] or "")
    if key is None:
        return StoreDamaged(f"store at {address} is damaged: {said}. {_remedy('GALLERY')}")
    what = f"version {key.version} of gallery {key.gallery}"
    return StoreDamaged(
        f"{what} in the store at {address} is damaged: {said}. {_remedy(key.gallery)}"
    )


def lost_ledger(address: str, gallery: str, version: str) -> StoreDamaged:
    """Return the error for a version that has its instances but no ledger."""
    return StoreDamaged(
        f"version {version} of gallery {gallery} in the store at {address} is damaged: its ledger "
        f"(the list of its photos) is missing. {_remedy(gallery)}"
    )


def _remedy(gallery: str) -> str:
    return (
        f"Restore the store's folder from a backup, or rebuild the gallery: "
        f"`reir rm {gallery}`, then `reir index SOURCE --gallery {gallery}`"
    )
