"""What a dry run estimates."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import pytest

from reir.store import open_store
from reir.store.memory import MemoryStore
from reir_ingestion.known_sources import known_source
from reir_ingestion.pipeline import index
from reir_ingestion.reindex.plan import make_plan
from reir_ingestion.reindex.run import ReindexRequest
from reir_ingestion.sources import SourceOptions, open_source
from reir_ingestion.stages import IndexOptions
from reir_testing import FakeEncoder
from reir_testing.repository import ROOT


def test_on_a_server_the_disk_is_estimated_from_what_was_measured(photos: Path) -> None:
    store = MemoryStore()
    options = IndexOptions(origin=known_source(photos, SourceOptions()), encoder_spec="")
    index(open_source(photos), "g", store, FakeEncoder(), options=options)
    # The address only says that the store is a server; `store` is in its place.
    server = "http://milvus:19530"
    plan = make_plan(store, server, "g", ReindexRequest(), FakeEncoder(), IndexOptions())
    (live,) = store.versions("g")
    figures = json.loads((ROOT / "benchmarks/results/scale_plan.json").read_text())["figures"]
    measured = figures["scale.disk_gib"] * 2**30 / figures["scale.instances"]
    assert plan.bytes_needed == pytest.approx(live.num_instances * measured, rel=0.05)
    assert plan.bytes_free is None


def test_other_galleries_of_an_embedded_store_do_not_count(photos: Path, tmp_path: Path) -> None:
    location = str(tmp_path / "store")
    options = IndexOptions(origin=known_source(photos, SourceOptions()), encoder_spec="")

    def needed() -> int:
        request = ReindexRequest()
        return make_plan(store, location, "g", request, FakeEncoder(), IndexOptions()).bytes_needed

    with closing(open_store(location)) as store:
        index(open_source(photos), "g", store, FakeEncoder(), options=options)
        alone = needed()
        index(open_source(photos), "g2", store, FakeEncoder(), options=options)
        assert needed() == pytest.approx(alone, rel=0.1)
    stored = sum(path.stat().st_size for path in Path(location).rglob("*") if path.is_file())
    assert 0.25 * stored < alone < 0.75 * stored
