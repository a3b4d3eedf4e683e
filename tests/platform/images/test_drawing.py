"""Boxes on photos and contact sheets, checked pixel by pixel where it matters."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageColor

from reir.errors import ReirError
from reir.images import drawing
from reir.images.decode import canonical_uri
from reir.images.drawing import contact_sheets, draw_boxes, save_picture
from reir.images.rle import encode
from reir.results import Hit, SearchResult

FIRST, SECOND = (ImageColor.getrgb(color) for color in drawing.HIT_COLORS[:2])
PHOTO_COLOR = (20, 120, 60)


def make_hit(
    uri: str, box: tuple[float, float, float, float] = (0.25, 0.25, 0.75, 0.75), score: float = 0.5
) -> Hit:
    return Hit(instance_id="a#0", image_id="a", uri=uri, box=box, score=score, objectness=0.9)


def make_result(hits: list[Hit], expression: str = "the red mug") -> SearchResult:
    return SearchResult(
        expression=expression,
        gallery="kitchen",
        version="v1",
        hits=tuple(hits),
        timings_ms={"text": 1.0, "search": 2.0},
    )


@pytest.fixture
def photo_uri(tmp_path: Path) -> str:
    path = tmp_path / "a mug.png"
    Image.new("RGB", (400, 300), PHOTO_COLOR).save(path)
    return canonical_uri(path)


def pixels_of(image: Image.Image) -> npt.NDArray[np.uint8]:
    return np.asarray(image)


def count_of(image: Image.Image, color: tuple[int, ...]) -> int:
    return int((pixels_of(image) == color).all(-1).sum())


def test_the_frame_surrounds_the_box_and_leaves_its_inside() -> None:
    photo = Image.new("RGB", (400, 300), PHOTO_COLOR)
    drawn = pixels_of(draw_boxes(photo, [(0.25, 0.25, 0.75, 0.75)], [""]))
    inside = drawn[76:224, 101:299]
    assert (inside == PHOTO_COLOR).all()
    ys, xs = np.nonzero((drawn == FIRST).all(-1))
    assert 90 <= xs.min() < 100
    assert 300 <= xs.max() < 310
    assert 65 <= ys.min() < 75
    assert 224 <= ys.max() < 234
    assert (pixels_of(photo) == PHOTO_COLOR).all(), "the photo itself must stay as it was"


def test_the_first_box_lies_on_top() -> None:
    photo = Image.new("RGB", (200, 200))
    box = (0.2, 0.2, 0.8, 0.8)
    drawn = draw_boxes(photo, [box, box], ["", ""])
    assert count_of(drawn, FIRST) > 0
    assert count_of(drawn, SECOND) == 0


def test_labels_are_written_and_must_fit_in_number() -> None:
    photo = Image.new("RGB", (200, 200), PHOTO_COLOR)
    box = (0.4, 0.4, 0.8, 0.8)
    bare, labeled = draw_boxes(photo, [box], [""]), draw_boxes(photo, [box], ["mug"])
    assert count_of(labeled, (255, 255, 255)) > count_of(bare, (255, 255, 255)) == 0
    with pytest.raises(ValueError, match="1 boxes need as many labels, got 0"):
        draw_boxes(photo, [box], [])


@pytest.mark.parametrize("top", [0.0, 0.3])
def test_labels_at_the_same_corner_do_not_cover_each_other(top: float) -> None:
    photo, box = Image.new("RGB", (400, 300), PHOTO_COLOR), (0.2, top, 0.8, 0.9)
    ink = ImageColor.getrgb(drawing.CARD)
    of_one = count_of(draw_boxes(photo, [box], ["8"]), ink)
    assert of_one > 0
    assert count_of(draw_boxes(photo, [box] * 3, ["8"] * 3), ink) == 3 * of_one


def test_a_photo_without_room_for_all_labels_is_drawn_all_the_same() -> None:
    photo = Image.new("RGB", (40, 30), PHOTO_COLOR)
    assert draw_boxes(photo, [(0, 0, 1, 1)] * 5, ["8"] * 5).size == photo.size


def test_masks_are_shaded_at_any_size() -> None:
    photo = Image.new("RGB", (200, 100), PHOTO_COLOR)
    left = np.zeros((50, 40), dtype=bool)  # of another size than the photo
    left[:, :20] = True
    box = (0.0, 0.0, 1.0, 1.0)
    drawn = pixels_of(draw_boxes(photo, [box], [""], [encode(left)])).astype(int)
    plain = pixels_of(draw_boxes(photo, [box], [""])).astype(int)
    share = drawing.MASK_OPACITY / 255
    want = (1 - share) * np.array(PHOTO_COLOR) + share * np.array(FIRST)
    np.testing.assert_allclose(drawn[20:80, 20:95], np.broadcast_to(want, (60, 75, 3)), atol=1)
    np.testing.assert_array_equal(drawn[20:80, 105:180], plain[20:80, 105:180])
    assert (draw_boxes(photo, [box], [""], [None]).tobytes()) == plain.astype(np.uint8).tobytes()
    with pytest.raises(ValueError, match="1 boxes need as many masks or none, got 2"):
        draw_boxes(photo, [box], [""], [None, None])


def test_sheets_show_masks(photo_uri: str) -> None:
    hit = make_hit(photo_uri)
    masked = replace(hit, mask=encode(np.ones((3, 4), dtype=bool)))
    bare, shaded = (make_result([each]).draw() for each in (hit, masked))
    assert bare.tobytes() != shaded.tobytes()


@given(
    st.tuples(st.integers(1, 60), st.integers(1, 60)),
    st.lists(st.floats(0, 1), min_size=4, max_size=4),
)
@settings(max_examples=50, deadline=None)
def test_any_box_on_any_photo_is_drawn(size: tuple[int, int], sides: list[float]) -> None:
    x1, x2 = sorted(sides[:2])
    y1, y2 = sorted(sides[2:])
    drawn = draw_boxes(Image.new("L", size), [(x1, y1, x2, y2)], ["1  0.50"])
    assert drawn.size == size
    assert drawn.mode == "RGB"


def test_a_sheet_has_a_row_for_every_columns_hits(photo_uri: str) -> None:
    sizes = [
        make_result([make_hit(photo_uri)] * count).draw(columns=3, tile_px=100).size
        for count in (1, 2, 3, 4, 6, 7)
    ]
    row = 100 + drawing.CAPTION_PX + drawing.GAP_PX
    widths, heights = zip(*sizes, strict=True)
    assert widths[2] == widths[3] == 2 * drawing.MARGIN_PX + 300 + 2 * drawing.GAP_PX
    assert [height - heights[0] for height in heights] == [0, 0, 0, row, row, 2 * row]


def test_a_tile_shows_the_photo_with_its_box(photo_uri: str) -> None:
    sheet = make_result([make_hit(photo_uri)]).draw(tile_px=200)
    assert count_of(sheet, PHOTO_COLOR) > 100 * 75
    assert count_of(sheet, FIRST) > 500


def test_small_photos_are_enlarged_to_the_tile(tmp_path: Path) -> None:
    path = tmp_path / "tiny.png"
    Image.new("RGB", (20, 10), PHOTO_COLOR).save(path)
    sheet = make_result([make_hit(canonical_uri(path), (0, 0, 0, 0))]).draw(tile_px=200)
    assert count_of(sheet, PHOTO_COLOR) > 0.9 * 200 * 100


def test_an_empty_answer_says_so() -> None:
    empty = make_result([]).draw(tile_px=200)
    ink = count_of(empty, ImageColor.getrgb(drawing.INK))
    assert ink > 100
    assert count_of(empty, FIRST) == 0


@pytest.mark.parametrize(
    "uri", ["file:///no/such/photo.jpg", "s3://bucket/photo.jpg", "nonsense", ""]
)
def test_a_photo_that_cannot_be_read_gets_a_tile_all_the_same(uri: str, photo_uri: str) -> None:
    sheet = make_result([make_hit(uri), make_hit(photo_uri)]).draw(tile_px=128)
    assert sheet.size == make_result([make_hit(photo_uri)] * 2).draw(tile_px=128).size
    assert count_of(sheet, PHOTO_COLOR) > 0


def test_odd_file_names_and_expressions_are_drawn(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/new\nline \xe9" + b"x" * 200 + b".png"))
    Image.new("RGB", (40, 30), PHOTO_COLOR).save(path)
    result = make_result([make_hit(canonical_uri(path))], "x" * 400 + "\n\0 the mug " * 20)
    sheet = result.draw(tile_px=128)
    assert count_of(sheet, PHOTO_COLOR) > 0


def test_a_long_expression_takes_more_lines_and_stays_within_the_sheet(photo_uri: str) -> None:
    short = make_result([make_hit(photo_uri)]).draw(tile_px=128)
    long = make_result([make_hit(photo_uri)], "the red mug " * 12).draw(tile_px=128)
    assert long.width == short.width
    assert long.height > short.height
    right_margin = pixels_of(long)[:, -drawing.MARGIN_PX + 2 :]
    assert (right_margin == ImageColor.getrgb(drawing.PAPER)).all()


@pytest.mark.parametrize(("columns", "tile_px"), [(0, 320), (4, 63)])
def test_sheets_too_small_are_refused(columns: int, tile_px: int) -> None:
    with pytest.raises(ValueError, match=f"got {columns} and {tile_px}"):
        make_result([]).draw(columns=columns, tile_px=tile_px)


def test_several_sheets_are_stacked(photo_uri: str) -> None:
    results = [make_result([make_hit(photo_uri)] * 3), make_result([])]
    alone = [result.draw(tile_px=100) for result in results]
    page = contact_sheets([result.sheet for result in results], tile_px=100)
    assert page.width == max(sheet.width for sheet in alone)
    assert page.height == sum(sheet.height for sheet in alone)
    with pytest.raises(ValueError, match="at least one sheet"):
        contact_sheets([])


@pytest.mark.parametrize(("ending", "height"), [("webp", 16_384), ("jpg", 65_501), ("gif", 65_536)])
def test_a_format_that_is_too_small_for_a_picture_is_named(
    tmp_path: Path, ending: str, height: int
) -> None:
    picture, path = Image.new("RGB", (1, height)), tmp_path / f"long.{ending}"
    with pytest.raises(ReirError, match=rf"{path}: .* 1 x {height} pixels .*; use \.png$"):
        save_picture(picture, path)
    save_picture(picture, tmp_path / "long.png")
    with pytest.raises(FileNotFoundError):
        save_picture(picture, tmp_path / "nowhere" / "long.png")


@pytest.mark.parametrize(
    ("name", "said"), [("a.foo", r"\.foo"), ("a.psd", r"\.psd"), ("a", "a file without a suffix")]
)
def test_an_ending_of_which_there_is_no_format_is_named(
    tmp_path: Path, name: str, said: str
) -> None:
    picture, path = Image.new("RGB", (1, 1)), tmp_path / name
    with pytest.raises(ReirError, match=rf"^{path}: cannot write {said}; use \.png, \.jpg or \.w"):
        save_picture(picture, path)
    assert not path.exists()


def test_results_draw_and_save_themselves(photo_uri: str, tmp_path: Path) -> None:
    result = make_result([make_hit(photo_uri)])
    result.save_drawing(tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as saved:
        assert pixels_of(saved).tolist() == pixels_of(result.draw()).tolist()
