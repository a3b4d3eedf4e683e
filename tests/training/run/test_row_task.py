"""`RowTask`: which data it refuses, and how the checkpoint that it adds a part to is copied."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from reir.errors import ConfigError
from reir_training.config import NanoTrainConfig
from reir_training.run.row_task import RowTask, copy_checkpoint
from reir_training.run.schedule import Epoch

EPOCH = Epoch(0, "colors", 0, 1)


class Rows:
    """Its batches are their rows."""

    def batch(self, rows: Sequence[int], rng: np.random.Generator) -> list[int]:  # noqa: ARG002
        return list(rows)


class Words(RowTask[list[int]]):
    rows_are = "words"


def task(num_rows: int) -> Words:
    config = NanoTrainConfig.model_validate(
        {
            "data": [{"format": "photos", "path": "photos"}],
            "weights": "weights",
            "optimization": {"photos_per_batch": 4},
        }
    )
    arguments: dict[str, Any] = {"maker": Rows(), "rank": 0, "world_size": 1}
    return Words(config, nn.Linear(1, 1), rows=np.arange(num_rows), **arguments)


@pytest.mark.parametrize(
    ("num_rows", "remedy"), [(0, "add photos"), (3, "lower it, or add photos")]
)
def test_fewer_rows_than_a_batch_are_refused(num_rows: int, remedy: str) -> None:
    wanted = f"^photos_per_batch=4 is more than the {num_rows} words: {remedy}$"
    with pytest.raises(ConfigError, match=wanted):
        task(num_rows)


def test_a_single_batch_is_enough() -> None:
    (batch,) = task(4).batches(EPOCH, 0)
    assert sorted(batch) == [0, 1, 2, 3]


def test_the_copy_of_a_read_only_checkpoint_can_be_written(tmp_path: Path) -> None:
    source, copy = tmp_path / "source", tmp_path / "run" / "checkpoint"
    (source / "more").mkdir(parents=True)
    for name in ("model.safetensors", "more/notes.txt"):
        (source / name).write_text(name)
        (source / name).chmod(0o444)
    for folder in (source / "more", source):
        folder.chmod(0o555)
    try:
        for _ in range(2):  # after every epoch
            copy_checkpoint(source, copy)
    finally:
        for folder in (source, source / "more"):
            folder.chmod(0o755)
    for name in ("model.safetensors", "more/notes.txt"):
        assert (copy / name).read_text() == name
    # By the permission bits, since root may write anywhere.
    assert all(path.stat().st_mode & 0o200 for path in (copy, *copy.rglob("*")))
