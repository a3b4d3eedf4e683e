"""Errors about damaged files of an embedded store, which tell the user what to do.

The process that serves the store finds the damage, and reports it to its clients through the Milvus
protocol. Errors of that protocol contain only text, so clients recognize damage by the text.
"""

from __future__ import annotations

import re
from pathlib import Path

from reir.errors import StoreDamaged
from reir.store.names import collection_key

_MARK = "damaged file: "
# A file below `collections/NAME` belongs to that collection; the aliases belong to none.
_FOUND = re.compile(_MARK + r"(?P<problem>(?:\S*?/collections/(?P<name>[^/\s]+)|\S+).*)", re.DOTALL)
ALIASES = "aliases.json"


def damage_report(path: Path | str, why: str) -> str:
    """Return the text with which the serving process reports a damaged file."""
    return f"{_MARK}{path} {why}"


def parse_damage_report(address: str, text: str) -> StoreDamaged | None:
    """Return the error for the user if `text` contains a damage report, otherwise None."""
    found = _FOUND.search(text)
    if found is None:
        return None
    problem = found["problem"].removesuffix(")>")  # the end of the text of a `MilvusException`
    # The aliases belong to no single gallery, and only they can be restored without indexing again.
    if ALIASES in problem:
        return StoreDamaged(
            f"the store at {address} no longer knows which versions are live: {problem}. Delete "
            f"milvus/{ALIASES} and milvus/{ALIASES}.sum in its folder, then run "
            f"`reir versions GALLERY` and `reir promote GALLERY VERSION` for each gallery"
        )
    key = collection_key(found["name"] or "")
    if key is None:
        return StoreDamaged(f"the store at {address} is damaged: {problem}. {_remedy('GALLERY')}")
    what = f"version {key.version} of gallery {key.gallery}"
    return StoreDamaged(
        f"{what} in the store at {address} is damaged: {problem}. {_remedy(key.gallery)}"
    )


def missing_ledger_error(address: str, gallery: str, version: str) -> StoreDamaged:
    """Return the error for a version whose instances exist but whose ledger does not."""
    return StoreDamaged(
        f"version {version} of gallery {gallery} in the store at {address} is damaged: its ledger "
        f"(the list of its photos) is missing. {_remedy(gallery)}"
    )


def _remedy(gallery: str) -> str:
    return (
        f"Delete the gallery with `reir rm {gallery}`; then restore its last backup with "
        f"`reir restore BACKUP`, or index it again with `reir index SOURCE --gallery {gallery}`"
    )
