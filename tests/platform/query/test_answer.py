"""What a query can say: terms, pages, re-ranking, presence, budgets; and what it is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reir.errors import QueryError
from reir.query.answer import answer, run_now
from reir.query.clock import NUM_DURATIONS, StageCosts
from reir.query.paging import MAX_HITS, read_cursor
from reir.query.presence import (
    PHOTO_FEATURES,
    Calibration,
)
from reir.query.request import Query, Term
from reir.query.search import CheckpointExtras, Gallery
from reir.records import FloatArray
from reir.results import SearchResult
from reir.store import InstanceStore
from reir.store.memory import MemoryStore
from reir_testing.evaluation.calibrations import by_score, score_calibration
from reir_testing.lookup_gallery import (
    DIM,
    TIED_VECTORS,
    LookupEncoder,
    RightmostReranker,
    fill_gallery,
    images_from_vectors,
    indexed_image,
)

FIRST = Term(expression="number 0")


def calibrated(tie_margin: float = 0.0) -> Calibration:
    """Presence is the logistic of 10 * (score - .5), whatever the other features are."""
    return score_calibration(
        "table", 10, -5, threshold=0.9, photo_threshold=0.9, tie_margin=tie_margin
    )


def scattered(num: int, seed: int) -> FloatArray:
    vectors = np.random.default_rng(seed).normal(size=(num, DIM))
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), dtype=np.float32)


def gallery_of(
    vectors: FloatArray, counts: Sequence[int], extras: CheckpointExtras | None = None
) -> Gallery:
    store = MemoryStore()
    fill_gallery(store, images_from_vectors(vectors, counts))
    return Gallery("photos", store, LookupEncoder(), extras)


def ask(gallery: Gallery, *terms: Term, **options: object) -> SearchResult:
    asked = {"terms": terms or (FIRST,), "rerank": True} | options
    return gallery.ask([Query(**asked)])[0]  # type: ignore[arg-type]


def ids(result: SearchResult) -> list[str]:
    return [hit.instance_id for hit in result.hits]


def pages(gallery: Gallery, ks: Sequence[int], **options: object) -> list[str]:
    """All hits, page by page, the lengths of the pages in turn."""
    found: list[str] = []
    cursor = ""
    for turn in range(1000):
        result = ask(gallery, k=ks[turn % len(ks)], cursor=cursor, **options)
        found += ids(result)
        cursor = result.cursor
        if not cursor:
            return found
    raise AssertionError("the pages do not end")


# --- terms -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("terms", "wanted"),
    [
        ((Term(expression="number 1"),), [0, 1, 0, 0]),
        ((Term(expression="number 1", weight=7),), [0, 1, 0, 0]),
        ((FIRST, Term(expression="number 1")), [1, 1, 0, 0]),
        ((FIRST, Term(expression="number 1", weight=-0.5)), [1, -0.5, 0, 0]),
        ((Term(vector=np.array([0, 0, 9, 0], np.float32)),), [0, 0, 1, 0]),
        ((FIRST, Term(vector=np.array([0, 0, 9, 0], np.float32), weight=2)), [1, 0, 2, 0]),
        ((FIRST, Term(instance_id="img003#0", weight=-1)), None),
    ],
    ids=["one", "weighted", "two", "not", "vector", "expression and vector", "not this instance"],
)
def test_terms_add_up_as_unit_vectors(terms: tuple[Term, ...], wanted: list[float] | None) -> None:
    vectors = scattered(40, 0)
    if wanted is None:
        wanted = (TIED_VECTORS[0] - vectors[3]).tolist()
    unit = np.array(wanted) / np.linalg.norm(wanted)
    result = ask(gallery_of(vectors, [1] * 40), *terms, k=40)
    excluded = {term.instance_id for term in terms}
    order = [f"img{n:03d}#0" for n in np.argsort(-(vectors @ unit))]
    assert ids(result) == [each for each in order if each not in excluded]
    assert result.hits[0].score == pytest.approx(max(vectors @ unit), abs=1e-6)


def test_more_like_this_leaves_the_instance_itself_out_and_keeps_its_photo() -> None:
    vectors = np.concatenate([TIED_VECTORS[[0, 1]], scattered(4, 3)])
    gallery = gallery_of(vectors, [2, 2, 2])
    result = ask(gallery, Term(instance_id="img000#0"), k=10)
    assert (result.expression, result.presence) == ("", None)
    assert "img000#0" not in ids(result)
    assert {hit.image_id for hit in result.hits} == {"img000", "img001", "img002"}
    other = ask(gallery, Term(vector=vectors[0]), k=10, per_image=2)
    assert [each for each in ids(other) if each != "img000#0"] == ids(
        ask(gallery, Term(instance_id="img000#0"), k=10, per_image=2)
    )


@pytest.mark.parametrize(
    ("field", "terms"),
    [
        ("terms", ()),
        ("terms", (FIRST,) * 17),
        ("terms", (replace(FIRST, weight=-1.0),)),
        ("terms", (FIRST, replace(FIRST, weight=-1.0))),
        ("terms", (Term(expression="number 0", instance_id="a#0"),)),
        ("weight", (replace(FIRST, weight=0.0),)),
        ("weight", (replace(FIRST, weight=float("nan")),)),
        ("weight", (replace(FIRST, weight=11.0),)),
        ("expression", (FIRST, Term(expression=" "))),
        ("expression", (Term(),)),
        ("vector", (Term(vector=np.zeros(DIM, np.float32)),)),
        ("vector", (Term(vector=np.full(DIM, np.nan, np.float32)),)),
        ("vector", (Term(vector=np.ones((1, DIM), np.float32)),)),
        ("vector", (Term(vector=np.ones(DIM + 1, np.float32)),)),
        ("instance_id", (Term(instance_id="img000#1"),)),
        ("instance_id", (Term(instance_id="nothing"),)),
    ],
)
def test_refused_terms(field: str, terms: tuple[Term, ...]) -> None:
    gallery = gallery_of(TIED_VECTORS[:2], [1, 1])
    with pytest.raises(QueryError) as caught:
        gallery.ask([Query(terms=terms)])
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("min_presence", {"min_presence": 1.5}),
        ("min_presence", {"min_presence": 0.5}),  # there is no calibration
        ("budget_ms", {"budget_ms": float("nan")}),
        ("budget_ms", {"budget_ms": -1}),
        ("cursor", {"cursor": "nonsense"}),
        ("cursor", {"cursor": "é"}),
        ("cursor", {"cursor": "W10"}),
    ],
)
def test_refused_options(field: str, options: dict[str, object]) -> None:
    with pytest.raises(QueryError) as caught:
        ask(gallery_of(TIED_VECTORS[:2], [1, 1]), **options)
    assert caught.value.field == field


# --- pages -------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=14),
    ks=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    per_image=st.integers(1, 3),
    tied=st.booleans(),
    reranks=st.booleans(),
    where=st.sampled_from([None, "neighbors > 1", "cx < 0.7"]),
    seed=st.integers(0, 99),
)
def test_pages_put_together_are_one_large_answer(
    counts: list[int],
    ks: list[int],
    per_image: int,
    tied: bool,
    reranks: bool,
    where: str | None,
    seed: int,
) -> None:
    num = sum(counts)
    draw = np.random.default_rng(seed).integers(len(TIED_VECTORS), size=num)
    vectors = TIED_VECTORS[draw] if tied else scattered(num, seed)
    extras = CheckpointExtras(RightmostReranker() if reranks else None)
    gallery = gallery_of(vectors, counts, extras)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("reir.query.pending.RERANKED_PHOTOS", 4)
        whole = ids(ask(gallery, k=1000, per_image=per_image, where=where))
        assert pages(gallery, ks, per_image=per_image, where=where) == whole
    assert len(set(whole)) == len(whole)


def test_the_last_page_has_no_cursor() -> None:
    gallery = gallery_of(scattered(6, 0), [1] * 6)
    assert ask(gallery, k=6).cursor == ""
    first = ask(gallery, k=3)
    assert ask(gallery, k=3, cursor=first.cursor).cursor == ""
    assert ask(gallery, k=2, cursor=first.cursor).cursor != ""


def test_what_is_added_or_deleted_between_pages_repeats_no_hit() -> None:
    store = MemoryStore()
    fill_gallery(store, images_from_vectors(scattered(8, 1), [1] * 8))
    gallery = Gallery("photos", store, LookupEncoder())
    whole = ids(ask(gallery, k=8))
    first = ask(gallery, k=3)
    store.upsert_images("photos", "v1", [indexed_image("new", TIED_VECTORS[:1])])  # the best of all
    store.delete_images("photos", "v1", [whole[2].partition("#")[0]])  # the last of the page
    assert ids(ask(gallery, k=9, cursor=first.cursor)) == whole[3:]


def test_pages_stay_in_their_version_and_say_when_it_is_gone() -> None:
    store = MemoryStore()
    fill_gallery(store, images_from_vectors(scattered(8, 1), [1] * 8))
    gallery = Gallery("photos", store, LookupEncoder())
    whole = ids(ask(gallery, k=8))
    first = ask(gallery, k=3)
    fill_gallery(store, images_from_vectors(scattered(8, 2), [1] * 8), version="v2")
    second = ask(gallery, k=3, cursor=first.cursor)
    assert (second.version, ids(second)) == ("v1", whole[3:6])
    store.drop_version("photos", "v1")
    with pytest.raises(QueryError, match=r"version 'v1', which was removed .* leave it out"):
        ask(gallery, k=3, cursor=first.cursor)


@pytest.mark.parametrize(
    "options",
    [{"per_image": 2}, {"where": "area > 0"}, {"rerank": False}],
)
def test_a_cursor_belongs_to_its_query(options: dict[str, object]) -> None:
    gallery = gallery_of(scattered(8, 1), [1] * 8)
    cursor = ask(gallery, k=2).cursor
    with pytest.raises(QueryError, match="belongs to another query"):
        ask(gallery, cursor=cursor, **options)
    with pytest.raises(QueryError, match="belongs to another query"):
        ask(gallery, Term(expression="number 1"), cursor=cursor)
    assert ask(gallery, k=5, cursor=cursor, explain=True, budget_ms=1e4).hits


def test_a_cursor_cannot_ask_for_more_than_the_deepest_page() -> None:
    gallery = gallery_of(scattered(8, 1), [1] * 8)
    query = Query(terms=(FIRST,), k=2)
    cursor = read_cursor(replace(query, cursor=gallery.ask([query])[0].cursor))
    assert cursor is not None
    with pytest.raises(QueryError, match="cursor"):
        read_cursor(replace(query, cursor=str(cursor._replace(num_hits=MAX_HITS + 1))))


# --- re-ranking --------------------------------------------------------------------------------


def test_the_reranker_runs_only_if_a_query_asks_for_it() -> None:
    reranker = RightmostReranker()
    gallery = gallery_of(scattered(30, 4), [3] * 10, CheckpointExtras(reranker))
    plain = gallery.search(FIRST.expression)
    assert ids(gallery.ask([Query(terms=(FIRST,))])[0]) == ids(plain)
    assert (reranker.asked, "rerank" in plain.timings_ms) == ([], False)
    assert ids(ask(gallery, rerank=True)) != ids(plain)
    assert reranker.asked == [10]


def test_the_best_photos_come_in_the_order_of_the_reranker_and_the_rest_behind() -> None:
    reranker = RightmostReranker()
    vectors = scattered(60, 4)
    gallery = gallery_of(vectors, [3] * 20, CheckpointExtras(reranker))
    plain = ask(gallery, k=20, rerank=False)
    assert {hit.instance_id.rpartition("#")[2] for hit in plain.hits} > {"0"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("reir.query.pending.RERANKED_PHOTOS", 5)
        result = ask(gallery, k=20)
    assert reranker.asked == [5]
    pool = sorted(hit.image_id for hit in plain.hits[:5])
    assert ids(result)[:5] == [f"{each}#2" for each in pool]  # all as far right: by image id
    assert ids(result)[5:] == ids(plain)[5:]
    assert list(result.timings_ms) == ["text", "search", "rank", "rerank"]
    assert result.degraded == ()


def test_hits_of_the_reranker_pass_the_filter_and_leave_the_query_out() -> None:
    gallery = gallery_of(scattered(30, 4), [3] * 10, CheckpointExtras(RightmostReranker()))
    left = ask(gallery, k=10, where="cx < 0.6")
    assert {hit.instance_id.rpartition("#")[2] for hit in left.hits} == {"1"}
    both = ask(gallery, FIRST, Term(instance_id="img003#2"), k=10)
    assert "img003#1" in ids(both)
    assert "img003#2" not in ids(both)


def test_a_failing_reranker_is_left_out_and_named() -> None:
    gallery = gallery_of(
        scattered(30, 4), [3] * 10, CheckpointExtras(RightmostReranker(fails=True))
    )
    result = ask(gallery)
    assert result.degraded == ("rerank",)
    assert ids(result) == ids(ask(gallery, rerank=False))


def test_a_page_within_the_rerankers_order_cannot_do_without_it() -> None:
    reranker = RightmostReranker()
    gallery = gallery_of(scattered(30, 4), [3] * 10, CheckpointExtras(reranker))
    cursor = ask(gallery, k=2).cursor
    reranker.fails = True
    with pytest.raises(RuntimeError, match="out of order"):
        ask(gallery, k=2, cursor=cursor)


def test_a_page_after_one_without_the_reranker_does_without_it_too() -> None:
    reranker = RightmostReranker(fails=True)
    gallery = gallery_of(scattered(30, 4), [3] * 10, CheckpointExtras(reranker))
    first = ask(gallery, k=4)
    reranker.fails = False
    second = ask(gallery, k=6, cursor=first.cursor)
    assert ids(first) + ids(second) == ids(ask(gallery, k=10, rerank=False))
    assert second.degraded == ()


def test_a_stage_that_usually_takes_longer_than_what_is_left_is_left_out() -> None:
    gallery = gallery_of(scattered(30, 4), [3] * 10, CheckpointExtras(RightmostReranker()))
    for _ in range(3):
        gallery.stages.costs.note("rerank", 60_000)
    late, in_time = gallery.ask(
        [
            Query(terms=(FIRST,), budget_ms=1000, rerank=True),
            Query(terms=(FIRST,), budget_ms=None, rerank=True),
        ]
    )
    assert (late.degraded, in_time.degraded) == (("rerank",), ())
    assert ids(late) == ids(ask(gallery, rerank=False))
    assert ids(in_time) != ids(late)


def test_a_stage_that_was_slow_is_tried_again() -> None:
    gallery = gallery_of(scattered(30, 4), [3] * 10, CheckpointExtras(RightmostReranker()))
    for _ in range(5):
        gallery.stages.costs.note("rerank", 60_000)
    said = [ask(gallery, budget_ms=1000).degraded for _ in range(4)]
    assert said == [("rerank",), ("rerank",), ("rerank",), ()]


def test_costs_are_a_running_median() -> None:
    costs = StageCosts()
    costs.note_left_out("rerank")
    for ms in (900, 1, 2):
        assert costs.usual_ms("rerank") == 0
        costs.note("rerank", ms)
    assert costs.usual_ms("rerank") == 2
    for _ in range(NUM_DURATIONS):
        costs.note("rerank", 7)
    assert costs.usual_ms("rerank") == 7
    assert costs.usual_ms("localize") == 0


def test_a_page_within_the_rerankers_order_does_without_pictures() -> None:
    gallery = gallery_of(scattered(30, 4), [3] * 10, CheckpointExtras(RightmostReranker()))
    cursor = ask(gallery, k=2).cursor
    second = ask(gallery, k=2, cursor=cursor, localize=True, budget_ms=1e-6)
    assert second.degraded == ("localize",)
    assert ids(second) == ids(ask(gallery, k=4))[2:]


def test_pictures_that_cannot_be_read_leave_the_boxes_as_they_are() -> None:
    gallery = gallery_of(scattered(30, 4), [3] * 10)
    plain, refined = ask(gallery), ask(gallery, localize=True)
    assert refined.degraded == ("localize",)
    assert refined.hits == plain.hits


# --- evidence and presence ---------------------------------------------------------------------


def test_evidence_says_why() -> None:
    gallery = gallery_of(scattered(30, 4), [3] * 10, CheckpointExtras(RightmostReranker()))
    result = ask(gallery, k=3, explain=True)
    for hit, after in zip(result.hits, result.hits[1:], strict=False):
        assert hit.evidence is not None
        assert hit.evidence.rerank_score == hit.score
        assert hit.evidence.margin == pytest.approx(hit.score - after.score)
        assert hit.evidence.dual_score <= 1
        first, second = hit.evidence.neighbors
        assert (first.instance_id, second.instance_id) == (
            f"{hit.image_id}#0",
            f"{hit.image_id}#1",
        )
        assert first.weight > second.weight > 0
    plain = ask(gallery, k=10, explain=True, rerank=False)
    for hit in plain.hits:
        assert hit.evidence is not None
        assert (hit.evidence.dual_score, hit.evidence.rerank_score) == (hit.score, None)
    assert plain.hits[-1].evidence is not None
    assert plain.hits[-1].evidence.margin is None
    assert ask(gallery, k=3).hits[0].evidence is None


@pytest.mark.parametrize("found", [True, False])
def test_no_photo_is_more_likely_to_have_it_than_the_gallery(found: bool) -> None:
    in_gallery, in_photo = 1 / (1 + np.exp(-0.5)), 1 / (1 + np.exp(-3))
    calibration = score_calibration(
        *("table", 1, -0.5),
        photo=by_score(PHOTO_FEATURES, 0, 3),
        threshold=in_gallery - 0.1 if found else in_gallery + 0.1,
    )
    near = np.array([[1, 0, 0, 0], [0.6, 0.8, 0, 0]], np.float32)
    result = ask(gallery_of(near, [1, 1], CheckpointExtras(calibration=calibration)))
    assert result.found == found
    assert result.presence == pytest.approx(in_gallery)
    expected = in_photo if found else in_gallery
    assert [hit.photo_presence for hit in result.hits] == pytest.approx([expected, expected])


def test_presence_is_that_of_the_scores() -> None:
    near = np.array([[1, 0, 0, 0], [0.6, 0.8, 0, 0], [0.5, 0, np.sqrt(0.75), 0]], np.float32)
    gallery = gallery_of(near, [1, 1, 1], CheckpointExtras(calibration=calibrated()))
    result = ask(gallery)
    assert result.presence == pytest.approx(1 / (1 + np.exp(-5)))
    assert result.found
    assert [hit.presence for hit in result.hits] == pytest.approx(
        [1 / (1 + np.exp(-5)), 1 / (1 + np.exp(-1)), 0.5], abs=1e-5
    )
    assert ids(ask(gallery, min_presence=0.6)) == ["img000#0", "img001#0"]
    nothing = ask(gallery, min_presence=0.999)
    assert (nothing.hits, nothing.found, nothing.equally_good) == ((), False, 0)
    assert nothing.presence == result.presence
    absent = ask(gallery, Term(expression="number 3"))
    assert not absent.found
    assert absent.hits
    assert absent.presence is not None
    assert absent.presence < 0.9
    assert ask(gallery, FIRST, Term(instance_id="img002#0", weight=-0.1)).presence is None
    with pytest.raises(QueryError, match="min_presence: needs a single expression"):
        ask(gallery, FIRST, Term(expression="number 1"), min_presence=0.1)


def test_nothing_is_found_where_nothing_is() -> None:
    store: InstanceStore = MemoryStore()
    fill_gallery(store, [])
    result = ask(
        Gallery("photos", store, LookupEncoder(), CheckpointExtras(calibration=calibrated()))
    )
    assert (result.presence, result.found, result.equally_good) == (0.0, False, 0)


def test_equally_good_counts_hits_within_the_margin() -> None:
    angles = np.array([0.0, 0.1, 0.2, 0.5])
    vectors = np.stack([np.cos(angles), np.sin(angles), 0 * angles, 0 * angles], axis=1)
    for margin, count in ((0.0, 1), (0.006, 2), (0.03, 3)):
        extras = CheckpointExtras(calibration=calibrated(tie_margin=margin))
        gallery = gallery_of(vectors.astype(np.float32), [1] * 4, extras)
        assert ask(gallery).equally_good == count
    assert ask(gallery_of(TIED_VECTORS[[0, 0, 1]], [1] * 3)).equally_good == 2


# --- stages that wait --------------------------------------------------------------------------


def test_the_same_answer_from_stages_that_wait() -> None:
    gallery = gallery_of(scattered(30, 4), [3] * 10, CheckpointExtras(RightmostReranker()))

    class Waiting:
        """The stages of a gallery, each after a turn of the event loop."""

        def __getattr__(self, name: str) -> object:
            found = getattr(gallery.stages, name)
            if not callable(found):
                return found

            async def later(*arguments: object) -> object:
                await asyncio.sleep(0)
                return await found(*arguments)

            return later

    queries = [Query(terms=(FIRST,)), Query(terms=(Term(expression="number 3"),), per_image=2)]
    found = asyncio.run(answer(queries, Waiting()))  # type: ignore[arg-type]
    assert [each.hits for each in found] == [each.hits for each in gallery.ask(queries)]
    with pytest.raises(RuntimeError, match="a stage waited"):
        run_now(answer(queries, Waiting()))  # type: ignore[arg-type]
