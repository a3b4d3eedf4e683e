"""SOREC's accuracy on held-out photos, of any localizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from reir.models.interfaces import FoundBoxes
from reir.records import RgbImage
from reir_training.data.examples import TrainExpression, TrainPhoto
from reir_training.piza.validate import validate_localizer

TARGET = (0.25, 0.5, 0.5, 0.75)


@dataclass(frozen=True)
class Fixed:
    """Finds the same boxes for an expression, whatever the photo shows."""

    boxes: dict[str, list[tuple[float, float, float, float]]]
    digest: str = "fixed"

    def localize(self, images: Sequence[RgbImage], expressions: Sequence[str]) -> list[FoundBoxes]:
        assert len(images) == len(expressions)
        found = [np.array(self.boxes[text], np.float32).reshape(-1, 4) for text in expressions]
        return [
            FoundBoxes(boxes, np.linspace(1, 0, len(boxes), dtype=np.float32)) for boxes in found
        ]


def photo(path: Path, texts: Sequence[str]) -> TrainPhoto:
    Image.new("RGB", (80, 40)).save(path)
    return TrainPhoto(
        path=path,
        split="val",
        boxes=np.array([TARGET], np.float32),
        categories=np.array([-1]),
        names=("",),
        expressions=tuple(TrainExpression(text, 0, "long") for text in texts),
        size_px=(80, 40),
    )


def test_only_the_first_box_counts(tmp_path: Path) -> None:
    near = (0.25, 0.5, 0.445, 0.75)  # IoU .78
    localizer = Fixed({"exact": [TARGET], "near": [near, TARGET], "none": [], "second": []})
    localizer.boxes["second"] = [(0, 0, 0.1, 0.1), TARGET]
    photos = [
        photo(tmp_path / "a.png", ["exact", "near"]),
        photo(tmp_path / "b.png", ["none", "second"]),
    ]
    # Of the ten thresholds, the exact box reaches all, and the near one six: .5 to .75.
    assert validate_localizer(localizer, photos) == {
        "macc": 100 * (10 + 6) / 40,
        "acc50": 50.0,
        "acc75": 50.0,
    }


def test_without_expressions_there_are_no_figures(tmp_path: Path) -> None:
    assert validate_localizer(Fixed({}), [photo(tmp_path / "a.png", [])]) == {}
