"""Text-to-image retrieval from photos to figures, with answers worked out by hand."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from reir.datasets import Caption
from reir.errors import DataError
from reir.evaluate import evaluate_tir, texts_of
from reir_testing import FakeEncoder
from reir_testing.photo_sets import draw_photo_set, three_photos


def caption(image_id: str, text: str) -> Caption:
    return Caption(caption_id=text, image_id=image_id, text=text)


def test_a_photo_is_found_by_its_best_instance_or_by_its_own_vector(tmp_path: Path) -> None:
    small_red, large_blue = ("red", (10, 40, 20, 50), ""), ("blue", (60, 0, 160, 120), "")
    data = draw_photo_set(
        tmp_path, [[small_red, large_blue], [("magenta", (10, 10, 90, 90), "")], [large_blue]]
    )
    texts = [caption("0.png", "red"), caption("1.png", "magenta"), caption("2.png", "blue")]
    report = evaluate_tir(FakeEncoder(), data, texts, tmp_path).to_dict()
    # Photos 0 and 2 hold the same blue shape: a tie, resolved against the query.
    assert report["best_instance"] == pytest.approx(
        {"r1": 200 / 3, "r5": 100, "r10": 100}, abs=1e-4
    )
    # Their vectors differ: most of photo 0 is blue, but not all of it.
    assert report["photo_vector"] == {"r1": 100, "r5": 100, "r10": 100}
    assert report["counts"]["texts"] == 3
    assert report["left_out"] == {"published figures": "this is not REIRCOCO's val split"}


def test_photos_that_do_not_decode_are_not_found(tmp_path: Path) -> None:
    data = three_photos(tmp_path)
    (tmp_path / "0.png").write_bytes(b"no photo")
    texts = [caption("0.png", "red"), caption("1.png", "green")]
    report = evaluate_tir(FakeEncoder(), data, texts, tmp_path).to_dict()
    assert report["best_instance"]["r10"] == report["photo_vector"]["r10"] == 50
    assert report["counts"]["unreadable"] == 1


def test_a_photo_without_instances_still_has_its_vector(tmp_path: Path) -> None:
    data = three_photos(tmp_path)
    report = evaluate_tir(FakeEncoder(), data, [caption("2.png", "red")], tmp_path).to_dict()
    assert report["best_instance"]["r10"] == 0
    assert report["photo_vector"]["r5"] == 100


def test_expressions_are_texts_too(tmp_path: Path) -> None:
    data = three_photos(tmp_path)
    texts = texts_of(data)
    assert [(text.image_id, text.text) for text in texts][:2] == [
        ("0.png", "the red one on the left"),
        ("0.png", "blue"),
    ]
    assert evaluate_tir(FakeEncoder(), data, texts, tmp_path).best_instance["r1"].mean == 75


def test_no_texts(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="drawn: no text is about any of its photos"):
        evaluate_tir(FakeEncoder(), three_photos(tmp_path), [], tmp_path)


def test_table_names_both_ways(tmp_path: Path) -> None:
    data = three_photos(tmp_path)
    console = Console(width=100, file=io.StringIO())
    with console.capture() as capture:
        console.print(evaluate_tir(FakeEncoder(), data, texts_of(data), tmp_path).table())
    text = capture.get()
    assert "4 texts" in text
    assert 0 < text.index("by the best instance") < text.index("by the vector of the photo")
