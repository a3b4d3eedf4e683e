"""The folder of an embedded store: whether it is there. Looked at often, so it must cost little."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from reir.errors import StoreUnavailable
from reir.store import is_embedded


def folder_check(location: str) -> Callable[[], None]:
    """Return a function that raises `StoreUnavailable` while a store's folder is not there.

    A store that is opened or asked then would make a new, empty one in its place. Of a Milvus
    server nothing is checked.
    """
    if not is_embedded(location):
        return lambda: None
    folder = Path(location).expanduser().resolve()

    def check() -> None:
        if not folder.is_dir():
            raise StoreUnavailable(str(folder), "its folder is gone; put it back")

    return check
