"""SOREC from photos to figures, with answers worked out by hand and by an independent program."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from reir.datasets import read_sorec
from reir.errors import DataError
from reir.evaluate import Encoding, evaluate_sorec
from reir.evaluate import published as tables
from reir.images.decode import read_image
from reir.images.tiling import TiledEncoder, Tiling
from reir.records import Instances, RgbImage
from reir_testing import FakeEncoder, draw_scene
from reir_testing.photo_sets import SIZE_PX, draw_photo_set, random_scenes, three_photos

TILING = Tiling(above_px=100, side_px=60)


class FarSighted(FakeEncoder):
    """Does not see what covers less than 1 % of a picture."""

    def encode_images(self, images: Sequence[RgbImage]) -> list[Instances]:
        return [self._large(each) for each in super().encode_images(images)]

    def _large(self, found: Instances) -> Instances:
        kept = found.areas > 0.01
        return Instances(
            boxes=found.boxes[kept],
            objectness=found.objectness[kept],
            vectors=found.vectors[kept],
            image_vector=found.image_vector,
        )


def write_sorec(folder: Path, seed: int, num_photos: int) -> list[dict[str, Any]]:
    """Draw photos named as those of SODA-D, and write `val.json` about them."""
    entries: list[dict[str, Any]] = []
    for at, scene in enumerate(random_scenes(seed, num_photos)):
        name = f"{10849 + at}.jpg"
        pixels = draw_scene(SIZE_PX, [(color, box) for color, box, _ in scene])
        Image.fromarray(pixels).save(folder / name, quality=95)
        for _, (x1, y1, x2, y2), text in scene:
            # A box that is too wide, so that the IoUs differ.
            bbox = [x1, y1, x2 - x1 + 3 * (len(entries) % 6), y2 - y1]
            entries.append({"image": name, "bbox": bbox, "ref": text, "id": len(entries) + 1})
    (folder / "val.json").write_text(json.dumps(entries))
    return entries


def slow_iou(a: Sequence[float], b: Sequence[float]) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    both = width * height
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def slow_ious(folder: Path, entry: dict[str, Any]) -> list[float]:
    """Return the IoU of each instance of the photo with the true box, best instance first."""
    pixels = read_image(folder / entry["image"])
    (found,) = FakeEncoder().encode_images([pixels])
    (vector,) = FakeEncoder().encode_expressions([entry["ref"]])
    x, y, w, h = entry["bbox"]
    ranked = []
    for box, own in zip(found.boxes.tolist(), found.vectors, strict=True):
        sides_px = [pixels.shape[1], pixels.shape[0]] * 2
        box_px = [share * side for share, side in zip(box, sides_px, strict=True)]
        ranked.append((-round(float(own @ vector), 5), slow_iou(box_px, (x, y, x + w, y + h))))
    return [iou for _, iou in sorted(ranked)]


def slow_accuracy(ious: list[list[float]], k: int, percent: int) -> float:
    return 100 * sum(max(each[:k], default=0) >= percent / 100 for each in ious) / len(ious)


@pytest.mark.parametrize("seed", range(3))
def test_figures_equal_those_of_an_independent_program(tmp_path: Path, seed: int) -> None:
    entries = write_sorec(tmp_path, seed, 12)
    dataset = read_sorec(tmp_path / "val.json", tmp_path)
    report = evaluate_sorec(FakeEncoder(), dataset, tmp_path).to_dict()
    ious = [slow_ious(tmp_path, entry) for entry in entries]
    percents = range(5, 100, 5)
    slow = {
        f"top{k}_{percent:02}": slow_accuracy(ious, k, percent)
        for k in (1, 5, 10)
        for percent in percents
    }
    slow["mean_precision"] = sum(slow[f"top{k}_50"] for k in (1, 5, 10)) / 3
    assert report["top_k"] == {name: round(value, 4) for name, value in slow.items()}
    assert len(set(slow.values())) > 5
    assert report["accuracy"] == {
        "macc": round(sum(slow[f"top1_{percent}"] for percent in percents[9:]) / 10, 4),
        "acc50": report["top_k"]["top1_50"],
        "acc75": report["top_k"]["top1_75"],
    }


def test_known_answers(tmp_path: Path) -> None:
    report = evaluate_sorec(FakeEncoder(), three_photos(tmp_path), tmp_path).to_dict()
    # "orange" is answered by the green shape first, and by the yellow one second.
    assert report["accuracy"] == {"macc": 75, "acc50": 75, "acc75": 75}
    assert report["top_k"]["top1_05"] == 75
    assert report["top_k"]["top5_95"] == 100
    assert report["top_k"]["mean_precision"] == pytest.approx((75 + 100 + 100) / 3, abs=1e-4)
    low, high = report["intervals"]["accuracy"]["acc50"]
    assert 0 <= low < 75 < high <= 100
    assert report["published"] is None
    assert "val, testA, testB" in report["left_out"]["published figures"]


def test_small_instances_are_found_in_tiles(tmp_path: Path) -> None:
    data = draw_photo_set(
        tmp_path, [[("red", (70, 50, 80, 60), "red"), ("blue", (10, 10, 50, 90), "")]]
    )
    whole = evaluate_sorec(FarSighted(), data, tmp_path)
    tiled = evaluate_sorec(TiledEncoder(FarSighted(), TILING), data, tmp_path)
    assert whole.accuracy["acc75"].mean == whole.top_k["top10_05"].mean == 0
    assert tiled.accuracy["acc75"].mean == 100
    assert tiled.to_dict()["settings"]["tile_side_px"] == 60


def test_photos_encoded_with_and_without_tiles_are_kept_apart(tmp_path: Path) -> None:
    data = three_photos(tmp_path)
    how = Encoding(work=tmp_path / "work")
    for encoder in (
        FakeEncoder(num_candidates=120),
        TiledEncoder(FakeEncoder(num_candidates=30), TILING),
        TiledEncoder(FakeEncoder(num_candidates=30), Tiling(above_px=100, side_px=61)),
    ):
        assert encoder.num_candidates == 120
        evaluate_sorec(encoder, data, tmp_path, how=how)
    assert len(list((tmp_path / "work").iterdir())) == 3


def test_nothing_to_measure(tmp_path: Path) -> None:
    data = draw_photo_set(tmp_path, [[("red", (10, 10, 50, 90), "")]])
    with pytest.raises(DataError, match="none of 0 expressions describes an instance"):
        evaluate_sorec(FakeEncoder(), data, tmp_path)


def test_tables_fit_a_terminal_and_show_published_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "SOREC_SPLITS", {4: "testA"})
    console = Console(width=100, file=io.StringIO())
    with console.capture() as capture:
        console.print(evaluate_sorec(FakeEncoder(), three_photos(tmp_path), tmp_path).table())
    text = capture.get()
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert "PIZA-Adapter+, Train-L 45.10 66.20 51.70" in rows
    assert "this encoder 75.00 75.00 75.00" in rows
    assert any(row.startswith("IoU 0.05 75.0 [") for row in rows)
    assert "--large-photos zoom also encodes" in text
