"""Checks that the folder of an embedded store exists; cheap, because it runs before each call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from reir.errors import StoreUnavailable
from reir.store import is_embedded


def folder_check(location: str) -> Callable[[], None]:
    """Return a function that raises `StoreUnavailable` while the store's folder does not exist.

    Without this check, opening or querying the store would create a new, empty store in its place.
    For a Milvus server or a store in memory, nothing is checked.
    """
    if not is_embedded(location):
        return lambda: None
    # Resolved once, so that the check means the same folder that the store was opened with.
    folder = Path(location).expanduser().resolve()

    def check() -> None:
        if not folder.is_dir():
            raise StoreUnavailable(str(folder), "its folder no longer exists; restore it")

    return check
