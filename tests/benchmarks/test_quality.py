"""`benchmarks/quality.py`: separate figures for human expressions of unseen photos."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reir.datasets import ReferringDataset
from reir.datasets.photos import read_photos
from reir_testing import data_dir

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
DATA = data_dir()


class FakeGallery:
    """Stands in for an encoded gallery; its instances are never used."""

    vectors = np.zeros((1, 2))


@pytest.mark.data
@pytest.mark.skipif(DATA is None, reason="no REIR_DATA and no ../shared/data")
def test_unseen_photos_and_training_photos_are_separate(monkeypatch: pytest.MonkeyPatch) -> None:
    assert DATA is not None
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    quality = importlib.import_module("quality")
    asked: list[ReferringDataset] = []

    def ask(
        _model: Any, _tokenizer: Any, photos: ReferringDataset, _gallery: Any
    ) -> tuple[Any, ...]:
        asked.append(photos)
        num = len(photos.expressions)
        return [], np.zeros((num, 2)), np.arange(num), np.zeros((num, 1))

    monkeypatch.setattr(quality, "encode_gallery", lambda *_: FakeGallery)
    monkeypatch.setattr(quality, "ask", ask)
    monkeypatch.setattr(
        quality, "in_photo", lambda *_: np.full(len(asked[-1].expressions), len(asked) - 1)
    )
    photos = read_photos(DATA / "photos")
    figures = quality.human_rec(None, None, DATA / "photos", photos.split("val"), 30)
    unseen, trained = (each.images_by_id.keys() for each in asked)
    assert unseen <= photos.splits["val"]
    assert trained <= photos.splits["train"]
    assert (figures["human_unseen"], figures["human_training"]) == (33, 270)
    assert (figures["rec_human_unseen"], figures["rec_human_training"]) == (0, 100)
