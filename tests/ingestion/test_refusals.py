"""Indexing when the model or the store refuses."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reir.errors import CheckpointError, ImageError, StoreError, StoreUnavailable
from reir.images.decode import canonical_uri, image_id
from reir.records import IndexedImage, Instances, RgbImage
from reir.store.memory import MemoryStore
from reir_ingestion import content_index, loading, stages
from reir_ingestion.pipeline import IndexOptions, index
from reir_ingestion.retries import call_with_retries
from reir_ingestion.sources import local
from reir_ingestion.stages import encode_images_or_fail
from reir_testing import FakeEncoder
from reir_testing.ingestion import random_scene


class PickyEncoder(FakeEncoder):
    """Refuses photos whose first pixel is white."""

    error: type[Exception] = ValueError

    def encode_images(self, images: Sequence[RgbImage]) -> list[Instances]:
        if any(image[0, 0].min() > 250 for image in images):
            raise self.error("white corner\nand more")
        return super().encode_images(images)


@pytest.mark.parametrize("error", [ValueError, RuntimeError, MemoryError])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_a_photo_that_the_model_refuses_fails_alone(
    store: MemoryStore, photos: Path, error: type[Exception], batch_size: int
) -> None:
    white = np.full((120, 160, 3), 255, dtype=np.uint8)
    for number in (3, 11, 12):
        Image.fromarray(white).save(photos / f"{number:03}.png")
    encoder = PickyEncoder()
    encoder.error = error
    names = {path.name for path in photos.iterdir()}
    report = index(photos, "g", store, encoder, options=IndexOptions(batch_size=batch_size))
    assert report.failed == {"not_encoded": 3}
    assert report.new == len(names) - 3
    key = image_id(canonical_uri(photos / "003.png"))
    row = store.get_images("g", store.live_version("g"), [key])[key]
    assert (row.width_px, row.detail) == (160, f"{error.__name__}: white corner")
    report = index(photos, "g", store, FakeEncoder())
    assert report.failed_before == 3
    report = index(photos, "g", store, FakeEncoder(), options=IndexOptions(retry_failed=True))
    assert (report.num_failed, report.changed) == (0, 3)


@pytest.mark.parametrize("stage", ["read_bytes", "decode", "perceptual_hash"])
def test_running_out_of_memory_fails_only_that_photo_in_every_stage(
    store: MemoryStore, photos: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    module = local if stage == "read_bytes" else loading
    works, calls = getattr(module, stage), iter(range(99))

    def run_out_of_memory(*given: object, **named: object) -> object:
        if next(calls) == 3:
            raise MemoryError
        return works(*given, **named)

    monkeypatch.setattr(module, stage, run_out_of_memory)
    report = index(photos, "g", store, FakeEncoder())
    assert (report.new, report.failed) == (19, {"too_large": 1})


def test_encoding_with_failures_equals_encoding_one_by_one() -> None:
    rng = random.Random(3)
    images = [random_scene(rng) for _ in range(6)]
    images[2][0, 0] = images[5][0, 0] = 255
    answers = encode_images_or_fail(PickyEncoder(), images)
    for image, answer in zip(images, answers, strict=True):
        if image[0, 0, 0] == 255:
            assert isinstance(answer, ImageError)
            continue
        (expected,) = FakeEncoder().encode_images([image])
        assert isinstance(answer, Instances)
        np.testing.assert_array_equal(answer.vectors, expected.vectors)
    assert encode_images_or_fail(PickyEncoder(), []) == []


def test_a_model_that_refuses_everything_stops_the_job(
    store: MemoryStore, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "MAX_CONSECUTIVE_REFUSALS", 10)

    class BrokenEncoder(FakeEncoder):
        def encode_images(self, images: Sequence[RgbImage]) -> list[Instances]:
            raise RuntimeError(f"device lost with {len(images)} images")

    with pytest.raises(CheckpointError, match=r"refused 10 images in a row.*device lost"):
        index(photos, "g", store, BrokenEncoder(), options=IndexOptions(batch_size=4))


def test_a_wrong_number_of_results_stops_the_job(store: MemoryStore, photos: Path) -> None:
    class MiscountingEncoder(FakeEncoder):
        def encode_images(self, images: Sequence[RgbImage]) -> list[Instances]:
            return super().encode_images(images)[:-1]

    with pytest.raises(CheckpointError, match="returned 15 results for 16 images"):
        index(photos, "g", store, MiscountingEncoder())


def test_writes_are_retried_until_the_store_is_back(
    store: MemoryStore, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        content_index, "call_with_retries", partial(call_with_retries, pauses_s=(0.0,))
    )
    upsert, calls = store.upsert_images, []

    def flaky(gallery: str, version: str, images: Sequence[IndexedImage]) -> None:
        calls.append(len(images))
        if len(calls) % 2:
            raise StoreUnavailable("milvus:19530", "connection refused")
        upsert(gallery, version, images)

    monkeypatch.setattr(store, "upsert_images", flaky)
    report = index(photos, "g", store, FakeEncoder(), options=IndexOptions(batch_size=5))
    assert (report.new, len(calls)) == (20, 8)


def test_a_store_that_refuses_stops_the_job(
    store: MemoryStore, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise StoreError("disk full")

    monkeypatch.setattr(store, "upsert_images", refuse)
    threads = threading.active_count()
    with pytest.raises(StoreError, match="disk full"):
        index(photos, "g", store, FakeEncoder(), options=IndexOptions(batch_size=2))
    assert threading.active_count() == threads


class IndexingStore(MemoryStore):
    """A store that counts as a server; it never builds its index, or fails with `error`."""

    error: StoreError | None = None

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[tuple[int, float]] = []

    def import_images(self, *_: object) -> None:
        raise AssertionError("must not be called")

    def wait_until_indexed(
        self, _gallery: str, _version: str, *, num_upserted: int, timeout_s: float
    ) -> bool:
        if self.error is not None:
            raise self.error
        self.waits.append((num_upserted, timeout_s))
        return False


def test_a_store_that_is_still_building_its_index_is_a_warning(
    photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = IndexingStore()
    written = index(photos, "g", store, FakeEncoder()).instances
    assert store.waits == [(written, 600.0)]
    assert "has not indexed the last instances" in caplog.text
    index(photos, "g", store, FakeEncoder())
    assert len(store.waits) == 1, "nothing was written"


def test_a_store_that_forbids_the_final_index_is_a_warning(
    photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = IndexingStore()
    store.error = StoreError("permission denied")
    assert index(photos, "g", store, FakeEncoder()).new == 20
    assert "permission denied" in caplog.text
