"""Writes files that are complete or unchanged after an interruption."""

from __future__ import annotations

import os
import threading
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8; after an interruption, it is complete or unchanged."""
    # A name of its own in each process and thread, because several may write the same file.
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.part")
    partial.write_text(text, encoding="utf-8")
    put_in_place(partial, path)


def put_in_place(partial: Path, path: Path) -> None:
    """Give a finished file its name; after an interruption, `path` is complete or unchanged."""
    with partial.open("rb+") as file:
        # Otherwise, a power failure after the renaming could leave an empty file of that name.
        os.fsync(file.fileno())
    os.replace(partial, path)
