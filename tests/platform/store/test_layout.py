"""Galleries of an earlier release have fewer columns and can still be read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from reir.records import IndexedImage
from reir.store import VersionSpec, rows
from reir.store.embedded.embedded_store import EmbeddedStore

NEW_COLUMNS = {"same_as", "perceptual_hash"}


def test_a_gallery_of_an_earlier_release_can_be_read(
    open_lite: Callable[[Path], EmbeddedStore],
    make_image: Callable[..., IndexedImage],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images = [make_image("a"), make_image("b", 5)]
    whole_row = rows.ledger_row

    def old_row(image: IndexedImage, dim: int) -> dict[str, Any]:
        return {key: v for key, v in whole_row(image, dim).items() if key not in NEW_COLUMNS}

    with monkeypatch.context() as patch:
        columns = {k: v for k, v in rows.IMAGE_COLUMNS.items() if k not in NEW_COLUMNS}
        patch.setattr(rows, "IMAGE_COLUMNS", columns)
        patch.setattr(rows, "ledger_row", old_row)
        store = open_lite(tmp_path)
        store.create_version("g", "old", VersionSpec(dim=8, digest="ab" * 32))
        store.upsert_images("g", "old", images)
        store.promote("g", "old")
        store.close()
    store = open_lite(tmp_path)
    records = [image.record for image in images]
    assert list(store.iter_images("g", "old")) == records
    assert store.get_images("g", "old", ["a"]) == {"a": records[0]}
    assert store.find_content("g", "old", {records[0].content_hash}) == {
        records[0].content_hash: records
    }
    assert images[0].instances is not None
    (hits,) = store.search("g", "old", images[0].instances.vectors[:1], 10)
    assert len(hits) == 8
    store.touch_images("g", "old", {"a": 7})
    assert store.get_images("g", "old", ["a"]) == {"a": replace(records[0], mtime_ns=7)}
    assert store.delete_images("g", "old", ["a"]) == 1
    store.close()
