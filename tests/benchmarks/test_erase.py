"""`benchmarks/erase.py` on a small gallery: no file has anything of the photos that were erased."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reir.records import FloatArray, Instances, RgbImage
from reir_testing import FakeEncoder, draw_scene
from reir_testing.fake_models import COLORS, FAKE_KINDS

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
KINDS = ("id", "content_hash", "name", "text", "bytes", "vector")


class DistinctiveEncoder(FakeEncoder):
    """The fake encoder, with vectors that no two photos share, as those of a real model."""

    def encode_images(self, images: Sequence[RgbImage]) -> list[Instances]:
        found = super().encode_images(images)
        return [
            replace(
                each,
                vectors=_with_noise(each.vectors, image),
                image_vector=_with_noise(each.image_vector, image),
            )
            for each, image in zip(found, images, strict=True)
        ]


def _with_noise(vectors: FloatArray, image: RgbImage) -> FloatArray:
    rng = np.random.default_rng(int(image.astype(np.int64).sum()))
    noisy = vectors + rng.normal(0, 0.01, vectors.shape)
    unit: FloatArray = noisy / np.linalg.norm(noisy, axis=-1, keepdims=True)
    return unit.astype(np.float32)


def draw_photos(folder: Path, count: int) -> list[Path]:
    """Draw photos of which no two have the same shape or the same noise."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    paths = [folder / f"photo-{number:05}.png" for number in range(count)]
    for number, path in enumerate(paths):
        color, left = COLORS[number % len(COLORS)], 5 + 2 * number
        pixels = draw_scene((160, 90), [(color, (left, 10, left + 60, 30 + number))])
        noise = rng.integers(0, 4, pixels.shape, dtype=np.uint8)
        Image.fromarray(pixels // 4 * 4 + noise).save(path)
    return paths


@pytest.mark.slow
def test_no_trace_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REIR_HOME", str(tmp_path / "home"))
    kinds = {**FAKE_KINDS, "clare-nano": lambda _: DistinctiveEncoder()}
    monkeypatch.setattr("reir.encoders.KINDS", kinds)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    benchmark = importlib.import_module("erase")
    photos = draw_photos(tmp_path / "photos", 32)
    # A model that understands nothing, so that the report of the check shows photos.
    installation = benchmark.Installation(tmp_path, reindex=("--encoder", "worse:x"))
    figures = benchmark.measure(installation, photos, 8, ["the red one", "blue on the left"])
    assert figures["erase.erased"] == 12
    assert {kind for kind in KINDS if not figures[f"erase.before_{kind}"]} == set()
    for name in ("traces", "served", "came_back", "kept_lost", "findings"):
        assert figures[f"erase.{name}"] == 0, name
    assert figures["erase.left_out_by_restore"] == 12
    assert figures["erase.backup_traces"] > 0, "a backup keeps what it has"
