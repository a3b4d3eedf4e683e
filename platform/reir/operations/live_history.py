"""Which versions of a gallery were live, so that `reir rollback` can go back to the one before."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import asdict, dataclass

from reir.errors import GalleryNotFound, StoreError
from reir.store.contract import InstanceStore

KIND = "live-history"
"""Kind of the documents; there is one for each gallery."""

MAX_ENTRIES = 100


@dataclass(frozen=True)
class LiveEntry:
    """A version that was live, or is.

    Attributes:
        version: its name.
        since_s: Unix time at which it became live; 0 if that is not known.
        by: the command that made it live.
    """

    version: str
    since_s: float
    by: str


def make_live(store: InstanceStore, gallery: str, version: str, *, by: str) -> str:
    """Make a version live with one atomic switch, and record it.

    Args:
        store: the store.
        gallery: name of the gallery.
        version: the version to make live.
        by: the command that does it, for the record.

    Returns:
        The version that was live before; empty if none was.

    Raises:
        GalleryNotFound: there is no such gallery or version.
    """
    # Before the switch: afterwards, the new version would be listed as one without a record.
    entries = live_history(store, gallery)
    store.promote(gallery, version)
    before = entries[-1].version if entries else ""
    if before != version:
        _write(store, gallery, [*entries, LiveEntry(version, time.time(), by)])
    return before


def roll_back(store: InstanceStore, gallery: str) -> tuple[str, str]:
    """Make the version live that was live before the current one.

    Going back twice goes back two versions. Versions that were deleted are skipped.

    Returns:
        The version that was live until now, and the one that is live now.

    Raises:
        StoreError: no earlier version is left; the message names the versions that exist.
        GalleryNotFound: there is no such gallery, or none of its versions is live.
    """
    current = store.live_version(gallery)
    earlier = live_history(store, gallery)
    while earlier:
        target = earlier[-1].version
        # Not checked before: listing the versions counts their photos, which takes far longer.
        if target != current:
            with suppress(GalleryNotFound):
                store.promote(gallery, target)
                # `earlier` ends with the target now, so the next call goes back further.
                _write(store, gallery, earlier)
                return current, target
        earlier.pop()
    others = ", ".join(each.name for each in store.versions(gallery) if each.name != current)
    advice = (
        f"it also has {others}; make one of them live with `reir promote {gallery} VERSION`"
        if others
        else "it has no other version"
    )
    raise StoreError(
        f"gallery '{gallery}' cannot be rolled back: no version that was live before {current} is "
        f"left; {advice}"
    )


def live_history(store: InstanceStore, gallery: str) -> list[LiveEntry]:
    """Return the versions that were live, oldest first; the last one is the live one.

    Empty if none is live. A version that became live without a record, by an earlier release or by
    a process that was killed right after the switch, is added at the end.
    """
    found = store.find_documents(KIND, gallery).get(gallery, {})
    entries = [LiveEntry(**each) for each in found.get("versions", ())]
    try:
        live = store.live_version(gallery)
    except GalleryNotFound:
        return []
    if not entries or entries[-1].version != live:
        entries.append(LiveEntry(live, 0.0, "unknown"))
    return entries


def _write(store: InstanceStore, gallery: str, entries: list[LiveEntry]) -> None:
    # The oldest entries are dropped, since a document has a limited size.
    store.put_document(KIND, gallery, {"versions": [*map(asdict, entries[-MAX_ENTRIES:])]})
