"""Zoom in a query: which photos are searched again, how hits change, and what limits it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

import numpy as np
import pytest
from PIL import Image

from reir.errors import QueryError
from reir.images.boxes import elementwise_iou
from reir.models.query_zoom.zoomer import OneLook, load_zoomer_spec
from reir.models.zoom_steps import ZoomSearch, ZoomStep
from reir.query.request import Query, SearchOptions, Term
from reir.query.search import CheckpointExtras, Gallery
from reir.query.stages import ZOOMED_PHOTOS, ZoomRequest
from reir.query.zoom.photos import PhotoZoomer
from reir.records import FloatArray, RgbImage
from reir.results import SearchResult
from reir.store.memory import MemoryStore
from reir_testing import PALETTE, FakeEncoder, FakeLocalizer, draw_scene
from reir_testing.evaluation.calibrations import score_calibration
from reir_testing.serving import index_elsewhere, index_photos

SIDE = 1000
TINY = (500, 500, 520, 520)
PURPLE, RED = (420, 420, 480, 480), (100, 100, 160, 160)
NUM_PLAIN = 7
TWO = 'attr.name == "hidden" or attr.name == "plain 0"'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of purple boxes, the last of them with a tiny red one that the index cannot see."""
    root = tmp_path_factory.mktemp("photos")
    for number in range(NUM_PLAIN):
        scene = draw_scene((SIDE, SIDE), [("purple", PURPLE)])
        Image.fromarray(scene).save(root / f"plain {number}.png")
    hidden = draw_scene((SIDE, SIDE), [("purple", PURPLE), ("red", TINY)])
    Image.fromarray(hidden).save(root / "hidden.png")
    return root


@pytest.fixture
def gallery(folder: Path) -> Gallery:
    store = MemoryStore()
    index_photos(store, "photos", sorted(folder.glob("*.png")))
    return Gallery("photos", store, FakeEncoder())


def names(result: SearchResult) -> list[str]:
    return [Path(hit.path).stem for hit in result]


def zoom(gallery: Gallery, **options: Unpack[SearchOptions]) -> SearchResult:
    """Search for the red one in the photo that has it, and in one that has not."""
    both: SearchOptions = {"zoom": True, "where": TWO, **options}
    return gallery.search("the small red one", **both)


def test_zooming_finds_what_the_index_has_not_and_orders_by_it(gallery: Gallery) -> None:
    plain = gallery.search("the small red one", where=TWO)
    assert plain[0].zoom is None
    result = zoom(gallery)
    assert names(result) == ["hidden", "plain 0"]
    first, second = result
    assert first.zoom is not None
    assert second.zoom is not None
    assert elementwise_iou(first.box, np.array(TINY) / SIDE) > 0.95
    assert first.box == first.zoom.box
    assert first.zoom.frames[0] == (0, 0, 1, 1)
    assert first.zoom.score > second.zoom.score
    assert {hit.instance_id for hit in result} == {hit.instance_id for hit in plain}
    assert result.degraded == ()
    assert result.timings_ms["zoom"] > 0
    told = result.to_dict()["hits"][0]["zoom"]
    assert told["box"] == first.box
    assert [step["frame"] for step in told["steps"]] == list(first.zoom.frames)


def test_only_the_first_photos_of_a_page_are_searched_and_no_hit_is_lost(gallery: Gallery) -> None:
    plain = gallery.search("the purple one", k=8)
    result = gallery.search("the purple one", k=8, zoom=True)
    assert [hit.zoom is not None for hit in result] == [True] * ZOOMED_PHOTOS + [False] * 3
    assert sorted(names(result)) == sorted(names(plain))
    assert names(result)[ZOOMED_PHOTOS:] == names(plain)[ZOOMED_PHOTOS:]
    page = gallery.search("the purple one", k=2, zoom=True)
    rest = gallery.search("the purple one", k=6, zoom=True, cursor=page.cursor)
    assert sorted(names(page) + names(rest)) == sorted(names(plain))
    assert rest[0].zoom is not None


class Blind(FakeEncoder):
    """Takes every expression for another one, so that the order of the index means nothing."""

    def encode_expressions(self, expressions: Sequence[str]) -> FloatArray:
        return super().encode_expressions(["purple"] * len(expressions))


