"""`Service` with several checkpoints: of pinned and promoted versions, and replaced in place."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from reir.errors import CheckpointError, GalleryNotFound, Overloaded, SchemaMismatch
from reir.images.decode import canonical_uri, image_id
from reir.models.interfaces import InstanceEncoder
from reir.query import every_photo
from reir.query.every_photo import EveryPhotoQuery
from reir.query.photo_curve import PhotoCurve
from reir.query.request import Query, Term
from reir.query.search import CheckpointExtras
from reir.records import FloatArray, Instances
from reir.results import SearchResult
from reir.store.memory import MemoryStore
from reir_serving.backend.models import MISSING_FOR_S, LoadedModel, ModelCache, ModelKey
from reir_serving.backend.service import Service
from reir_serving.backend.workers import SearchWorkers
from reir_serving.config import LiveSettings, ServeConfig
from reir_testing import FakeEncoder
from reir_testing.evaluation.calibrations import score_calibration
from reir_testing.fake_models import BetterEncoder
from reir_testing.serving import SCENES, draw_photo, index_photos

T = TypeVar("T")
OLD, NEW = FakeEncoder().digest, "retrained"
FOLDER = "clare:/model"


class RetrainedEncoder(FakeEncoder):
    """A model whose vectors are those of `FakeEncoder` in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.digest = NEW

    def encode_images(self, images: Any) -> list[Instances]:
        found = super().encode_images(images)
        for each in found:
            each.vectors[:] = np.roll(each.vectors, 3, axis=1)
        return found

    def encode_expressions(self, expressions: Any) -> Any:
        return np.roll(super().encode_expressions(expressions), 3, axis=1)


