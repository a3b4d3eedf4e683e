"""Verification in a query: the first hits are ordered by their colors, and pages stay whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from reir.checkpoint import SHIPPED, load_color_reader, load_encoder
from reir.errors import QueryError
from reir.models.color_reading import ColorReading
from reir.models.nano.color_reader import ColorReader
from reir.query import every_photo
from reir.query.localize import PixelLocalizer
from reir.query.presence import GALLERY_FEATURES, PHOTO_FEATURES, Calibration, Logistic
from reir.query.request import Query, Term
from reir.query.search import CheckpointExtras, Gallery, load_extras
from reir.query.stages import VERIFIED_HITS, VerifyRequest, VerifyResult
from reir.query.verify.photos import PixelVerifier
from reir.query.verify.scores import SCORE_OF_SURPRISAL, rank_instances, verified_scores
from reir.records import FloatArray
from reir.results import SearchResult
from reir.store.memory import MemoryStore
from reir_testing import FakeEncoder, draw_scene
from reir_testing.evaluation.calibrations import score_calibration
from reir_testing.lookup_gallery import (
    DIM,
    LookupEncoder,
    RightmostReranker,
    fill_gallery,
    images_from_vectors,
)
from reir_testing.serving import index_elsewhere, index_photos

COLORS = ("blue", "green", "red")


class Blind(FakeEncoder):
    """Takes every expression for another one, so that the order of the index means nothing."""

    def encode_expressions(self, expressions: Sequence[str]) -> FloatArray:
        return super().encode_expressions(["purple"] * len(expressions))


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    """Photos that each have one purple box, and a box of another color."""
    paths = [tmp_path / f"{color}.png" for color in COLORS]
    for path in paths:
        boxes = [("purple", (10, 10, 60, 90)), (path.stem, (120, 20, 160, 60))]
        Image.fromarray(draw_scene((200, 100), boxes)).save(path)
    return paths


def gallery_of(photos: list[Path], calibration: Calibration | None = None) -> Gallery:
    store = MemoryStore()
    index_photos(store, "photos", photos)
    extras = CheckpointExtras(calibration=calibration, verifier=PixelVerifier(load_color_reader))
    return Gallery("photos", store, Blind(), extras)


def names(result: SearchResult) -> list[str]:
    return [Path(hit.path).stem for hit in result]


@pytest.mark.parametrize("color", COLORS)
def test_the_first_hits_are_ordered_by_their_colors(photos: list[Path], color: str) -> None:
    gallery, sentence = gallery_of(photos), f"a purple box next to a {color} box"
    plain = gallery.search(sentence)
    assert len({hit.score for hit in plain}) == 1
    result = gallery.search(sentence, verify=True, explain=True)
    assert names(result)[0] == color
    assert sorted(names(result)) == sorted(names(plain))
    assert result.timings_ms["verify"] > 0
    assert result.degraded == ()
    read = [hit.evidence.colors for hit in result if hit.evidence is not None]
    surprisals = [sum(each.surprisal for each in of_hit) for of_hit in read]
    for hit, of_hit, surprisal in zip(result, read, surprisals, strict=True):
        assert [each.word for each in of_hit] == ["purple", color]
        excess = surprisal - float(np.mean(surprisals))
        assert hit.score == pytest.approx(plain[0].score - SCORE_OF_SURPRISAL * excess)
    # One hit is asked for, but as many as usual are verified.
    assert names(gallery.search(sentence, k=1, verify=True)) == [color]


def test_an_expression_without_a_color_opens_no_photo(photos: list[Path]) -> None:
    gallery = gallery_of(photos)
    for path in photos:
        path.unlink()
    result = gallery.search("the box", verify=True, explain=True)
    assert "verify" not in result.timings_ms
    assert result.degraded == ()
    assert result[0].evidence is not None
    assert result[0].evidence.colors == ()


def test_a_photo_that_is_gone_counts_like_the_average(
    photos: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    photos[0].unlink()
    missing = gallery_of(photos[1:])  # both photos that are left are indexed
    photos[1].unlink()
    result = missing.search("a purple box next to a red box", verify=True, explain=True)
    assert sorted(names(result)) == ["green", "red"]
    (message,) = caplog.messages
    assert "the colors of 1 of 2 hits were not verified" in message
    assert photos[1].name in message
    assert [bool(hit.evidence and hit.evidence.colors) for hit in result].count(False) == 1
    assert result[0].score == pytest.approx(result[1].score)
    assert verified_scores([0.5, 0.4], [None, None]) == [0.5, 0.4]


def test_a_photo_of_another_source_counts_like_the_average(photos: list[Path]) -> None:
    photo = Logistic(features=PHOTO_FEATURES, weights=(1, 0, 0, 0, -0.5, 0), bias=1)
    gallery = gallery_of(photos, score_calibration(Blind().digest, 1, 0, photo=photo))
    index_elsewhere(gallery._store, "photos", photos[0], "tar+file:///photos.tar#a.png")
    result = gallery.search("a purple box next to a red box", verify=True, explain=True)
    assert result.degraded == ()
    read = {hit.uri: bool(hit.evidence and hit.evidence.colors) for hit in result}
    assert read.pop("tar+file:///photos.tar#a.png") is False
    assert list(read.values()) == [True] * len(photos)
    found = {each.uri: each for each in gallery.every_photo("a purple box", verify=True)}
    plain = {each.uri: each for each in gallery.every_photo("a purple box")}
    assert found.keys() == plain.keys()
    assert [uri for uri, each in found.items() if each == plain[uri]] == [
        "tar+file:///photos.tar#a.png"
    ]


def test_a_replaced_photo_is_verified_anew(photos: list[Path]) -> None:
    verifier = PixelVerifier(load_color_reader)
    request = VerifyRequest(
        image_id="x", uri=photos[0].as_uri(), box=(0.6, 0.2, 0.8, 0.6), expression="a red car"
    )
    for color in ("blue", "red"):
        Image.fromarray(draw_scene((200, 100), [(color, (120, 20, 160, 60))])).save(photos[0])
        (found,) = verifier.verify([request])
        assert found is not None
        assert [each.likely for each in found] == [color]


def test_every_photo_leaves_out_those_of_another_color(
    photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(every_photo, "VERIFIED_AT_ONCE", 2)
    photo = Logistic(features=PHOTO_FEATURES, weights=(1, 0, 0, 0, -0.5, 0), bias=1)
    gallery = gallery_of(photos, score_calibration(Blind().digest, 1, 0, photo=photo))
    # The best instance of each photo is the purple box.
    assert len(list(gallery.every_photo("a red box"))) == len(COLORS)
    red = gallery.every_photo("a red box", verify=True)
    assert (list(red), red.num_contradicted) == ([], len(COLORS))
    plain, verified = (
        list(gallery.every_photo("a purple box", verify=verify)) for verify in (False, True)
    )
    assert [replace(each, presence=0.0) for each in verified] == [
        replace(each, presence=0.0) for each in plain
    ]
    assert all(one.presence < two.presence for one, two in zip(verified, plain, strict=True))
    assert len(list(gallery.every_photo("the box", verify=True))) == len(COLORS)


def test_a_photo_that_cannot_be_read_is_not_left_out(photos: list[Path]) -> None:
    gallery = gallery_of(photos, score_calibration(Blind().digest, 1, 0))
    for path in photos:
        path.unlink()
    plain, verified = (
        list(gallery.every_photo("a purple box", verify=verify)) for verify in (False, True)
    )
    assert plain == verified
    assert len(plain) == len(COLORS)


def test_a_verifier_that_fails_is_left_out(photos: list[Path]) -> None:
    class Broken(PixelVerifier):
        def verify(self, requests: Sequence[VerifyRequest]) -> list[VerifyResult | None]:
            raise RuntimeError(f"out of order, {len(requests)} requests")

    gallery = gallery_of(photos)
    broken = Gallery(
        "photos", gallery._store, Blind(), CheckpointExtras(verifier=Broken(load_color_reader))
    )
    result = broken.search("the red one", verify=True)
    assert result.degraded == ("verify",)
    assert names(result) == names(gallery.search("the red one"))


def test_the_shipped_checkpoint_verifies_and_loads_its_color_head_only_then(
    photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Path | None] = []

    def load(folder: Path | None = None, encoder: Any = None) -> ColorReader | None:
        loaded.append(folder)
        # The model is that of the encoder, and not another copy.
        monkeypatch.setattr("reir.checkpoint.load_model", None)
        return load_color_reader(folder, encoder)

    encoder = load_encoder()
    monkeypatch.setattr("reir.checkpoint.load_color_reader", load)
    extras = load_extras(SHIPPED, encoder)
    assert extras.verifier is not None
    assert loaded == []
    box = (0.6, 0.2, 0.8, 0.6)
    requests = [
        VerifyRequest(image_id="x", uri=each.as_uri(), box=box, expression=f"a {each.stem} car")
        for each in photos
    ]
    for _ in range(2):
        for one, color in zip(extras.verifier.verify(requests), COLORS, strict=True):
            assert one is not None
            assert [each.likely for each in one] == [color]
    assert loaded == [SHIPPED]


def test_presence_is_computed_from_the_verified_scores(photos: list[Path]) -> None:
    calibration = score_calibration(FakeEncoder().digest, 20, -18)
    index = GALLERY_FEATURES.index("surprisal")
    weights = list(calibration.gallery.weights)
    weights[index] = -3.0
    calibration = replace(
        calibration,
        gallery=replace(calibration.gallery, weights=tuple(weights)),
        photo=replace(calibration.photo, weights=(20, 0, 0, 0, -2, 1)),
    )
    plain_gallery = gallery_of(photos)
    extras = CheckpointExtras(calibration=calibration, verifier=PixelVerifier(load_color_reader))
    gallery = Gallery("photos", plain_gallery._store, Blind(), extras)
    sentence = "a purple box next to a red box"
    plain, found = (gallery.search(sentence, verify=verify) for verify in (False, True))
    assert len({hit.presence for hit in plain}) == 1
    # The hits that fit the colors better than the others are more probable, the others less.
    presences = [hit.presence or 0.0 for hit in found]
    assert presences == sorted(presences, reverse=True)
    assert presences[0] > (plain[0].presence or 0.0) > presences[-1]
    assert presences == pytest.approx([calibration.hit([hit.score, 0, 0, 0, 0]) for hit in found])
    explained = gallery.search(sentence, verify=True, explain=True)
    read = [hit.evidence.colors for hit in explained if hit.evidence is not None]
    assert [hit.photo_presence for hit in found] == pytest.approx(
        [
            # The answer is not found, so no photo is more likely to have it than the gallery.
            min(calibration.of_photo(plain[0].score, 0, 0, colors), found.presence or 0.0)
            for colors in read
        ]
    )
    mean = float(np.mean([sum(each.surprisal for each in of_hit) for of_hit in read]))
    features = [found[0].score, 0, 0, 0, 0, 0, mean]
    assert found.presence == pytest.approx(calibration.gallery(features))


# --- one photo ---------------------------------------------------------------------------------


def reading(probability: float) -> VerifyResult:
    return (
        ColorReading(word="red", probability=probability, likely="red", likely_probability=0.5),
    )


def test_only_the_verified_instances_of_a_photo_change_places() -> None:
    scores = np.array([0.1, 0.52, 0.2, 0.5, 0.2, 0.51], dtype=np.float32)
    compared = (scores[:, None], np.ones(1, dtype=np.float32))
    plain = rank_instances(*compared)
    assert plain.order.tolist() == [1, 5, 3, 2, 4, 0]  # equal scores stay in their order
    assert plain.scores == pytest.approx([0.52, 0.51, 0.5, 0.2, 0.2, 0.1])
    assert plain.score == pytest.approx(0.52)
    assert plain.colors == ()
    verified = [reading(0.1), reading(0.05), reading(0.9)]
    found = rank_instances(*compared, verified=verified)
    assert found.order.tolist() == [3, 1, 5, 2, 4, 0]
    assert found.scores == sorted(found.scores, reverse=True)
    assert sum(found.scores) == pytest.approx(sum(plain.scores))
    assert found.scores[3:] == plain.scores[3:]
    assert found.score == pytest.approx(0.5)
    assert found.colors == verified[2]


def test_the_instances_of_one_photo_are_ordered_by_their_colors() -> None:
    image = draw_scene((300, 100), [("red", (20, 20, 80, 80)), ("green", (200, 20, 260, 80))])
    calibration = score_calibration(FakeEncoder().digest, 5, 0)
    calibration = replace(
        calibration, photo=replace(calibration.photo, weights=(0, 0, 0, 0, -2, 2), bias=1.0)
    )
    localizer = PixelLocalizer(Blind(), calibration, verifier=PixelVerifier(load_color_reader))
    plain = PixelLocalizer(Blind(), calibration).locate(image, ["a red box"])[0]
    assert len({each.score for each in plain.boxes}) == 1
    red, green, blue, box = localizer.locate(
        image, ["a red box", "a green box", "a blue box", "a box"]
    )
    assert red.boxes[0].box[0] < 0.1
    assert green.boxes[0].box[0] > 0.6
    for each in (red, green):
        assert each.boxes[0].score > plain.boxes[0].score > each.boxes[1].score
        assert (each.boxes[0].presence or 0) > (each.boxes[1].presence or 0)
        assert (each.presence or 0) > 0.7
    # No box is blue, so the photo has no blue box, but its boxes have no worse scores for that.
    assert (blue.presence or 1) < 0.5
    assert blue.boxes[0].score == pytest.approx(plain.boxes[0].score, abs=0.1)
    assert {each.score for each in box.boxes} == {each.score for each in plain.boxes}


def test_a_photo_without_instances_has_nothing_to_verify() -> None:
    localizer = PixelLocalizer(Blind(), verifier=PixelVerifier(load_color_reader))
    (found,) = localizer.locate(draw_scene((60, 60), []), ["a red box"])
    assert found.boxes == ()


# --- pages -------------------------------------------------------------------------------------


class LeftmostVerifier(PixelVerifier):
    """Finds a color less probable the farther to the right a box lies."""

    def __init__(self) -> None:
        super().__init__(lambda: None)
        self.asked: list[int] = []

    def verify(self, requests: Sequence[VerifyRequest]) -> list[VerifyResult | None]:
        self.asked.append(len(requests))
        return [
            (
                ColorReading(
                    word="red",
                    probability=float(np.exp(-40 * one.box[0])),
                    likely="red",
                    likely_probability=0.5,
                ),
            )
            for one in requests
        ]


def lookup_gallery(verifier: PixelVerifier | None, *, reranker: bool = False) -> Gallery:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(40, DIM)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    store = MemoryStore()
    fill_gallery(store, images_from_vectors(vectors, [4] * 10))
    extras = CheckpointExtras(RightmostReranker() if reranker else None, verifier=verifier)
    return Gallery("photos", store, LookupEncoder(), extras)


def ask(gallery: Gallery, **options: Any) -> SearchResult:
    usual: dict[str, Any] = {"verify": True, "per_image": 2}
    query = Query(terms=(Term(expression="number 0 red"),), **(usual | options))
    return gallery.ask([query])[0]


def ids(result: SearchResult) -> list[str]:
    return [hit.instance_id for hit in result]


@pytest.mark.parametrize("lengths", [(1,), (3,), (4, 9), (10,), (7, 2), (30,)])
def test_pages_put_together_are_one_large_answer(lengths: tuple[int, ...]) -> None:
    gallery = lookup_gallery(LeftmostVerifier())
    whole = ask(gallery, k=100)
    plain = ask(gallery, k=100, verify=False)
    first = set(ids(plain)[:VERIFIED_HITS])
    assert set(ids(whole)[:VERIFIED_HITS]) == first
    assert ids(whole)[VERIFIED_HITS:] == ids(plain)[VERIFIED_HITS:]
    assert ids(whole) != ids(plain)
    found: list[str] = []
    cursor = ""
    for turn in range(100):
        page = ask(gallery, k=lengths[turn % len(lengths)], cursor=cursor)
        found += ids(page)
        cursor = page.cursor
        if not cursor:
            break
    assert found == ids(whole)


def test_pages_after_the_verified_hits_run_no_verifier() -> None:
    verifier = LeftmostVerifier()
    gallery = lookup_gallery(verifier)
    first = ask(gallery, k=VERIFIED_HITS)
    second = ask(gallery, k=5, cursor=first.cursor)  # needs to know what follows the first page
    assert verifier.asked == [VERIFIED_HITS, VERIFIED_HITS]
    assert ask(gallery, k=5, cursor=second.cursor).hits
    assert verifier.asked == [VERIFIED_HITS, VERIFIED_HITS]


def test_a_page_of_verified_hits_is_not_answered_without_the_verifier() -> None:
    cursor = ask(lookup_gallery(LeftmostVerifier()), k=2).cursor
    with pytest.raises(QueryError, match="continues an answer of the color head"):
        ask(lookup_gallery(None), k=2, cursor=cursor)
    with pytest.raises(QueryError, match="belongs to another query"):
        ask(lookup_gallery(LeftmostVerifier()), k=2, cursor=cursor, verify=False)


def test_a_checkpoint_without_a_color_head_answers_as_if_it_was_not_asked() -> None:
    plain, asked = lookup_gallery(None), ask(lookup_gallery(None), k=5)
    assert ids(asked) == ids(ask(plain, k=5, verify=False))
    assert asked.degraded == ()


def test_verification_is_not_combined_with_the_re_ranker() -> None:
    gallery = lookup_gallery(LeftmostVerifier(), reranker=True)
    with pytest.raises(QueryError, match="cannot be combined with rerank") as caught:
        ask(gallery, rerank=True)
    assert caught.value.field == "verify"
