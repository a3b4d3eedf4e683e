"""Files that have broken indexing jobs: each gets a ledger row with the right reason."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from reir.errors import ImageFailure
from reir.images.decode import canonical_uri, image_id
from reir.images.tiling import Tiling
from reir.images.views import ViewSettings
from reir.images.zoom import Zoom
from reir.store.memory import MemoryStore
from reir_ingestion.pipeline import IndexOptions, index
from reir_testing import FakeEncoder
from reir_testing.ingestion import (
    HostileFile,
    write_hostile_files,
    write_hostile_sizes,
    write_scenes,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_scenes(tmp_path / "photos", 12)
    return tmp_path / "photos"


@pytest.mark.timeout(60)
def test_hostile_files_get_the_right_reason_and_good_photos_are_found(folder: Path) -> None:
    good = sorted(folder.iterdir())
    hostile = write_hostile_files(folder, 60, seed=4)
    assert len({file.path for file in hostile}) == 60
    assert len({file.kind for file in hostile}) >= 15
    store, encoder = MemoryStore(), FakeEncoder()
    report = index(folder, "g", store, encoder, options=IndexOptions(batch_size=5))
    version = store.live_version("g")
    expected = Counter(file.reason.value for file in hostile if file.reason)
    assert report.failed == expected
    assert report.new == len(good) + sum(file.reason is None for file in hostile)
    ids = {image_id(canonical_uri(file.path)): file for file in hostile}
    rows = store.get_images("g", version, list(ids))
    wrong = [
        (file, rows[key].reason)
        for key, file in ids.items()
        if rows[key].reason != (file.reason.value if file.reason else "")
    ]
    assert wrong == []
    assert all(row.detail.isascii() and row.detail for row in rows.values() if row.reason)
    sound = [*map(str, good), *(file.path for file in hostile if file.reason is None)]
    for path in sound:
        key = image_id(canonical_uri(path))
        (own,) = store.get_instances("g", version, [key], with_vectors=True).values()
        assert own, path
        vector = own[0].vector
        assert vector is not None
        (hits,) = store.search("g", version, vector[None], 100)
        assert own[0].instance_id in {hit.instance_id for hit in hits if hit.score > 1 - 1e-5}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("views", [None, Zoom(above_px=1), Tiling(above_px=1)], ids=str)
def test_every_size_ends_in_instances_or_a_reason(
    tmp_path: Path, views: ViewSettings | None
) -> None:
    files = write_hostile_sizes(tmp_path / "sizes", 30)
    assert {file.reason for file in files} == {None, ImageFailure.TOO_LARGE}
    store = MemoryStore()
    index(tmp_path / "sizes", "g", store, FakeEncoder(), options=IndexOptions(views=views))
    ids = [image_id(canonical_uri(file.path)) for file in files]
    rows = store.get_images("g", store.live_version("g"), ids)
    wrong = [
        file
        for key, file in zip(ids, files, strict=True)
        if rows[key].reason != (file.reason.value if file.reason else "")
    ]
    assert wrong == []


def test_the_hostile_files_depend_only_on_the_seed(tmp_path: Path) -> None:
    one, other = (write_hostile_files(tmp_path / name, 28, seed=1) for name in ("a", "b"))

    def summary(files: list[HostileFile]) -> list[tuple[str, str, object]]:
        return [(os.path.basename(file.path), file.kind, file.reason) for file in files]

    assert summary(one) == summary(other)
    regular = [file.path for file in one if os.path.isfile(file.path)]
    for path in regular:
        twin = path.replace(str(tmp_path / "a"), str(tmp_path / "b"))
        assert Path(path).read_bytes() == Path(twin).read_bytes()
