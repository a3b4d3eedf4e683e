"""What the job does when the model or the store refuses."""

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
from reir.images import canonical_uri, image_id
from reir.models.seams import RgbImage
from reir.records import IndexedImage, Instances
from reir.store.memory import MemoryStore
from reir.testing import FakeEncoder
from reir_ingestion import contents, loading, stages
from reir_ingestion.pipeline import IndexOptions, index
from reir_ingestion.sources import local
from reir_ingestion.stages import encode_each
from reir_ingestion.testing import random_scene
from reir_ingestion.writer import patiently


class PickyEncoder(FakeEncoder):
    """Refuses photos whose first pixel is white."""

    error: type[Exception] = ValueError

    def encode_images(self, images: Sequence[RgbImage]) -> list[Instances]:
        if any(image[0, 0].min() > 250 for image in images):
            raise self.error("white corner\nand more")
        return super().encode_images(images)


@pytest.mark.parametrize("error", [ValueError, RuntimeError, MemoryError])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_a_photo_that_the_model_refuses_does_not_take_others_with_it(
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

    def hungry(*given: object, **named: object) -> object:
        if next(calls) == 3:
            raise MemoryError
        return works(*given, **named)

    monkeypatch.setattr(module, stage, hungry)
    report = index(photos, "g", store, FakeEncoder())
    assert (report.new, report.failed) == (19, {"too_large": 1})


def test_encode_each_matches_one_by_one() -> None:
    rng = random.Random(3)
    images = [random_scene(rng) for _ in range(6)]
    images[2][0, 0] = images[5][0, 0] = 255
    answers = encode_each(PickyEncoder(), images)
    for image, answer in zip(images, answers, strict=True):
        if image[0, 0, 0] == 255:
            assert isinstance(answer, ImageError)
            continue
        (expected,) = FakeEncoder().encode_images([image])
        assert isinstance(answer, Instances)
        np.testing.assert_array_equal(answer.vectors, expected.vectors)
    assert encode_each(PickyEncoder(), []) == []


def test_a_model_that_refuses_everything_stops_the_job(
    store: MemoryStore, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "MAX_REFUSED_IN_A_ROW", 10)

    class Broken(FakeEncoder):
        def encode_images(self, images: Sequence[RgbImage]) -> list[Instances]:
            raise RuntimeError(f"device lost with {len(images)} images")

    with pytest.raises(CheckpointError, match=r"refused 10 images in a row.*device lost"):
        index(photos, "g", store, Broken(), options=IndexOptions(batch_size=4))


def test_a_model_that_loses_count_stops_the_job(store: MemoryStore, photos: Path) -> None:
    class Forgetful(FakeEncoder):
        def encode_images(self, images: Sequence[RgbImage]) -> list[Instances]:
            return super().encode_images(images)[:-1]

    with pytest.raises(CheckpointError, match="gave 15 answers for 16 images"):
        index(photos, "g", store, Forgetful())


def test_a_store_that_comes_back_is_waited_for(
    store: MemoryStore, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contents, "patiently", partial(patiently, pauses_s=(0.0,)))
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


def test_a_store_that_is_still_building_its_index_is_a_warning(
    store: MemoryStore,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked: list[tuple[int, float]] = []

    def unsettled(_gallery: str, _version: str, *, fresh: int, within_s: float) -> bool:
        asked.append((fresh, within_s))
        return False

    monkeypatch.setattr(store, "settle", unsettled)
    written = index(photos, "g", store, FakeEncoder()).instances
    assert asked == [(written, 600.0)]
    assert "has not indexed the last instances" in caplog.text
    index(photos, "g", store, FakeEncoder())
    assert len(asked) == 1, "nothing was written"


def test_a_store_that_does_not_let_settle_is_a_warning(
    store: MemoryStore,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(*_: object, **__: object) -> bool:
        raise StoreError("permission denied")

    monkeypatch.setattr(store, "settle", refuse)
    assert index(photos, "g", store, FakeEncoder()).new == 20
    assert "permission denied" in caplog.text
