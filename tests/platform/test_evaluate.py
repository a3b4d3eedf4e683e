"""`reir.evaluate` and `reir eval reir` on photos drawn here, with answers worked out by hand."""

from __future__ import annotations

import io
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from reir.boxes import elementwise_iou
from reir.datasets import (
    Expression,
    ReferringDataset,
    ReferringImage,
    ReferringInstance,
    write_reircoco,
)
from reir.errors import CheckpointError, DataError
from reir.eval_cli import first_photos, register
from reir.evaluate import encode_gallery, evaluate_reir
from reir.models.seams import InstanceEncoder
from reir.testing import PALETTE, FakeEncoder, draw_scene

SIZE = (160, 120)
Box = tuple[int, int, int, int]


def photo_set(folder: Path, scenes: list[list[tuple[str, Box, str]]]) -> ReferringDataset:
    """Draw one photo a scene; each shape is an instance and, unless "", an expression."""
    images, instances, expressions = [], [], []
    for at, scene in enumerate(scenes):
        name = f"{at}.png"
        Image.fromarray(draw_scene(SIZE, [(c, b) for c, b, _ in scene])).save(folder / name)
        images.append(
            ReferringImage(image_id=name, file_name=name, width_px=SIZE[0], height_px=SIZE[1])
        )
        for number, (_, box, text) in enumerate(scene):
            key = f"{at}/{number}"
            instances.append(ReferringInstance(instance_id=key, image_id=name, box_xyxy_px=box))
            if text:
                expressions.append(
                    Expression(expression_id=key, image_id=name, instance_id=key, text=text)
                )
    return ReferringDataset(
        source="drawn",
        images=tuple(images),
        instances=tuple(instances),
        expressions=tuple(expressions),
    )


def simple(folder: Path) -> ReferringDataset:
    """Three photos, four expressions; the encoder gets three of four right at once."""
    return photo_set(
        folder,
        [
            [
                ("red", (10, 40, 50, 80), "the red one on the left"),
                ("blue", (110, 40, 150, 80), "blue"),
            ],
            [("green", (60, 20, 90, 100), "green"), ("yellow", (100, 20, 120, 40), "orange")],
            [],
        ],
    )


def random_scenes(seed: int, num_photos: int) -> list[list[tuple[str, Box, str]]]:
    """Shapes in three columns; many expressions name only a colour, so ties are common."""
    rng = np.random.default_rng(seed)
    words = list(PALETTE)[:3]
    scenes = []
    for _ in range(num_photos):
        scene = []
        for column in range(int(rng.integers(0, 4))):
            x, y = 55 * column + int(rng.integers(0, 10)), int(rng.integers(0, 60))
            box = (x, y, x + int(rng.integers(10, 40)), y + int(rng.integers(10, 50)))
            side = rng.choice(["", " on the left", " on the right"])
            scene.append((str(rng.choice(words)), box, str(rng.choice(words)) + side))
        scenes.append(scene)
    return scenes


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
                box_px = box * np.array([*SIZE, *SIZE])
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
    report = evaluate_reir(FakeEncoder(), simple(tmp_path), tmp_path).to_dict()
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
    data = photo_set(tmp_path, random_scenes(seed, 7))
    report = evaluate_reir(FakeEncoder(), data, tmp_path, all_expressions=True).to_dict()
    for k in (1, 5, 10):
        expected = slow_br(FakeEncoder(), data, tmp_path, k)
        assert report[f"br{k}_50"] == pytest.approx(expected, abs=1e-3)


def test_runs_are_equal_and_batches_change_nothing(tmp_path: Path) -> None:
    data = photo_set(tmp_path, random_scenes(9, 7))
    first = evaluate_reir(FakeEncoder(), data, tmp_path)
    assert evaluate_reir(FakeEncoder(), data, tmp_path) == first
    one, all_at_once = (
        encode_gallery(FakeEncoder(), data, tmp_path, batch_size=n) for n in (1, 50)
    )
    np.testing.assert_array_equal(one.arrays.vectors, all_at_once.arrays.vectors)
    np.testing.assert_array_equal(one.arrays.images, all_at_once.arrays.images)


def test_first_or_all_expressions(tmp_path: Path) -> None:
    data = simple(tmp_path)
    more = data.with_expressions(
        [*data.expressions, replace(data.expressions[0], expression_id="x", text="green")]
    )
    first = evaluate_reir(FakeEncoder(), more, tmp_path)
    every = evaluate_reir(FakeEncoder(), more, tmp_path, all_expressions=True)
    assert (first.counts["expressions"], every.counts["expressions"]) == (4, 5)
    assert first.definition_b["br1_50"].mean == 75
    assert every.definition_b["br1_50"].mean == 60