def test_a_localizer_that_cannot_zoom_orders_the_first_photos(folder: Path) -> None:
    (folder / "seen").mkdir()
    paths = [folder / "seen" / f"{color}.png" for color in ("blue", "green", "red")]
    for path in paths:
        scene = draw_scene(
            (200, 100), [("purple", (10, 10, 60, 90)), (path.stem, (120, 20, 160, 60))]
        )
        Image.fromarray(scene).save(path)
    store = MemoryStore()
    index_photos(store, "photos", paths)
    gallery = Gallery("photos", store, Blind(), zoomer=OneLook(FakeLocalizer()))
    plain = gallery.search("anything")
    last = names(plain)[-1]
    result = gallery.search(f"the {last} one", zoom=True)
    assert sorted(names(result)) == sorted(names(plain))
    first = result[0]
    assert names(result)[0] == last
    assert first.box == pytest.approx((0.6, 0.2, 0.8, 0.6))
    assert first.zoom is not None
    assert first.zoom.frames == ((0, 0, 1, 1),)
    assert 0 <= first.zoom.score <= 1
    # A photo that is gone keeps its place and its box, and the answer says so.
    (folder / "seen" / f"{names(plain)[0]}.png").unlink()
    gone = Gallery("photos", store, Blind(), zoomer=OneLook(FakeLocalizer()))
    result = gone.search(f"the {last} one", zoom=True)
    assert names(result)[:2] == [names(plain)[0], last]
    assert (result[0].box, result[0].zoom) == (plain[0].box, None)
    assert result.degraded == ("zoom",)


def test_a_look_without_boxes_counts_least() -> None:
    grey = np.full((20, 30, 3), 128, dtype=np.uint8)
    (search,) = OneLook(FakeLocalizer()).zoom([grey], ["red"])
    assert (search.box, search.score, len(search.steps)) == ((0, 0, 1, 1), 0, 1)


