"""The fake encoder keeps the encoder contract and finds what a sentence says."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reir.models.interfaces import InstanceEncoder
from reir.records import RgbImage
from reir_testing import PALETTE, FakeEncoder, data_dir, draw_scene

SHAPES = [
    ("red", (10, 10, 40, 40)),
    ("red", (120, 50, 190, 95)),
    ("blue", (60, 5, 80, 20)),
    ("yellow", (82, 50, 100, 80)),
]


def as_jpeg(image: RgbImage) -> RgbImage:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=85)
    return np.array(Image.open(buffer))


def best_box(encoder: InstanceEncoder, image: RgbImage, expression: str) -> list[int]:
    """The box in pixels that ranks first."""
    instances = encoder.encode_images([image])[0]
    scores = instances.vectors @ encoder.encode_expressions([expression])[0]
    height, width = image.shape[:2]
    box = instances.boxes[int(np.argmax(scores))] * [width, height, width, height]
    return [round(float(side)) for side in box]


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("the small red one on the left", SHAPES[0]),
        ("big red thing, lower right", SHAPES[1]),
        ("Blue", SHAPES[2]),
        ("something yellow", SHAPES[3]),
    ],
    ids=["left", "right", "blue", "yellow"],
)
def test_finds_what_the_expression_says(
    expression: str, expected: tuple[str, tuple[int, ...]]
) -> None:
    image = draw_scene((200, 100), SHAPES)
    assert best_box(FakeEncoder(), image, expression) == list(expected[1])


def test_jpeg_noise_moves_no_instance() -> None:
    image = draw_scene((200, 100), SHAPES)
    encoder = FakeEncoder()
    clean, noisy = encoder.encode_images([image, as_jpeg(image)])
    assert len(noisy) == len(clean) == 4
    np.testing.assert_allclose(noisy.boxes, clean.boxes, atol=0.02)


def test_vectors_are_unit_and_repeatable() -> None:
    image = draw_scene((200, 100), SHAPES)
    texts = ["red", "a zebra", "a giraffe", ""]
    first, second = FakeEncoder(), FakeEncoder()
    vectors = first.encode_expressions(texts)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(vectors, second.encode_expressions(texts))
    instances = first.encode_images([image])[0]
    np.testing.assert_allclose(np.linalg.norm(instances.vectors, axis=1), 1, rtol=1e-6)
    assert instances.dim == first.dim == vectors.shape[1] == 16
    assert not np.allclose(vectors[1], vectors[2])
    assert first.digest == second.digest


def test_keeps_the_largest_candidates() -> None:
    instances = FakeEncoder(num_candidates=2).encode_images([draw_scene((200, 100), SHAPES)])[0]
    assert len(instances) == 2
    np.testing.assert_allclose(instances.boxes[0] * [200, 100, 200, 100], SHAPES[1][1], atol=1e-4)


def test_nothing_to_encode() -> None:
    grey = draw_scene((20, 10), [])
    assert len(FakeEncoder().encode_images([grey])[0]) == 0
    assert FakeEncoder().encode_images([]) == []
    assert FakeEncoder().encode_expressions([]).shape == (0, 16)


def test_colors_of_the_palette_are_told_apart() -> None:
    for word in PALETTE:
        image = as_jpeg(draw_scene((64, 64), [(word, (16, 16, 48, 48))]))
        vector = FakeEncoder().encode_images([image])[0].vectors[0]
        scores = {other: FakeEncoder().encode_expressions([other])[0] @ vector for other in PALETTE}
        assert max(scores, key=lambda other: scores[other]) == word


def test_data_dir_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REIR_DATA", str(tmp_path))
    assert data_dir() == tmp_path
    monkeypatch.setenv("REIR_DATA", str(tmp_path / "absent"))
    with pytest.raises(FileNotFoundError, match=r"REIR_DATA=.*absent"):
        data_dir()
