"""A memory store and a folder of photos."""

from __future__ import annotations

from pathlib import Path

import pytest

from reir.store.memory import MemoryStore
from reir_ingestion.testing import write_scenes


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    write_scenes(tmp_path / "photos", 20)
    return tmp_path / "photos"
