"""The annotation tables that the processes of a machine share."""

from __future__ import annotations

import json
import logging
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from reir.config import load_config
from reir.errors import DataError
from reir.records import MaskRle
from reir_testing.tiny_clare import tiny_training
from reir_training.clare.task import ClareTask
from reir_training.config import ClareTrainConfig
from reir_training.data import photo_table
from reir_training.data.examples import TrainPhoto, split_held_out
from reir_training.data.leakage import training_photos
from reir_training.data.photo_table import PhotoTable, shared_photos, write_photos
from reir_training.run.schedule import Epoch


def configured(folder: Path, **changes: Any) -> ClareTrainConfig:
    return load_config(ClareTrainConfig, tiny_training(folder) | changes)


def assert_same(one: TrainPhoto, other: TrainPhoto) -> None:
    np.testing.assert_array_equal(one.boxes, other.boxes)
    np.testing.assert_array_equal(one.categories, other.categories)
    assert (one.boxes.dtype, one.categories.dtype) == (other.boxes.dtype, other.categories.dtype)
    assert replace(one, boxes=other.boxes, categories=other.categories) == other


def test_photos_survive_the_round_trip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photo_table, "ROWS_A_BATCH", 5)
    photos = training_photos(configured(tmp_path))
    masks = [None, MaskRle((4, 6), "0d1"), *[None] * len(photos[1].boxes)][: len(photos[1].boxes)]
    photos[1] = replace(photos[1], masks=tuple(masks), crowded=frozenset({"dog", "cat"}))
    photos[2] = replace(photos[2], captions=("one", "two"), near_misses=("three",))
    photos[2] = replace(photos[2], look_alikes=frozenset({"b.jpg", "a.jpg"}))
    photos[3] = replace(photos[3], expressions=(), boxes=np.zeros((0, 4), np.float32), names=())
    photos[3] = replace(photos[3], categories=np.zeros(0, np.int64))
    write_photos(iter(photos), tmp_path / "some.arrow")
    table = pickle.loads(pickle.dumps(PhotoTable(tmp_path / "some.arrow")))
    assert len(table) == len(photos) == 15
    for read in (list(table), [table[row] for row in range(15)], table[:]):
        for one, other in zip(read, photos, strict=True):
            assert_same(one, other)
    with pytest.raises(IndexError, match="row 15 is out of range: the table has 15 photos"):
        table[15]
    assert [path.name for path in tmp_path.glob("some*")] == ["some.arrow"]


@pytest.mark.slow
def test_the_annotations_are_read_once_until_they_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, folder = configured(tmp_path), tmp_path / "annotations"
    train, held_out = shared_photos(config, folder)
    wanted = split_held_out(training_photos(config))
    assert [p.path for p in train] == [p.path for p in wanted[0]]
    assert [p.path for p in held_out] == [p.path for p in wanted[1]]

    written = {path.name: path.stat().st_ino for path in folder.glob("*.arrow")}
    assert len(written) == 2
    assert len(shared_photos(config, folder)[0]) == len(train)
    assert {path.name: path.stat().st_ino for path in folder.glob("*.arrow")} == written
    file = tmp_path / "scenes" / "instances.json"
    file.write_text(file.read_text() + " ")
    assert len(shared_photos(config, folder)[0]) == len(train)
    assert len(list(folder.glob("*.arrow"))) == 4
    os.utime(file, ns=(0, 0))  # as if rewritten with the same size
    assert len(shared_photos(config, folder)[0]) == len(train)
    assert len(list(folder.glob("*.arrow"))) == 6
    assert len(shared_photos(config, folder, masks=True)[0]) == len(train)
    assert len(list(folder.glob("*.arrow"))) == 8
    # As if another release had written the tables.
    monkeypatch.setattr(photo_table, "_SCHEMA", pa.schema({"path": pa.string()}))
    assert len(shared_photos(config, folder)[0]) == len(train)
    assert len(list(folder.glob("*.arrow"))) == 10


def test_errors_and_warnings_from_the_reading_process_are_passed_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scenes = configured(tmp_path).data[0].model_dump(mode="json")
    changes: dict[str, Any] = {"data": [scenes | {"split": "train"}], "evaluation": [scenes]}
    with pytest.raises(DataError, match="would be trained on"):
        len(shared_photos(configured(tmp_path, **changes), tmp_path / "a")[0])
    part = json.loads((tmp_path / "scenes" / "expressions.json").read_text())["splits"]["train"][:3]
    kept = tmp_path / "three"
    kept.mkdir()
    for name in ("instances", "expressions"):
        document = json.loads((tmp_path / "scenes" / f"{name}.json").read_text())
        for key, field in (
            ("images", "id"),
            ("annotations", "image_id"),
            ("expressions", "image_id"),
        ):
            if key in document:
                document[key] = [entry for entry in document[key] if entry[field] in part]
        if "splits" in document:
            document["splits"] = {"train": part}
        (kept / f"{name}.json").write_text(json.dumps(document))
    (kept / "images").symlink_to(tmp_path / "scenes" / "images")
    changes["evaluation"] = [scenes | {"path": str(kept)}]
    config = configured(tmp_path, **changes, exclude_evaluation=True)
    with caplog.at_level(logging.WARNING):
        assert len(shared_photos(config, tmp_path / "b")[0]) == 12 - 3
    assert "3 photos of the evaluation set" in caplog.text


def test_shared_tables_give_the_same_steps_and_are_not_pickled(tmp_path: Path) -> None:
    config = configured(tmp_path)
    tasks = [
        ClareTask("clare-base", config, init=None, rank=0, world_size=1, cache=cache)
        for cache in (None, tmp_path / "annotations")
    ]
    assert tasks[0].about() == tasks[1].about()
    epoch = Epoch(0, "clia", 0, 1)
    for one, other in zip(*(task.batches(epoch, 0) for task in tasks), strict=True):
        assert one.texts == other.texts
        np.testing.assert_array_equal(one.pixels, other.pixels)
        np.testing.assert_array_equal(one.boxes, other.boxes)
    loaders = [task._loader("clia", 2) for task in tasks]
    texts = [e.text.encode() for p in training_photos(config) for e in p.expressions]
    pickled = [sum(text in pickle.dumps(loader) for text in texts) for loader in loaders]
    assert pickled[0] > 0  # every data-loading process would receive these
    assert pickled[1] == 0
