"""`benchmarks/quality.py`: separate figures for human expressions of unseen photos."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from reir.datasets import ReferringDataset
from reir.datasets.dataset import Expression
from reir.datasets.photos import read_photos
from reir_testing import data_dir

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
DATA = data_dir()


@pytest.mark.data
@pytest.mark.skipif(DATA is None, reason="no REIR_DATA and no ../shared/data")
def test_unseen_photos_and_training_photos_are_separate(monkeypatch: pytest.MonkeyPatch) -> None:
    assert DATA is not None
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    quality = importlib.import_module("quality")
    asked: list[ReferringDataset] = []

    def right_boxes(
        _localizer: Any, photos: ReferringDataset, _folder: Path, expressions: Sequence[Expression]
    ) -> npt.NDArray[np.bool_]:
        asked.append(photos)
        return np.full(len(expressions), len(asked) == 2)

    monkeypatch.setattr(quality, "right_boxes", right_boxes)
    photos = read_photos(DATA / "photos")
    figures = quality.human_rec(None, DATA / "photos", photos.split("val"))
    unseen, trained = (each.images_by_id.keys() for each in asked)
    assert unseen <= photos.splits["val"]
    assert trained <= photos.splits["train"]
    assert (figures["human_unseen"], figures["human_training"]) == (33, 270)
    assert (figures["rec_human_unseen"], figures["rec_human_training"]) == (0, 100)
