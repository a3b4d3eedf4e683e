"""Stores of all kinds with a small gallery, and folders for what is kept beside them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from reir.operations.erase.places import ErasePlaces
from reir.store import InstanceStore, open_store
from reir_testing.operations.erased_gallery import GALLERY, fill

KINDS = ("canary", "erased", "erasing", "receipt", "reindex", "reindex-report", "source")


@pytest.fixture(params=["memory", "embedded", pytest.param("server", marks=pytest.mark.milvus)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[InstanceStore]:
    locations = {"memory": "memory:", "embedded": str(tmp_path / "store")}
    location = locations.get(request.param) or request.getfixturevalue("milvus_uri")
    with closing(open_store(location)) as opened:
        fill(opened, "v1", "v2")
        yield opened
        if request.param == "server":  # all tests share it
            opened.drop_gallery(GALLERY)
            for kind in KINDS:
                opened.delete_documents(kind, opened.find_documents(kind).keys())


@pytest.fixture
def places(tmp_path: Path) -> ErasePlaces:
    return ErasePlaces(
        uploads=tmp_path / "uploads",
        search_log=tmp_path / "searches",
        reports=tmp_path / "reports",
    )
