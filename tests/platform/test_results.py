"""What a user gets back: hits that open their photos, and results that behave like sequences."""

from __future__ import annotations

import base64
import json
import pickle
import re
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reir.errors import ImageError, SourceError
from reir.images.decode import canonical_uri
from reir.models.zoom_steps import ZoomSearch
from reir.results import LIKELY, POSSIBLE, Hit, SearchResult, likelihood_of

SIZE = (40, 20)
BLUE = (0, 0, 255)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A red photo of 40 x 20 pixels whose right half is blue."""
    path = tmp_path / "a b.png"
    picture = Image.new("RGB", SIZE, (255, 0, 0))
    picture.paste(BLUE, (20, 0, 40, 20))
    picture.save(path)
    return path


def make_hit(uri: str, box: tuple[float, float, float, float] = (0.5, 0.0, 1.0, 1.0)) -> Hit:
    return Hit(
        instance_id="i#0",
        image_id="i",
        uri=uri,
        box=box,
        score=0.25,
        objectness=0.5,
        attributes={"camera": "X100"},
        presence=0.75,
        photo_presence=0.3,
    )


def make_result(*hits: Hit) -> SearchResult:
    return SearchResult(
        expression="the <blue> half", gallery="g", version="v", hits=hits, timings_ms={"text": 1.0}
    )


def test_a_hit_opens_its_photo_upright(tmp_path: Path) -> None:
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    Image.new("RGB", SIZE).save(path, exif=exif)
    hit = make_hit(canonical_uri(path), (0.0, 0.5, 1.0, 1.0))
    assert hit.open().size == (20, 40)
    assert hit.box_px == (0, 20, 20, 40)
    assert hit.path == path


def test_a_crop_shows_the_box(photo: Path) -> None:
    hit = make_hit(canonical_uri(photo))
    assert hit.box_px == (20, 0, 40, 20)
    pixels = np.asarray(hit.crop())
    assert pixels.shape == (20, 20, 3)
    assert (pixels == BLUE).all()


def test_a_margin_is_a_share_of_the_box_and_ends_at_the_photo(photo: Path) -> None:
    hit = make_hit(canonical_uri(photo), (0.25, 0.5, 0.5, 1.0))
    assert hit.crop().size == (10, 10)
    assert hit.crop(margin=0.5).size == (20, 15)
    with pytest.raises(ValueError, match=r"margin must be 0 or more, got -0\.1"):
        hit.crop(margin=-0.1)


def test_an_empty_box_is_one_pixel(photo: Path) -> None:
    assert make_hit(canonical_uri(photo), (1.0, 1.0, 1.0, 1.0)).crop().size == (1, 1)


def test_a_hit_elsewhere_has_no_path(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="not local"):
        _ = make_hit("s3://bucket/a.jpg").path
    with pytest.raises(ImageError, match="does not exist"):
        make_hit(canonical_uri(tmp_path / "gone.jpg")).open()
    with pytest.raises(ImageError, match=r"not from 'http://h/a\.jpg'"):
        make_hit("http://h/a.jpg").read()


def test_a_reader_takes_the_place_of_the_uri(photo: Path) -> None:
    hit = replace(make_hit("file:///nowhere.jpg"), reader={"i": photo.read_bytes()}.__getitem__)
    assert hit.open().size == SIZE
    assert hit == make_hit("file:///nowhere.jpg")


def test_a_result_is_a_sequence_of_its_hits() -> None:
    hits = tuple(replace(make_hit("u"), score=float(n)) for n in range(3))
    result = make_result(*hits)
    assert len(result) == 3
    assert list(result) == list(hits)
    assert result[0] is hits[0]
    assert result[1:] == hits[1:]
    assert hits[2] in result
    with pytest.raises(IndexError):
        result[3]
    assert not make_result()


def test_representations_are_short(photo: Path) -> None:
    hit = make_hit(canonical_uri(photo))
    assert repr(hit) == "Hit('a b.png', box (0.50, 0.00, 1.00, 1.00), score 0.250, possible)"
    assert repr(make_result(hit)) == "SearchResult('the <blue> half', 1 hit)"
    assert repr(replace(make_result(hit), expression="")) == "SearchResult(1 hit)"
    assert (
        repr(replace(make_result(), presence=0.1))
        == "SearchResult('the <blue> half', 0 hits, presence 10%)"
    )


def test_a_notebook_shows_the_drawn_photos(photo: Path) -> None:
    html = make_result(make_hit(canonical_uri(photo)))._repr_html_()
    found = re.fullmatch(r'<img alt="([^"]*)" src="data:image/jpeg;base64,([^"]*)">', html)
    assert found is not None
    assert "a b.png" in found[1]
    with Image.open(BytesIO(base64.b64decode(found[2]))) as picture:
        assert picture.width > 300
        blue = (np.asarray(picture.convert("RGB"))[..., 2] > 200).mean()
    assert blue > 0.1


def test_a_notebook_shows_text_in_which_no_markup_counts(tmp_path: Path) -> None:
    uri = canonical_uri(tmp_path / '"><script>.png')
    html = make_result(make_hit(uri))._repr_html_()
    assert "<script>" not in html
    assert html.count('"') == 4


@pytest.mark.parametrize(
    ("presence", "word"),
    [
        (None, None),
        (1.0, "likely"),
        (LIKELY, "likely"),
        (0.499, "possible"),
        (POSSIBLE, "possible"),
        (0.199, "unlikely"),
        (0.0, "unlikely"),
    ],
)
def test_a_presence_in_words(presence: float | None, word: str | None) -> None:
    assert likelihood_of(presence) == word
    hit = replace(make_hit("u"), photo_presence=presence)
    assert hit.likelihood == word
    assert replace(make_result(hit), presence=presence).likelihood == word


def test_the_headline_says_what_the_hits_are() -> None:
    hits = [replace(make_hit("u"), image_id=each) for each in "aab"]
    result = replace(make_result(*hits), presence=0.9)
    assert result.headline == ""
    assert replace(result, equally_good=2).headline == "The first 2 hits fit equally well."
    photos = replace(result, hits=(*hits[1:],), equally_good=2)
    assert photos.headline == "The first 2 photos fit equally well."
    doubtful = replace(result, presence=0.4, equally_good=2)
    assert doubtful.headline == "It may not be in this gallery. The closest matches:"
    absent = replace(result, presence=0.4, found=False)
    assert absent.headline == "Probably not in this gallery. The nearest misses:"
    assert absent.sheet.notes[0] == absent.headline
    search = ZoomSearch(steps=(), box=(0, 0, 1, 1), score=0.5)
    zoomed = replace(absent, hits=(replace(hits[0], zoom=search), *hits[1:]))
    assert zoomed.headline.endswith("Zooming in found:")
    assert replace(absent, hits=()).headline == ""


def test_a_data_frame_has_a_row_for_each_hit(photo: Path) -> None:
    pytest.importorskip("pandas")
    frame = make_result(make_hit(canonical_uri(photo)), make_hit("u")).to_pandas()
    assert list(frame["rank"]) == [1, 2]
    assert list(frame["attr.camera"]) == ["X100", "X100"]
    assert frame.loc[0, ["x1", "y1", "x2", "y2"]].tolist() == [0.5, 0.0, 1.0, 1.0]
    empty = make_result().to_pandas()
    assert len(empty) == 0
    assert set(empty.columns) < set(frame.columns)


def test_json_holds_no_reader_and_results_can_be_pickled(photo: Path) -> None:
    hit = replace(make_hit(canonical_uri(photo)), reader=lambda _: b"")
    values = json.loads(json.dumps(make_result(hit).to_dict()))
    assert "reader" not in values["hits"][0]
    assert values["hits"][0]["presence"] == 0.75
    assert values["hits"][0]["likelihood"] == "possible"
    plain = make_result(make_hit("u"))
    assert pickle.loads(pickle.dumps(plain)) == plain
