"""`Service` without Ray and HTTP: searches, galleries, uploaded photos, health, limits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from reir.errors import (
    GalleryNotFound,
    ImageError,
    Overloaded,
    QueryError,
    SchemaMismatch,
    StoreUnavailable,
)
from reir.images.decode import canonical_uri, image_id
from reir.query.request import Query, Term
from reir.results import SearchResult
from reir.store import InstanceStore, VersionSpec
from reir.store.memory import MemoryStore
from reir_serving.backend.circuit_breaker import CircuitBreaker
from reir_serving.backend.models import LoadedModel, ModelCache, ModelKey, model_loader
from reir_serving.backend.service import SLICE_QUERIES, Service
from reir_serving.backend.workers import LIVE_FRESH_S, LIVE_STALE_S, SearchWorkers
from reir_serving.config import Limits, LiveSettings, ServeConfig
from reir_testing import FakeEncoder, FakeLocalizer
from reir_testing.serving import SCENES, SIZE_PX, draw_photo, index_photos

T = TypeVar("T")
Make = Callable[..., Service]


@pytest.fixture
def store(tmp_path: Path) -> MemoryStore:
    """A store that holds the gallery `g`."""
    store = MemoryStore()
    index_photos(store, "g", [draw_photo(tmp_path / "photos", scene) for scene in SCENES])
    return store


@pytest.fixture
def make(tmp_path: Path, store: MemoryStore) -> Make:
    """Return a function that creates a service; its options are those of `ServeConfig`."""

    def make_service(over: InstanceStore = store, **options: object) -> Service:
        config = ServeConfig.model_validate({"store": "memory:", **options})
        workers = SearchWorkers(
            over, ModelCache(lambda _: LoadedModel(FakeEncoder())), config.limits
        )
        return Service(config, over, workers, tmp_path / "uploads")

    return make_service


@pytest.fixture
def service(make: Make) -> Service:
    return make()


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(coroutine)


def ask(expression: str, **options: Any) -> Query:
    return Query(terms=(Term(expression=expression),), **options)


def search(service: Service, expression: str, gallery: str = "g", **options: Any) -> SearchResult:
    (result,) = run(service.search(gallery, [ask(expression, **options)]))
    return result


def first(result: SearchResult) -> str:
    return result.hits[0].uri.rpartition("/")[2]


def test_a_result_names_its_version_and_checkpoint(service: Service) -> None:
    result = search(service, "the red one on the left")
    assert first(result) == "red-left.png"
    assert (result.gallery, result.version, result.digest) == ("g", "v1", FakeEncoder().digest)
    assert {"text", "search", "rank"} <= result.timings_ms.keys()


def test_concurrent_searches_have_the_same_results_as_single_ones(service: Service) -> None:
    texts = ["the red one on the left", "the green one", "the red one on the right"] * 5

    async def together() -> list[list[SearchResult]]:
        return await asyncio.gather(*(service.search("g", [ask(text)]) for text in texts))

    lone = {text: search(service, text).hits for text in set(texts)}
    for text, (result,) in zip(texts, run(together()), strict=True):
        assert result.expression == text
        assert [hit.instance_id for hit in result.hits] == [h.instance_id for h in lone[text]]


def test_an_invalid_query_makes_no_other_query_fail(service: Service) -> None:
    async def together() -> Any:
        good = service.search("g", [ask("the green one")])
        bad = service.search("g", [ask("the green one", where="nonsense > 1")])
        return await asyncio.gather(good, bad, return_exceptions=True)

    good, bad = run(together())
    assert isinstance(good, list)
    assert first(good[0]) == "green.png"
    assert isinstance(bad, QueryError)


def test_only_the_configured_galleries_are_served(
    make: Make, store: MemoryStore, tmp_path: Path
) -> None:
    index_photos(store, "other", [draw_photo(tmp_path / "other", "green")])
    service = make(galleries=["g"])
    assert [info.name for info in run(service.galleries())] == ["g"]
    with pytest.raises(GalleryNotFound, match="does not serve a gallery 'other', only: g"):
        search(service, "the green one", gallery="other")
    with pytest.raises(GalleryNotFound, match="no gallery 'nope'"):
        search(make(), "the green one", gallery="nope")


def test_a_gallery_is_loaded_after_the_warm_up(service: Service) -> None:
    (before,) = run(service.galleries())
    run(service.warm_up())
    (after,) = run(service.galleries())
    assert (before.live, before.loaded, after.loaded) == ("v1", False, True)


def test_a_promotion_takes_effect_within_a_second(
    service: Service, store: MemoryStore, tmp_path: Path
) -> None:
    assert search(service, "the green one").version == "v1"
    index_photos(store, "g", [draw_photo(tmp_path / "new", "green")], version="v2")
    run(asyncio.sleep(LIVE_FRESH_S))
    search(service, "the green one")  # starts to read the live version, but does not wait for it
    run(asyncio.sleep(0.05))
    assert search(service, "the green one").version == "v2"
    assert len(search(service, "the green one").hits) == 1


def test_a_promotion_takes_effect_at_once_after_an_idle_time(
    service: Service, store: MemoryStore, tmp_path: Path
) -> None:
    assert search(service, "the green one").version == "v1"
    index_photos(store, "g", [draw_photo(tmp_path / "new", "green")], version="v2")
    run(asyncio.sleep(LIVE_STALE_S))
    assert search(service, "the green one").version == "v2"


def test_a_version_can_be_pinned_while_the_service_runs(
    service: Service, store: MemoryStore, tmp_path: Path
) -> None:
    index_photos(store, "g", [draw_photo(tmp_path / "new", "green")], version="v2")
    service.live = LiveSettings(pinned={"g": "v1"})
    assert search(service, "the green one").version == "v1"
    service.live = LiveSettings()
    assert search(service, "the green one").version == "v2"


def test_a_promotion_to_another_checkpoint_loads_its_model(
    make: Make, store: MemoryStore, tmp_path: Path
) -> None:
    class NewerEncoder(FakeEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.digest = "newer"

    config = ServeConfig(store="memory:")
    models = ModelCache(
        lambda spec: LoadedModel(NewerEncoder() if spec == "newer" else FakeEncoder())
    )
    service = Service(config, store, SearchWorkers(store, models, config.limits), tmp_path)
    assert search(service, "the green one").version == "v1"

    images = store.get_indexed("g", "v1", [row.image_id for row in store.iter_images("g", "v1")])
    spec = VersionSpec(dim=FakeEncoder.dim, digest="newer", encoder="newer")
    store.create_version("g", "v2", spec)
    store.upsert_images("g", "v2", list(images.values()))
    store.promote("g", "v2")
    run(asyncio.sleep(LIVE_STALE_S))
    photo = (tmp_path / "photos" / "green.png").read_bytes()
    vector = run(service.vector_of("g", photo, None))
    assert run(service.search("g", [Query(terms=(Term(vector=vector),))]))[0].digest == "newer"
    assert search(service, "the green one").digest == "newer"

    store.promote("g", "v1")
    run(asyncio.sleep(LIVE_STALE_S))
    with pytest.raises(SchemaMismatch):  # the vector is one of the model that is live no longer
        run(service.search("g", [Query(terms=(Term(vector=vector),))]))
    assert search(service, "the green one").version == "v1"
    store.promote("g", "v2")
    run(asyncio.sleep(LIVE_STALE_S))

    with pytest.raises(SchemaMismatch, match="reir index SOURCE --gallery g"):
        search(make(encoder="clare-nano"), "the green one")


def test_a_query_without_a_budget_gets_the_default_budget(service: Service) -> None:
    service.live = LiveSettings(budget_ms=1000)
    assert first(search(service, "the green one")) == "green.png"


def test_a_photo_can_be_added_found_shown_and_deleted(service: Service, tmp_path: Path) -> None:
    data = draw_photo(tmp_path / "mine", "red-left").read_bytes()
    before = len(search(service, "the red one", k=100).hits)
    record = run(service.add_image("g", data, "../mine.png", {"shelf": 3}))
    assert record.uri.endswith("/mine.png")
    assert "uploads/g/" in record.uri
    assert len(search(service, "the red one", k=100).hits) == before + 1
    (hit,) = search(service, "the red one", where="attr.shelf == 3").hits
    assert hit.image_id == record.image_id
    shown = run(service.image("g", record.image_id))
    assert shown is not None
    assert len(shown.instances) == record.num_instances == 2
    assert run(service.photo("g", record.image_id)) == data

    again = run(service.add_image("g", data, "mine.png", {}))
    assert again.image_id == record.image_id
    assert run(service.delete_image("g", record.image_id))
    assert not run(service.delete_image("g", record.image_id))
    assert run(service.photo("g", record.image_id)) is None
    assert list((tmp_path / "uploads").rglob("*.png")) == []
    assert len(search(service, "the red one", k=100).hits) == before


def test_a_file_that_is_no_photo_is_not_stored(service: Service, tmp_path: Path) -> None:
    with pytest.raises(ImageError):
        run(service.add_image("g", b"no photo", "a.png", {}))
    assert not (tmp_path / "uploads").exists()


def test_deleting_an_indexed_photo_keeps_its_file(service: Service, tmp_path: Path) -> None:
    path = tmp_path / "photos" / "green.png"
    key = image_id(canonical_uri(path))
    assert run(service.delete_image("g", key))
    assert run(service.image("g", key)) is None
    assert path.exists()


def test_a_photo_whose_file_was_deleted_has_a_record_but_no_bytes(
    service: Service, tmp_path: Path
) -> None:
    path = tmp_path / "photos" / "green.png"
    path.unlink()
    assert run(service.image("g", image_id(canonical_uri(path)))) is not None
    with pytest.raises(ImageError, match="does not exist"):
        run(service.photo("g", image_id(canonical_uri(path))))


def test_an_instance_of_an_uploaded_photo_can_be_searched_for(
    service: Service, tmp_path: Path
) -> None:
    data = draw_photo(tmp_path / "mine", "red-left").read_bytes()
    vector = run(service.vector_of("g", data, (0.0, 0.1, 0.4, 0.9)))
    query = Query(terms=(Term(vector=vector),))
    (result,) = run(service.search("g", [query]))
    assert first(result) == "red-left.png"
    whole = run(service.vector_of("g", data, None))
    assert not np.array_equal(vector, whole)
    with pytest.raises(QueryError, match="overlaps none of the 2 instances"):
        run(service.vector_of("g", data, (0.45, 0.0, 0.5, 0.05)))


def test_an_expression_is_found_in_an_uploaded_photo(service: Service, tmp_path: Path) -> None:
    data = draw_photo(tmp_path / "mine", "red-left").read_bytes()
    found = run(service.localize(data, "the blue one", 5, masks=False))
    assert (found.width_px, found.height_px, found.present) == (*SIZE_PX, True)
    assert [round(x * SIZE_PX[0]) for x in found.boxes[0].box[::2]] == [40, 60]
    assert len(found.boxes) == 2
    assert {"decode", "localize"} <= found.timings_ms.keys()
    with pytest.raises(QueryError, match="expression"):
        run(service.localize(data, " ", 5, masks=False))


def test_requests_are_rejected_if_the_queue_of_photos_is_full(make: Make, tmp_path: Path) -> None:
    service = make(limits={"max_queued_photos": 1})
    data = draw_photo(tmp_path / "mine", "green").read_bytes()

    async def flood() -> list[Any]:
        calls = [service.localize(data, "the green one", 1, masks=False) for _ in range(6)]
        return await asyncio.gather(*calls, return_exceptions=True)

    refused = [each for each in run(flood()) if isinstance(each, Overloaded)]
    assert 1 <= len(refused) < 6
    assert "photos" in str(refused[0])


class UnavailableStore(MemoryStore):
    """A store that can stop answering."""

    unavailable = False
    calls = 0

    def __getattribute__(self, name: str) -> Any:
        if name in ("search", "live_version", "galleries"):
            type(self).calls += 1
            if type(self).unavailable:
                raise StoreUnavailable("milvus:19530", "connection refused")
        return super().__getattribute__(name)


@pytest.fixture
def unavailable(tmp_path: Path) -> type[UnavailableStore]:
    """A class of stores for one test; its stores answer at first."""
    return type("Unavailable", (UnavailableStore,), {})


def test_searches_work_again_once_the_store_answers(
    make: Make, unavailable: type[UnavailableStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reir_serving.backend.circuit_breaker.OPEN_FOR_S", 0.05)
    store = unavailable()
    index_photos(store, "g", [draw_photo(tmp_path / "photos", "green")])
    service = make(store)
    run(service.warm_up())
    unavailable.unavailable = True
    with pytest.raises(StoreUnavailable, match="milvus:19530"):
        search(service, "the green one")
    readiness = run(service.readiness())
    assert not readiness.ready
    assert "milvus:19530" in readiness.checks["store"]
    run(service.check_health())  # a new process would not bring the store back
    unavailable.unavailable = False
    run(asyncio.sleep(0.1))
    assert first(search(service, "the green one")) == "green.png"
    assert run(service.readiness()).ready


def test_a_single_search_runs_between_the_slices_of_a_batch(
    store: MemoryStore, tmp_path: Path
) -> None:
    started = list[int]()
    config = ServeConfig(store="memory:")

    def note(worker: str, _size: int, _waiting: int) -> None:
        if worker == "search":
            started.append(len(started))

    workers = SearchWorkers(
        store, ModelCache(lambda _: LoadedModel(FakeEncoder())), config.limits, note
    )
    service = Service(config, store, workers, tmp_path / "uploads")

    async def search_both() -> int:
        await service.search("g", [ask("the red one")])  # opens the gallery
        started.clear()
        batch = asyncio.create_task(service.search("g", [ask("the blue one")] * 40))
        while not started:
            await asyncio.sleep(0.001)
        await service.search("g", [ask("the red one")])
        after_single = len(started)
        answers = await batch
        assert len(answers) == 40
        assert len(started) >= 40 // SLICE_QUERIES
        return after_single

    assert run(search_both()) < 40 // SLICE_QUERIES  # before the batch was finished


def test_the_time_budget_of_a_batch_covers_the_whole_request(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, budgets = make(), list[float | None]()
    answer_slice = service._answer_slice

    async def slow_answer_slice(gallery: str, asked: Sequence[Query]) -> list[SearchResult]:
        budgets.append(asked[0].budget_ms)
        await asyncio.sleep(0.01)
        return await answer_slice(gallery, asked)

    monkeypatch.setattr(service, "_answer_slice", slow_answer_slice)
    run(service.search("g", [ask("the red one", budget_ms=15.0)] * (3 * SLICE_QUERIES)))
    first, second, third = budgets
    assert first is not None
    assert second is not None
    assert first <= 15.0
    assert second <= 5.0  # 10 ms later
    assert third == 0.0


def test_the_circuit_breaker_calls_a_failed_store_once_per_second() -> None:
    clock, calls = [0.0], []

    def fail() -> None:
        calls.append(clock[0])
        raise StoreUnavailable("milvus:19530", "connection refused")

    breaker = CircuitBreaker(clock=lambda: clock[0])
    for clock[0] in (0.0, 0.2, 0.9, 1.1, 1.2):
        with pytest.raises(StoreUnavailable, match="milvus:19530"):
            breaker.call(fail)
    assert calls == [0.0, 1.1]
    clock[0] = 5.0
    assert breaker.call(lambda: 1) == 1
    clock[0] = 5.1
    with pytest.raises(StoreUnavailable):
        breaker.call(fail)


def test_readiness_names_the_gallery_that_cannot_be_searched(
    make: Make, store: MemoryStore
) -> None:
    store.create_version("empty", "v1", VersionSpec(dim=16, digest="x"))
    readiness = run(make(galleries=["g", "empty"]).readiness())
    assert not readiness.ready
    assert readiness.checks["store"] == readiness.checks["gallery g"] == "ok"
    assert (
        "reir promote" in readiness.checks["gallery empty"]
        or "live" in (readiness.checks["gallery empty"])
    )


def test_the_health_check_fails_if_the_model_fails(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = make()
    run(service.warm_up())
    run(service.check_health())

    def broken(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(FakeEncoder, "encode_expressions", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(service.check_health())


def test_each_expression_is_encoded_by_its_own_model() -> None:
    class OtherEncoder(FakeEncoder):
        def encode_expressions(self, expressions: Any) -> Any:
            return -super().encode_expressions(expressions)

    made: list[str] = []

    def load(spec: str) -> LoadedModel:
        made.append(spec)
        return LoadedModel(OtherEncoder() if spec == "other" else FakeEncoder())

    workers = SearchWorkers(MemoryStore(), ModelCache(load), Limits())
    one, other = ModelKey("one"), ModelKey("other")
    calls = [(one, ("red", "blue")), (other, ("red",)), (one, ("green",)), (one, ())]

    async def encode_together() -> Any:
        return await asyncio.gather(*(workers.encode(*call) for call in calls))

    first, second, more, none = run(encode_together())
    expected = FakeEncoder().encode_expressions(["red", "blue", "green"])
    assert np.array_equal([each.vector for each in (*first, *more)], expected)
    assert np.array_equal(second[0].vector, -expected[0])
    assert none == ()
    assert sorted(made) == ["one", "other"]


def test_a_localizer_of_the_server_is_loaded_once_and_orders_the_first_photos(
    tmp_path: Path, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []

    def load(source: str) -> FakeLocalizer:
        loaded.append(source)
        return FakeLocalizer()

    monkeypatch.setattr("reir.models.localizers.KINDS", {"fake": load})
    kinds = {"clare-nano": lambda _: FakeEncoder(), "other": lambda _: FakeEncoder()}
    monkeypatch.setattr("reir.encoders.KINDS", kinds)
    config = ServeConfig(store="memory:", zoomer="fake:x")
    models = ModelCache(model_loader(config.zoomer))
    service = Service(config, store, SearchWorkers(store, models, config.limits), tmp_path)
    assert search(service, "the green one")[0].zoom is None
    assert loaded == []
    first = search(service, "the green one", zoom=True)[0]
    assert first.zoom is not None
    assert first.zoom.frames == ((0, 0, 1, 1),)
    assert first.box == first.zoom.box
    assert models.get(ModelKey("other:x")).zoomer is not models.get(ModelKey("")).zoomer
    assert loaded == ["x"]
