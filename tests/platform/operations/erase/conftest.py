"""Stores of all kinds with a small gallery, and folders for what is kept beside them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from reir.operations.erase.places import ErasePlaces
from reir.store import InstanceStore, open_store
from reir_testing.operations.erased_gallery import fill


@pytest.fixture(params=["memory", "embedded"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[InstanceStore]:
    location = "memory:" if request.param == "memory" else str(tmp_path / "store")
    with closing(open_store(location)) as opened:
        fill(opened, "v1", "v2")
        yield opened


@pytest.fixture
def places(tmp_path: Path) -> ErasePlaces:
    return ErasePlaces(
        uploads=tmp_path / "uploads",
        search_log=tmp_path / "searches",
        reports=tmp_path / "reports",
    )