def test_expressions_about_nothing_are_counted_and_left_out(tmp_path: Path) -> None:
    data = simple(tmp_path)
    absent = Expression(expression_id="x", image_id="0.png", instance_id=None, text="a zebra")
    report = evaluate_reir(
        FakeEncoder(), data.with_expressions([*data.expressions, absent]), tmp_path
    )
    assert report.counts["expressions"] == 4
    assert report.counts["without_target"] == 1
    with pytest.raises(DataError, match=r"drawn: expected expressions .* got none of 1"):
        evaluate_reir(FakeEncoder(), data.with_expressions([absent]), tmp_path)


def test_boxes_are_in_the_annotated_size(tmp_path: Path) -> None:
    data = simple(tmp_path)
    doubled = replace(
        data,
        images=tuple(replace(i, width_px=2 * SIZE[0], height_px=2 * SIZE[1]) for i in data.images),
        instances=tuple(
            replace(i, box_xyxy_px=(2 * x1, 2 * y1, 2 * x2, 2 * y2))
            for i in data.instances
            for x1, y1, x2, y2 in [i.box_xyxy_px]
        ),
    )
    report = evaluate_reir(FakeEncoder(), doubled, tmp_path)
    assert report.definition_b["br1_90"].mean == 75
    assert report.counts["misshapen"] == 0


def test_unreadable_and_misshapen_photos_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = simple(tmp_path)
    (tmp_path / "0.png").write_bytes(b"no photo")
    Image.new("RGB", (SIZE[1], SIZE[0])).save(tmp_path / "2.png")
    with caplog.at_level(logging.WARNING):
        gallery = encode_gallery(FakeEncoder(), data, tmp_path)
    assert gallery.unreadable == {"0.png": "not_an_image"}
    assert gallery.num_misshapen == 1
    assert set(gallery.arrays.images.tolist()) == {1}
    assert "0.png" in caplog.text
    assert "1 of 3 photos have another aspect ratio" in caplog.text
    report = evaluate_reir(FakeEncoder(), data, tmp_path)
    assert report.counts["unreadable"] == 1
    assert report.definition_b["br1_50"].mean == 25


def test_missing_photos_end_the_run(tmp_path: Path) -> None:
    data = simple(tmp_path)
    (tmp_path / "1.png").unlink()
    with pytest.raises(DataError, match=r"1 of 3 photos of drawn are not in .*, e\.g\. 1\.png"):
        evaluate_reir(FakeEncoder(), data, tmp_path)


@pytest.mark.parametrize("name", ["../0.png", "/etc/passwd", "a/../../0.png", "a\0.png"])
def test_file_names_stay_in_the_folder(tmp_path: Path, name: str) -> None:
    data = simple(tmp_path)
    first, *others = data.images
    with pytest.raises(DataError, match="expected a file_name within the folder"):
        evaluate_reir(
            FakeEncoder(), replace(data, images=(replace(first, file_name=name), *others)), tmp_path
        )


def test_progress_counts_every_photo(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    encode_gallery(
        FakeEncoder(),
        simple(tmp_path),
        tmp_path,
        batch_size=2,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(2, 3), (3, 3)]


def test_table_shows_every_figure(tmp_path: Path) -> None:
    report = evaluate_reir(FakeEncoder(), simple(tmp_path), tmp_path)
    console = Console(width=100, file=io.StringIO())
    with console.capture() as capture:
        console.print(report.table())
    text = capture.get()
    assert "4 expressions, 3 photos, 4 instances" in text
    assert text.count("definition B") == text.count("definition A") == 3
    assert "75.0 [" in text
    assert "image recall" in text
    assert "top box in its photo, IoU > .9" in text


def run_command(*arguments: str) -> Any:
    app = typer.Typer()
    register(app)
    return CliRunner().invoke(app, ["eval", "reir", *arguments])


def test_first_photos_keep_their_expressions(tmp_path: Path) -> None:
    part = first_photos(simple(tmp_path), 1)
    assert [photo.image_id for photo in part.images] == ["0.png"]
    assert len(part.expressions) == 2


def test_command_with_a_checkpoint_that_is_none(tmp_path: Path) -> None:
    write_reircoco(simple(tmp_path), tmp_path / "val.json")
    annotations = str(tmp_path / "val.json")
    result = run_command(
        "--annotations", annotations, "--images", str(tmp_path), "--checkpoint", str(tmp_path)
    )
    assert isinstance(result.exception, CheckpointError)


def test_command_prints_json_and_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_reircoco(simple(tmp_path), tmp_path / "val.json")
    monkeypatch.setattr("reir.checkpoint.load_encoder", lambda _path: FakeEncoder())
    common = ("--annotations", str(tmp_path / "val.json"), "--images", str(tmp_path))
    printed = run_command(*common, "--json")
    assert printed.exit_code == 0, printed.output
    report = json.loads(printed.stdout)
    assert report["br1_50"] == 75
    assert {f"br{k}_{t}" for k in (1, 5, 10) for t in (50, 70, 90)} <= report.keys()
    limited = json.loads(run_command(*common, "--json", "--limit", "1").stdout)
    assert limited["counts"]["photos"] == 1
    assert "image recall" in run_command(*common).stdout
    assert run_command(*common, "--limit", "0").exit_code == 2
