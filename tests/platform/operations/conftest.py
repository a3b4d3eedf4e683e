"""A search log in a folder of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from reir.operations.search_log import SearchLog


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "searches"


@pytest.fixture
def log(folder: Path) -> Iterator[SearchLog]:
    made = SearchLog(folder)
    yield made
    made.close()
