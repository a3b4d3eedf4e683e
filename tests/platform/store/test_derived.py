"""Filter fields that are computed from the box or the photo, in versions that lack the columns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from reir.errors import FilterError
from reir.records import ImageRecord, IndexedImage, Instances
from reir.store import VersionSpec, open_store, rows
from reir.store.filters import Field, fields_of, parse
from reir.store.milvus import MilvusStore

QUERY = np.array([[1, 0]], dtype=np.float32)


def photo(image_id: str, boxes: list[list[float]]) -> IndexedImage:
    num = len(boxes)
    record = ImageRecord(
        image_id=image_id, uri=f"file:///{image_id}", status="indexed", num_instances=num
    )
    vectors = np.tile(QUERY, (num, 1))
    instances = Instances(np.array(boxes, np.float32), np.ones(num, np.float32), vectors, QUERY[0])
    return IndexedImage(record, instances)


def test_a_version_of_an_earlier_release_stays_readable_and_writable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(str(tmp_path))
    assert isinstance(store, MilvusStore)
    with monkeypatch.context() as earlier:
        earlier.setattr(rows, "DERIVED_COLUMNS", {})
        store.create_version("g", "old", VersionSpec(dim=2, digest="d"))
        store.upsert_images("g", "old", [photo("a", [[0, 0, 0.5, 1]])])
    store.close()
    store = open_store(str(tmp_path))
    assert isinstance(store, MilvusStore)
    store.create_version("g", "new", VersionSpec(dim=2, digest="d"))
    for version in ("old", "new"):
        store.upsert_images("g", version, [photo("b", [[0.5, 0, 1, 1], [0, 0, 1, 1]])])
        (hits,) = store.search("g", version, QUERY, 9, where="cx > 0.6 and neighbours == 1")
        assert [hit.instance_id for hit in hits] == ["b#0"]
    assert list(store.get_indexed("g", "old", ["a", "b"])) == ["a", "b"]
    tree = parse("not (cx > 0.6) or attr.width == 1")
    assert "cx" in store._condition("g", "new", tree)
    with pytest.raises(FilterError, match="names cx, which version 'old' of an earlier release"):
        store._condition("g", "old", tree)
    assert store._condition("g", "old", parse("attr.cx > 0.6 and x1 > 0"))
    store.close()


def test_fields_of_a_filter() -> None:
    text = 'not (cx > 1 or attr.a in [1]) and uri startswith "x"'
    assert fields_of(parse(text)) == {Field("cx"), Field("a", attribute=True), Field("uri")}
