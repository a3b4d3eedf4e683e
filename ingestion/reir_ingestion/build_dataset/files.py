"""Writes files that are complete or unchanged after an interruption."""

from __future__ import annotations

import os
import threading
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8; after an interruption, it is complete or unchanged."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.part")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        # Otherwise, a power failure after the renaming could leave an empty file of that name.
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
