"""Fakes and helpers for our own tests and for tests of users. Uses no store and no Ray."""

from __future__ import annotations

import os
from pathlib import Path

from reir_testing.fakes import (
    PALETTE,
    ChoosingFakeEncoder,
    FakeEncoder,
    FakeLocalizer,
    draw_scene,
)

__all__ = [
    "PALETTE",
    "ChoosingFakeEncoder",
    "FakeEncoder",
    "FakeLocalizer",
    "data_dir",
    "draw_scene",
]

_REPOSITORY = Path(__file__).resolve().parents[2]


def data_dir() -> Path | None:
    """Return the folder of real photos and annotations; None if this machine has none.

    The environment variable `REIR_DATA` names the folder. If it is not set, the folder is
    `../shared/data` beside the repository.

    Raises:
        FileNotFoundError: `REIR_DATA` is set but is no folder.
    """
    named = os.environ.get("REIR_DATA")
    if named:
        folder = Path(named)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"REIR_DATA={named!r} is not a folder; unset it or point it at the shared data"
            )
        return folder
    beside = _REPOSITORY.parent / "shared" / "data"
    return beside if beside.is_dir() else None
