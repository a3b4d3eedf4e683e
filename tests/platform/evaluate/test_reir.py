"""BR@K from photos to figures, query-free and leaky, with answers worked out by hand."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from reir.datasets import Expression, ReferringDataset
from reir.errors import DataError
from reir.evaluate import Encoding, evaluate_reir
from reir.images.boxes import elementwise_iou
from reir.models.interfaces import InstanceEncoder
from reir.records import Instances
from reir_testing import ChoosingFakeEncoder, FakeEncoder
from reir_testing.photo_sets import SIZE_PX, draw_photo_set, random_scenes, three_photos


def slow_br(encoder: InstanceEncoder, data: ReferringDataset, folder: Path, k: int) -> float:
    """BR@K at IoU .5, definition B, one query and one photo at a time, worst order of ties."""
    found = 0
    for text in data.expressions:
        target = data.instances_by_id[str(text.instance_id)]
        query = encoder.encode_expressions([text.text])[0]
        ranked = []
        for photo in data.images:
            pixels = np.array(Image.open(folder / photo.file_name))
            instances = encoder.encode_images([pixels])[0]
            for box, vector in zip(instances.boxes, instances.vectors, strict=True):
                box_px = box * np.array([*SIZE_PX, *SIZE_PX])
                fits = elementwise_iou(box_px, target.box_xyxy_px) >= 0.5
                ranked.append(
                    (
                        -round(float(vector @ query), 5),
                        photo.image_id == target.image_id and bool(fits),
                    )
                )
        ranked.sort()
        found += any(good for _, good in ranked[:k])
    return 100 * found / len(data.expressions)


def test_known_answers(tmp_path: Path) -> None:
    report = evaluate_reir(FakeEncoder(), three_photos(tmp_path), tmp_path).to_dict()
    assert report["br1_50"] == report["br1_90"] == report["definition_a"]["br1_50"] == 75
    assert report["br10_50"] == 100
    assert report["definition_a"]["br10_50"] == 75  # in the photo of the yellow shape, green leads
    assert report["image_recall"] == {"r1": 75, "r5": 100, "r10": 100}
    assert report["rec"]["p50"] == 75
    low, high = report["intervals"]["br1_50"]
    assert 0 <= low <= 75 <= high <= 100
    assert report["counts"] == {
        "photos": 3,
        "unreadable": 0,
        "misshapen": 0,
        "instances": 4,
        "expressions": 4,
        "without_target": 0,
    }
    assert report["digest"] == FakeEncoder().digest
    assert set(report["versions"]) == {"reir", "numpy", "torch", "python"}
    assert json.loads(json.dumps(report)) == report


@pytest.mark.parametrize("seed", range(4))
def test_evaluate_reir_matches_reference(tmp_path: Path, seed: int) -> None:
    data = draw_photo_set(tmp_path, random_scenes(seed, 7))
    report = evaluate_reir(FakeEncoder(), data, tmp_path, all_expressions=True).to_dict()
    for k in (1, 5, 10):
        expected = slow_br(FakeEncoder(), data, tmp_path, k)
        assert report[f"br{k}_50"] == pytest.approx(expected, abs=1e-3)


def test_first_or_all_expressions(tmp_path: Path) -> None:
    data = three_photos(tmp_path)
    more = data.with_expressions(
        [*data.expressions, replace(data.expressions[0], expression_id="x", text="green")]
    )
    first = evaluate_reir(FakeEncoder(), more, tmp_path)
    every = evaluate_reir(FakeEncoder(), more, tmp_path, all_expressions=True)
    assert (first.info.counts["expressions"], every.info.counts["expressions"]) == (4, 5)
    assert first.query_free.definition_b["br1_50"].mean == 75
    assert every.query_free.definition_b["br1_50"].mean == 60


def test_expressions_about_nothing_are_counted_and_left_out(tmp_path: Path) -> None:
    data = three_photos(tmp_path)
    absent = Expression(expression_id="x", image_id="0.png", instance_id=None, text="a zebra")
    report = evaluate_reir(
        FakeEncoder(), data.with_expressions([*data.expressions, absent]), tmp_path
    )
    assert report.info.counts["expressions"] == 4
    assert report.info.counts["without_target"] == 1
    with pytest.raises(DataError, match=r"drawn: none of 1 expressions describes"):
        evaluate_reir(FakeEncoder(), data.with_expressions([absent]), tmp_path)


def test_boxes_are_in_the_annotated_size(tmp_path: Path) -> None:
    data = three_photos(tmp_path)
    doubled = replace(
        data,
        images=tuple(
            replace(i, width_px=2 * SIZE_PX[0], height_px=2 * SIZE_PX[1]) for i in data.images
        ),
        instances=tuple(
            replace(i, box_xyxy_px=(2 * x1, 2 * y1, 2 * x2, 2 * y2))
            for i in data.instances
            for x1, y1, x2, y2 in [i.box_xyxy_px]
        ),
    )
    report = evaluate_reir(FakeEncoder(), doubled, tmp_path)
    assert report.query_free.definition_b["br1_90"].mean == 75
    assert report.info.counts["misshapen"] == 0


def test_table_shows_every_figure(tmp_path: Path) -> None:
    report = evaluate_reir(FakeEncoder(), three_photos(tmp_path), tmp_path)
    console = Console(width=100, file=io.StringIO())
    with console.capture() as capture:
        console.print(report.table())
    text = capture.get()
    assert "4 expressions" in text
    assert "4 instances of 3 photos" in text
    assert text.count("definition B") == text.count("definition A") == 3
    assert "75.0 [" in text
    assert "image recall" in text
    assert "top box in its photo, IoU > .9" in text


# ------------------------------------------------------------------------------ the leaky choice


def test_a_leaky_choice_hides_what_the_query_would_confuse(tmp_path: Path) -> None:
    red, green = (10, 40, 50, 80), (100, 10, 150, 110)
    data = draw_photo_set(
        tmp_path,
        [
            [("red", red, "red left"), ("blue", green, "")],
            [("red", red, ""), ("green", green, "green")],
        ],
    )
    report = evaluate_reir(ChoosingFakeEncoder(num_candidates=2), data, tmp_path).to_dict()
    # Both photos show the same red box: equal scores, resolved against the query.
    assert (report["br1_50"], report["br5_50"]) == (50, 100)
    # Each photo's own expression chooses two of two as well: nothing is hidden.
    assert (report["leaky"]["br1_50"], report["leaky"]["br5_50"]) == (50, 100)
    one = evaluate_reir(ChoosingFakeEncoder(num_candidates=1), data, tmp_path).to_dict()
    # Of each photo the largest alone is kept: blue and green. No red is left to find.
    assert one["br10_50"] == 50
    # "red left" chooses the red of its own photo, "green" hides the other red.
    assert one["leaky"]["br1_50"] == 100
    assert one["leaky"]["definition_a"]["br1_50"] == 100
    assert one["leaky"]["image_recall"]["r1"] == 100
    assert one["leaky"]["rec"]["p50"] == 100


def released(encoder: ChoosingFakeEncoder, data: ReferringDataset, folder: Path, k: int) -> float:
    """BR@K at IoU .5, A, leaky: the released evaluator, run once a turn, photo by photo."""
    texts = {
        photo.image_id: [text for text in data.expressions if text.image_id == photo.image_id]
        for photo in data.images
    }
    found = 0
    for turn in range(max(map(len, texts.values()))):
        shown: dict[str, Instances] = {}
        for photo in data.images:
            pixels = [np.array(Image.open(folder / photo.file_name))]
            own = texts[photo.image_id]
            if own:
                asked = encoder.encode_expressions([own[turn % len(own)].text])
                (chosen,) = encoder.encode_images_for(pixels, [asked], encoder.num_candidates)
                shown[photo.image_id] = chosen.by_expression[0]
            else:
                shown[photo.image_id] = encoder.encode_images(pixels)[0]
        for own in texts.values():
            if turn < len(own):
                target = data.instances_by_id[str(own[turn].instance_id)]
                (query,) = encoder.encode_expressions([own[turn].text])
                ranked = []
                for image_id, instances in shown.items():
                    for box, vector in zip(instances.boxes, instances.vectors, strict=True):
                        box_px = box * np.array([*SIZE_PX, *SIZE_PX])
                        iou = float(elementwise_iou(box_px, target.box_xyxy_px))
                        mine = image_id == target.image_id
                        ranked.append((-round(float(vector @ query), 5), mine, iou))
                ranked.sort()  # of equal scores the wrong photo first, then the worse box
                best = next((n for n, (_, mine, _) in enumerate(ranked) if mine), None)
                found += best is not None and best < k and ranked[best][2] >= 0.5
    return 100 * found / len(data.expressions)


@pytest.mark.parametrize("seed", range(4))
def test_leaky_figures_match_the_released_evaluator(tmp_path: Path, seed: int) -> None:
    data = draw_photo_set(tmp_path, random_scenes(seed, 7))
    encoder = ChoosingFakeEncoder(num_candidates=2)
    report = evaluate_reir(encoder, data, tmp_path, all_expressions=True).to_dict()
    for k in (1, 5, 10):
        expected = released(encoder, data, tmp_path, k)
        assert report["leaky"]["definition_a"][f"br{k}_50"] == pytest.approx(expected, abs=1e-3)


def test_query_free_figures_do_not_depend_on_the_leaky_ones(tmp_path: Path) -> None:
    data = draw_photo_set(tmp_path, random_scenes(5, 7))
    with_both = evaluate_reir(ChoosingFakeEncoder(3), data, tmp_path, how=Encoding(shard_photos=2))
    alone = evaluate_reir(FakeEncoder(3), data, tmp_path)
    assert with_both.query_free == alone.query_free
    assert with_both.leaky is not None
    assert alone.leaky is None
    assert "an expression cannot choose" in alone.info.left_out["leaky choice"]


def test_the_table_marks_what_is_leaky_and_comes_after_the_query_free_part(tmp_path: Path) -> None:
    report = evaluate_reir(ChoosingFakeEncoder(), three_photos(tmp_path), tmp_path)
    console = Console(width=100, file=io.StringIO())
    with console.capture() as capture:
        console.print(report.table())
    text = capture.get()
    assert 0 < text.index("chosen without any query") < text.index("LEAKY")
    assert text.count("definition B") == 6
    assert max(map(len, text.splitlines())) <= 100
