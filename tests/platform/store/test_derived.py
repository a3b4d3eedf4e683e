"""Filters on derived fields, in versions with and without columns for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from reir.errors import FilterError
from reir.records import ImageRecord, IndexedImage, Instances
from reir.store import VersionSpec, open_store, rows
from reir.store.embedded.embedded_store import EmbeddedStore
from reir.store.filters import Field, fields_of, parse
from reir.store.milvus_server import MilvusServerStore

QUERY = np.array([[1, 0]], dtype=np.float32)


def photo(image_id: str, boxes: list[list[float]]) -> IndexedImage:
    num = len(boxes)
    record = ImageRecord(
        image_id=image_id, uri=f"file:///{image_id}", status="indexed", num_instances=num
    )
    vectors = np.tile(QUERY, (num, 1))
    instances = Instances(np.array(boxes, np.float32), np.ones(num, np.float32), vectors, QUERY[0])
    return IndexedImage(record, instances)


def test_versions_with_and_without_derived_columns_give_the_same_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(str(tmp_path))
    store.create_version("g", "without", VersionSpec(dim=2, digest="d"))
    with monkeypatch.context() as patch:  # an earlier release created the columns here too
        patch.setattr(rows, "mask_columns", lambda _: rows.DERIVED_COLUMNS)
        store.create_version("g", "with", VersionSpec(dim=2, digest="d"))
    for version in ("without", "with"):
        store.upsert_images("g", version, [photo("a", [[0, 0, 0.5, 1]])])
    store.close()
    store = open_store(str(tmp_path))
    assert isinstance(store, EmbeddedStore)
    for version in ("without", "with"):
        store.upsert_images("g", version, [photo("b", [[0.5, 0, 1, 1], [0, 0, 1, 1]])])
        (hits,) = store.search("g", version, QUERY, 9, where="cx > 0.6 and neighbors == 1")
        assert [hit.instance_id for hit in hits] == ["b#0"]
        assert list(store.get_indexed("g", version, ["a", "b"])) == ["a", "b"]
    tree = parse("not (cx > 0.6) or attr.width == 1")
    server_store = MilvusServerStore(store._connection)  # writes filters as a server needs them
    assert "cx" in server_store._condition("g", "with", tree)
    with pytest.raises(FilterError, match="names cx, but version 'without' was indexed by an ear"):
        server_store._condition("g", "without", tree)
    assert server_store._condition("g", "without", parse("attr.cx > 0.6 and x1 > 0"))
    store.close()


def test_fields_of_a_filter() -> None:
    text = 'not (cx > 1 or attr.a in [1]) and uri startswith "x"'
    assert fields_of(parse(text)) == {Field("cx"), Field("a", attribute=True), Field("uri")}
