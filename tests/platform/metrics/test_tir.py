"""`reir.metrics.tir` against a sort of all photos."""

from __future__ import annotations

import numpy as np
import pytest

from reir.metrics import UNRANKED, image_ranks


def slow_rank(text: np.ndarray, own: int, vectors: np.ndarray, images: np.ndarray) -> int:
    """Photos by their best vector; of equal ones the right photo last."""
    best = {image: float((vectors[images == image] @ text).max()) for image in set(images.tolist())}
    if own not in best:
        return UNRANKED
    order = sorted(best, key=lambda image: (-best[image], image == own))
    return order.index(own)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("largest", [1, 100], ids=["ties", "distinct"])
def test_image_ranks_match_reference(seed: int, largest: int) -> None:
    rng = np.random.default_rng(seed)
    texts, vectors = (
        rng.integers(-largest, largest + 1, (n, 3)).astype(np.float32) for n in (9, 25)
    )
    of_text, of_vector = rng.integers(0, 8, 9), rng.integers(0, 7, 25)  # photo 7 has no vector
    got = image_ranks(texts, of_text, vectors, of_vector)
    want = [
        slow_rank(t, int(own), vectors, of_vector) for t, own in zip(texts, of_text, strict=True)
    ]
    assert got.tolist() == want


def test_an_empty_gallery_finds_nothing() -> None:
    texts = np.ones((2, 3), dtype=np.float32)
    ranks = image_ranks(texts, np.zeros(2, int), texts[:0], np.empty(0, int))
    assert ranks.tolist() == [UNRANKED, UNRANKED]
