"""What was erased stays out of the gallery, whatever the source says."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from reir.images.decode import canonical_uri
from reir.operations.erase.erase import erase
from reir.operations.erase.places import ErasePlaces
from reir.operations.erase.selection import EraseScope
from reir.store import InstanceStore, open_store
from reir_ingestion.known_sources import known_source
from reir_ingestion.pipeline import index
from reir_ingestion.ray.runner import index_on_ray
from reir_ingestion.sources import SourceOptions, open_source
from reir_ingestion.stages import IndexOptions
from reir_ingestion.verify import verify
from reir_testing import FakeEncoder
from reir_testing.fake_models import LEFT, save_photo, save_photos

G = "photos"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return save_photos(tmp_path / "photos")


@pytest.fixture
def store(photos: Path, tmp_path: Path) -> Iterator[InstanceStore]:
    with closing(open_store(str(tmp_path / "store"))) as opened:
        options = IndexOptions(origin=known_source(photos, SourceOptions()))
        index(open_source(photos), G, opened, FakeEncoder(), options=options)
        yield opened


@pytest.fixture
def erase_red(store: InstanceStore, photos: Path, tmp_path: Path) -> Callable[[], None]:
    def run() -> None:
        places = ErasePlaces(
            uploads=tmp_path / "u", search_log=tmp_path / "s", reports=tmp_path / "r"
        )
        scope = EraseScope(photos=(str(photos / "red.png"),))
        erase(store, G, scope, places, settle_s=0)

    return run


def names(store: InstanceStore) -> set[str]:
    rows = store.iter_images(G, store.live_version(G))
    return {row.uri.rpartition("/")[2] for row in rows}


def test_the_same_source_does_not_bring_an_erased_photo_back(
    store: InstanceStore, photos: Path, erase_red: Callable[[], None]
) -> None:
    erase_red()
    report = index(open_source(photos), G, store, FakeEncoder())
    assert (report.new, report.unchanged, report.erased, report.read) == (0, 7, 1, 0)
    assert report.num_listed == 8
    assert "red.png" not in names(store)


def test_an_erased_photo_is_no_difference_to_the_source(
    store: InstanceStore, photos: Path, erase_red: Callable[[], None]
) -> None:
    erase_red()
    save_photo(photos / "late.png", "green", LEFT)
    report = verify(open_source(photos), G, store, store.live_version(G))
    assert (report.listed, report.differences["new"]) == (9, 1)
    index(open_source(photos), G, store, FakeEncoder())
    assert verify(open_source(photos), G, store, store.live_version(G)).is_consistent


def test_a_copy_under_another_name_is_recognized_by_its_content(
    store: InstanceStore, photos: Path, erase_red: Callable[[], None]
) -> None:
    erase_red()
    shutil.copy(photos / "red.png", photos / "copy.png")
    report = index(open_source(photos), G, store, FakeEncoder())
    assert (report.new, report.erased, report.read) == (0, 2, 0)
    assert names(store) == {path.name for path in photos.iterdir()} - {"red.png", "copy.png"}


def test_a_new_photo_under_an_erased_name_is_left_out_too(
    store: InstanceStore, photos: Path, erase_red: Callable[[], None]
) -> None:
    erase_red()
    save_photo(photos / "red.png", "blue", (1, 1, 20, 20))
    assert index(open_source(photos), G, store, FakeEncoder()).erased == 1


def test_an_erased_photo_comes_back_only_if_it_is_asked_for(
    store: InstanceStore, photos: Path, erase_red: Callable[[], None]
) -> None:
    erase_red()
    options = IndexOptions(include_erased=True)
    report = index(open_source(photos), G, store, FakeEncoder(), options=options)
    assert (report.new, report.erased) == (1, 0)
    assert "red.png" in names(store)
    report = index(open_source(photos), G, store, FakeEncoder())
    assert (report.unchanged, report.erased) == (8, 0), "from then on it is a photo like others"


def test_an_erasure_during_a_run_is_noticed(
    store: InstanceStore, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The photo was listed and encoded before the erasure, and is written after it."""
    monkeypatch.setattr("reir.operations.erase.tombstones.FRESH_S", 0.0)
    save_photo(photos / "late.png", "red", (2, 2, 80, 55))

    class ErasingEncoder(FakeEncoder):
        def encode_images(self, images):  # type: ignore[no-untyped-def]
            found = super().encode_images(images)
            places = ErasePlaces(
                uploads=tmp_path / "u", search_log=tmp_path / "s", reports=tmp_path / "r"
            )
            uri = canonical_uri(photos / "red.png")
            erase(store, G, EraseScope(photos=(uri,)), places, settle_s=0)
            return found

    save_photo(photos / "red.png", "red", (5, 5, 60, 50))  # changed, so it is encoded again
    index(open_source(photos), G, store, ErasingEncoder())
    assert "red.png" not in names(store)
    assert "late.png" in names(store)


@pytest.mark.slow
@pytest.mark.ray
def test_ray_leaves_erased_photos_out(
    store: InstanceStore, photos: Path, tmp_path: Path, erase_red: Callable[[], None]
) -> None:
    erase_red()
    shutil.copy(photos / "red.png", photos / "copy.png")
    save_photo(photos / "new.png", "green", LEFT)
    report = index_on_ray(open_source(photos), G, str(tmp_path / "store"), FakeEncoder)
    assert (report.erased, report.unchanged) == (2, 7)
    assert not names(store) & {"red.png", "copy.png"}
