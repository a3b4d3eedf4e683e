"""The cache of the frozen part: it resumes wherever its computation was stopped."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reir_testing.ingestion import random_scene
from reir_testing.tiny import tiny_model
from reir_training.nano import cache
from reir_training.nano.cache import FrozenCache, build_cache


class KilledError(BaseException):
    """Stands for SIGKILL: nothing in the computation may catch it."""


@dataclass(frozen=True)
class Photo:
    path: Path


def test_a_kill_while_the_counter_is_written_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "BATCH", 1)
    photos = []
    for number in range(3):
        path = tmp_path / f"{number}.png"
        Image.fromarray(random_scene(random.Random(number))).save(path)
        photos.append(Photo(path))
    model = tiny_model()
    written: list[str] = []
    write_text = Path.write_text

    def die_at_the_second_write(self: Path, text: str, **_: object) -> int:
        written.append(text)
        write_text(self, text if len(written) == 1 else "")
        if len(written) == 2:
            raise KilledError
        return len(text)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", die_at_the_second_write)
        with pytest.raises(KilledError):
            build_cache(tmp_path / "cache", model, photos)
    done: list[int] = []
    folder = build_cache(tmp_path / "cache", model, photos, lambda count, _: done.append(count))
    assert done == [2, 3]
    whole = build_cache(tmp_path / "whole", model, photos)
    for row in range(3):
        np.testing.assert_array_equal(FrozenCache(folder).boxes(row), FrozenCache(whole).boxes(row))