def test_a_spec_of_a_localizer_that_cannot_zoom(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reir.models.localizers.KINDS", {"fake": lambda _: FakeLocalizer()})
    assert isinstance(load_zoomer_spec("fake:x"), OneLook)


def test_several_hits_of_a_photo_are_one_search(gallery: Gallery, folder: Path) -> None:
    scene = draw_scene((SIDE, SIDE), [("purple", PURPLE), ("green", RED)])
    Image.fromarray(scene).save(folder / "two.png")
    store = MemoryStore()
    index_photos(store, "two", [folder / "two.png"])
    result = Gallery("two", store, FakeEncoder()).search("green", per_image=2, zoom=True)
    (folder / "two.png").unlink()
    assert [hit.zoom is not None for hit in result] == [True, False]


def test_ties_are_counted_again(folder: Path) -> None:
    calibration = score_calibration(FakeEncoder().digest, 20, -12, tie_margin=0.01)
    store = MemoryStore()
    index_photos(store, "photos", sorted(folder.glob("*.png")))
    gallery = Gallery("photos", store, FakeEncoder(), CheckpointExtras(calibration=calibration))
    assert gallery.search("the small red one", where=TWO).equally_good == 2
    assert zoom(gallery).equally_good == 1


class Doubtful:
    """Finds the red ones, with a negative score, and nothing in other photos."""

    def zoom(self, images: Sequence[RgbImage], expressions: Sequence[str]) -> list[ZoomSearch]:
        return [self._search(image) for image, _ in zip(images, expressions, strict=True)]

    def _search(self, image: RgbImage) -> ZoomSearch:
        whole = (0.0, 0.0, 1.0, 1.0)
        red = (image == PALETTE["red"]).all(axis=2).any()
        box, score = ((0.5, 0.5, 0.52, 0.52), -0.5) if red else (whole, 0.0)
        step = ZoomStep(frame=whole, box=box, score=score, end=1.0)
        return ZoomSearch(steps=(step,), box=box, score=score)


def test_a_photo_in_which_nothing_was_found_comes_after_all_others(folder: Path) -> None:
    store = MemoryStore()
    index_photos(store, "photos", sorted(folder.glob("*.png")))
    # All scores are within the margin.
    calibration = score_calibration(FakeEncoder().digest, 20, -12, tie_margin=9.0)
    extras = CheckpointExtras(calibration=calibration)
    doubtful = Gallery("photos", store, FakeEncoder(), extras, zoomer=Doubtful())
    result = zoom(doubtful)
    assert names(result) == ["hidden", "plain 0"]
    assert [hit.zoom and hit.zoom.score for hit in result] == [-0.5, 0]
    assert result.equally_good == 1
    nothing = zoom(doubtful, where='attr.name == "plain 0" or attr.name == "plain 1"')
    assert len(nothing) == 2
    assert nothing.equally_good == 0


def test_without_time_left_fewer_photos_are_searched_and_the_answer_says_so(
    gallery: Gallery,
) -> None:
    none = zoom(gallery, budget_ms=1e-6)
    assert (none.degraded, [hit.zoom for hit in none]) == (("zoom",), [None, None])
    for _ in range(3):
        gallery.stages.costs.note("zoom", 200)
    some = gallery.search("the purple one", k=8, zoom=True, budget_ms=250)
    assert some.degraded in ((), ("zoom",))
    for _ in range(40):
        gallery.stages.costs.note("zoom", 60_000)
    late = gallery.search("the small red one", zoom=True, budget_ms=1000)
    assert late.degraded == ("zoom",)


class SlowZoomer:
    """Takes a while for each photo, and finds all of it."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.num_searches = seconds, 0

    def zoom(self, images: Sequence[RgbImage], expressions: Sequence[str]) -> list[ZoomSearch]:
        time.sleep(self.seconds)
        self.num_searches += len(expressions)
        whole = (0.0, 0.0, 1.0, 1.0)
        step = ZoomStep(frame=whole, box=whole, score=1.0, end=1.0)
        return [ZoomSearch(steps=(step,), box=whole, score=1.0) for _ in images]


def test_a_photo_zoomer_stops_in_time_and_remembers_searches(folder: Path) -> None:
    slow = SlowZoomer(0.2)
    zoomer = PhotoZoomer(slow)
    requests = [
        ZoomRequest(image_id=str(n), uri=(folder / f"plain {n}.png").as_uri(), expression="a")
        for n in range(6)
    ]
    found = zoomer.zoom(requests, 1.0)
    assert found[0] is not None
    assert found[-1] is None
    assert 1 <= slow.num_searches <= 5
    again = slow.num_searches
    assert zoomer.zoom(requests[:1], 0.1) == found[:1]
    assert slow.num_searches == again
    assert zoomer.zoom(requests, 0.0) == [None] * 6
    assert None not in zoomer.zoom(requests, None)


def test_a_photo_that_cannot_be_read_is_left_out(folder: Path, gallery: Gallery) -> None:
    path = folder / "hidden.png"
    content = path.read_bytes()
    path.unlink()
    try:
        result = zoom(gallery)
    finally:
        path.write_bytes(content)
    assert result.degraded == ("zoom",)
    assert [hit.zoom is not None for hit in result if hit.path.stem == "plain 0"] == [True]
    assert [hit.zoom for hit in result if hit.path.stem == "hidden"] == [None]


def test_a_photo_of_another_source_is_left_out(folder: Path) -> None:
    store = MemoryStore()
    index_photos(store, "photos", [folder / "hidden.png"])
    index_elsewhere(store, "photos", folder / "plain 0.png", "tar+file:///photos.tar#a.png")
    result = Gallery("photos", store, FakeEncoder()).search("the small red one", zoom=True)
    assert result.degraded == ("zoom",)
    assert {hit.uri[:5]: hit.zoom is not None for hit in result} == {"file:": True, "tar+f": False}


def test_a_replaced_photo_is_searched_anew(tmp_path: Path) -> None:
    slow = SlowZoomer(0)
    zoomer = PhotoZoomer(slow)
    path = tmp_path / "a.png"
    request = ZoomRequest(image_id="a", uri=path.as_uri(), expression="a")
    for number in (1, 2):
        Image.fromarray(draw_scene((50, 50 + number), [])).save(path)
        for _ in range(2):
            assert zoomer.zoom([request], None) != [None]
            assert slow.num_searches == number
    path.unlink()
    assert zoomer.zoom([request], None) == [None]


def test_zooming_needs_an_expression(gallery: Gallery) -> None:
    like = gallery.search("the purple one")[0].instance_id
    with pytest.raises(QueryError, match="needs an expression to look for") as refusal:
        gallery.similar(like, zoom=True)
    assert refusal.value.field == "zoom"
    assert gallery.similar(like, expression="the purple one", zoom=True)[0].zoom is not None


def test_answers_to_several_queries_do_not_mix(gallery: Gallery) -> None:
    words = ["the small red one", "the purple one"]
    queries = [Query(terms=(Term(expression=each),), k=2, zoom=True) for each in words]
    together = gallery.ask([*queries, Query(terms=(Term(expression="red"),), k=2)])
    for query, result in zip(queries, together, strict=False):
        (alone,) = gallery.ask([query])
        assert [hit.zoom for hit in alone] == [hit.zoom for hit in result]
    assert [hit.zoom for hit in together[2]] == [None, None]