class Disk:
    """Checkpoint folders: the encoder of each spec, and the specs in the order of their loads."""

    def __init__(self) -> None:
        self.encoders: dict[str, type[InstanceEncoder]] = {
            FOLDER: FakeEncoder,
            "better:x": BetterEncoder,
        }
        self.loads: list[str] = []

    def load(self, spec: str) -> LoadedModel:
        self.loads.append(spec)
        if spec not in self.encoders:
            raise CheckpointError(f"{spec} is not a checkpoint")
        encoder = self.encoders[spec]()
        curve = PhotoCurve(thresholds=(0.3, 0.9), recalls=(0.9, 0.5), false_alarms=(0.1, 0.01))
        calibration = score_calibration(encoder.digest, 10, -5, photo_curve=curve)
        return LoadedModel(encoder, CheckpointExtras(calibration=calibration))


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let promotions take effect at once."""
    monkeypatch.setattr("reir_serving.backend.workers.LIVE_STALE_S", 0.0)
    monkeypatch.setattr("reir_serving.backend.workers.LIVE_FRESH_S", 0.0)


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    return [draw_photo(tmp_path / "photos", scene) for scene in SCENES]


@pytest.fixture
def store(photos: list[Path]) -> MemoryStore:
    """A store with the version `v1` of gallery `g`."""
    store = MemoryStore()
    index_photos(store, "g", photos, spec=FOLDER)
    return store


@pytest.fixture
def make(tmp_path: Path, store: MemoryStore, disk: Disk) -> Callable[..., Service]:
    def make_service(**options: Any) -> Service:
        config = ServeConfig.model_validate({"store": "memory:", **options})
        workers = SearchWorkers(store, ModelCache(disk.load), config.limits)
        return Service(config, store, workers, tmp_path / "uploads")

    return make_service


@pytest.fixture
def service(make: Callable[..., Service]) -> Service:
    return make()


def promote_other(store: MemoryStore, photos: list[Path]) -> None:
    """Make a version `v2` of another checkpoint live."""
    index_photos(store, "g", photos, "v2", BetterEncoder(), spec="better:x")


def retrain(store: MemoryStore, disk: Disk, photos: list[Path]) -> None:
    """Replace the checkpoint in its folder, and make a version `v2` of the new one live."""
    disk.encoders[FOLDER] = RetrainedEncoder
    index_photos(store, "g", photos, "v2", RetrainedEncoder(), spec=FOLDER)


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(coroutine)


def search(service: Service, gallery: str = "g") -> SearchResult:
    query = Query(terms=(Term(expression="the green one"),), k=1)
    (result,) = run(service.search(gallery, [query]))
    return result


def stored_vectors(store: MemoryStore, version: str, key: str) -> FloatArray:
    return store.get_photos("g", version, [key])[key].vectors


def id_of(path: Path) -> str:
    return image_id(canonical_uri(path))


def test_a_pinned_version_is_searched_although_another_checkpoint_is_live(
    make: Callable[..., Service], store: MemoryStore, photos: list[Path]
) -> None:
    promote_other(store, photos)
    service = make(galleries=["g"], live={"pinned": {"g": "v1"}})
    run(service.warm_up())
    assert (search(service).version, search(service).digest) == ("v1", OLD)
    assert run(service.readiness()).ready
    service.live = LiveSettings()
    assert search(service).version == "v2"
    service.live = LiveSettings(pinned={"g": "v1"})
    assert search(service).version == "v1"
    service.live = LiveSettings(pinned={"g": "v9"})
    with pytest.raises(GalleryNotFound, match="has no version 'v9'; it has v1, v2"):
        search(service)


def test_a_photo_gets_the_vectors_of_the_pinned_version(
    service: Service, store: MemoryStore, disk: Disk, photos: list[Path], tmp_path: Path
) -> None:
    disk.encoders["retrained:x"] = RetrainedEncoder
    index_photos(store, "g", photos, "v2", RetrainedEncoder(), spec="retrained:x")
    assert search(service).version == "v2"
    service.live = LiveSettings(pinned={"g": "v1"})
    data = draw_photo(tmp_path / "mine", "green").read_bytes() + b" "  # not yet in the gallery
    record = run(service.add_image("g", data, "mine.png", {}))
    indexed = stored_vectors(store, "v1", id_of(photos[-1]))
    assert np.array_equal(stored_vectors(store, "v1", record.image_id), indexed)


def test_a_checkpoint_that_was_replaced_in_its_folder_is_loaded(
    service: Service, store: MemoryStore, disk: Disk, photos: list[Path], tmp_path: Path
) -> None:
    assert search(service).digest == OLD
    retrain(store, disk, photos)
    data = draw_photo(tmp_path / "mine", "green").read_bytes() + b" "
    record = run(service.add_image("g", data, "mine.png", {}))
    indexed = stored_vectors(store, "v2", id_of(photos[-1]))
    assert np.array_equal(stored_vectors(store, "v2", record.image_id), indexed)
    result = search(service)
    assert (result.version, result.digest) == ("v2", NEW)
    assert result.hits[0].uri.endswith(("/green.png", "/mine.png"))
    assert disk.loads == [FOLDER, FOLDER]


def test_a_photo_is_refused_if_the_model_of_its_version_is_gone(
    service: Service, store: MemoryStore, disk: Disk, photos: list[Path], tmp_path: Path
) -> None:
    retrain(store, disk, photos)
    service.live = LiveSettings(pinned={"g": "v1"})
    data = draw_photo(tmp_path / "mine", "green").read_bytes() + b" "
    for _ in range(3):
        with pytest.raises(SchemaMismatch, match=f"'{FOLDER}' now has checkpoint retrained"):
            run(service.add_image("g", data, "mine.png", {}))
        with pytest.raises(SchemaMismatch, match="Put that one back"):
            search(service)
    assert disk.loads == [FOLDER], "a missing checkpoint must not be loaded by each request"
    assert not (tmp_path / "uploads").exists()
    service.live = LiveSettings()
    assert search(service).digest == NEW


def test_other_galleries_keep_the_model_that_was_replaced(
    service: Service, store: MemoryStore, disk: Disk, photos: list[Path]
) -> None:
    index_photos(store, "other", photos, spec=FOLDER)
    assert search(service, "other").digest == OLD
    retrain(store, disk, photos)
    for _ in range(2):
        for gallery, digest in (("g", NEW), ("other", OLD)):
            result = search(service, gallery)
            assert result.digest == digest
            assert result.hits[0].uri.endswith("/green.png")
    assert disk.loads == [FOLDER, FOLDER]


def test_a_missing_checkpoint_is_looked_for_again_after_a_while(disk: Disk) -> None:
    clock = [0.0]
    models = ModelCache(disk.load, lambda: clock[0])
    retrained = ModelKey(FOLDER, NEW)
    for clock[0] in (0.0, MISSING_FOR_S - 1):
        with pytest.raises(SchemaMismatch):
            models.get(retrained)
    assert models.get(ModelKey(FOLDER)).encoder.digest == OLD
    disk.encoders[FOLDER] = RetrainedEncoder
    with pytest.raises(SchemaMismatch):
        models.get(retrained)
    assert disk.loads == [FOLDER]
    clock[0] = MISSING_FOR_S
    assert models.get(retrained).encoder.digest == NEW
    assert models.get(ModelKey(FOLDER)) is models.get(retrained)
    disk.encoders[FOLDER] = BetterEncoder
    models.get(ModelKey(FOLDER, BetterEncoder().digest))
    with pytest.raises(SchemaMismatch):  # only two models of a folder are kept
        models.get(ModelKey(FOLDER, OLD))


def test_a_loaded_model_does_not_wait_for_another_one(disk: Disk) -> None:
    loading, finish = threading.Event(), threading.Event()

    def load(spec: str) -> LoadedModel:
        if spec != FOLDER:
            loading.set()
            assert finish.wait(30)
        return disk.load(spec)

    models = ModelCache(load)
    loaded = models.get(ModelKey(FOLDER))
    with ThreadPoolExecutor(3) as pool:
        slow = [pool.submit(models.get, ModelKey("better:x")) for _ in range(2)]
        assert loading.wait(30)
        try:
            fast = pool.submit(models.get, ModelKey(FOLDER))
            assert fast.result(timeout=5) is loaded
        finally:
            finish.set()
        first, second = (each.result() for each in slow)
    assert first is second
    assert disk.loads == [FOLDER, "better:x"]


def test_a_gallery_without_its_checkpoint_does_not_keep_the_others_from_being_served(
    make: Callable[..., Service],
    store: MemoryStore,
    photos: list[Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    index_photos(store, "broken", photos, spec="clare:/gone")
    service = make()
    with caplog.at_level(logging.ERROR):
        run(service.warm_up())
    assert "gallery 'broken' cannot be searched: clare:/gone is not a checkpoint" in caplog.text
    loaded = {info.name: info.loaded for info in run(service.galleries())}
    assert loaded == {"broken": False, "g": True}
    with pytest.raises(CheckpointError, match="clare:/gone"):
        run(make(galleries=["g", "broken"]).warm_up())


def test_the_server_stays_ready_after_a_promotion_to_another_checkpoint(
    make: Callable[..., Service], store: MemoryStore, photos: list[Path]
) -> None:
    service = make(galleries=["g"])
    run(service.warm_up())
    promote_other(store, photos)
    assert run(service.readiness()).checks == {"store": "ok", "gallery g": "ok"}
    assert run(service.readiness()).ready


def test_a_server_with_a_full_queue_is_ready(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(service.warm_up())

    async def full(*_: object) -> None:
        raise Overloaded("the queue of text", 1.0)

    monkeypatch.setattr(service._workers, "encode", full)
    assert run(service.readiness()).checks == {"store": "ok", "gallery g": "ok"}


def test_a_gallery_whose_model_is_gone_stays_unready(
    service: Service, store: MemoryStore, disk: Disk, photos: list[Path]
) -> None:
    run(service.warm_up())
    index_photos(store, "g", photos, "v2", RetrainedEncoder(), spec="clare:/gone")
    for _ in range(2):
        readiness = run(service.readiness())
        assert not readiness.ready
        assert "clare:/gone is not a checkpoint" in readiness.checks["gallery g"]


@pytest.mark.parametrize("is_new_replica", [False, True])
def test_a_search_for_every_photo_goes_on_after_a_promotion_to_another_checkpoint(
    service: Service,
    store: MemoryStore,
    photos: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    is_new_replica: bool,
) -> None:
    monkeypatch.setattr(every_photo, "FIRST_PHOTOS", 1)
    monkeypatch.setattr(every_photo, "PART_PHOTOS", 2)

    async def scan() -> list[str]:
        begun = await service.every_photo(
            "g", EveryPhotoQuery(expression="the green one", min_presence=0.0)
        )
        promote_other(store, photos)
        if is_new_replica:
            service._workers._retrievers.clear()
        return [photo.image_id async for part in begun.parts() for photo in part.photos]

    assert sorted(run(scan())) == sorted(map(id_of, photos))
    assert search(service).version == "v2"
