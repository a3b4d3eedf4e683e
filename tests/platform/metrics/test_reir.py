"""`reir.metrics.reir` against loops over a fully sorted gallery."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reir.images.boxes import elementwise_iou
from reir.metrics.reir import (
    UNRANKED,
    Gallery,
    Queries,
    ReirRanks,
    reir_ranks,
    top_instances,
)

THRESHOLDS = (0.5, 0.7, 0.9)
KS = (1, 5, 10)


def random_case(
    seed: int, num_queries: int, num_instances: int, num_images: int, *, ties: bool
) -> tuple[Queries, Gallery]:
    """Boxes on a coarse grid, so that many fit; whole-number vectors, so that scores are exact."""
    rng = np.random.default_rng(seed)
    largest, dim = (1, 2) if ties else (100, 8)

    def vectors(num: int) -> np.ndarray:
        return rng.integers(-largest, largest + 1, size=(num, dim)).astype(np.float32)

    def boxes(num: int) -> np.ndarray:
        corner = rng.integers(0, 3, size=(num, 2)).astype(float)
        return np.concatenate([corner, corner + rng.integers(8, 11, size=(num, 2))], axis=1)

    queries = Queries(
        vectors(num_queries), rng.integers(0, num_images, num_queries), boxes(num_queries)
    )
    gallery = Gallery(
        vectors(num_instances), rng.integers(0, num_images, num_instances), boxes(num_instances)
    )
    return queries, gallery


def worst_order(scores: np.ndarray, good: list[bool]) -> list[int]:
    """All instances, best score first; of equal scores the good ones last."""
    return sorted(range(len(scores)), key=lambda j: (-scores[j], good[j]))


def slow_hits_b(queries: Queries, gallery: Gallery, m: int, k: int, threshold: float) -> bool:
    good = [
        bool(
            gallery.images[j] == queries.images[m]
            and elementwise_iou(gallery.boxes_px[j], queries.boxes_px[m]) >= threshold
        )
        for j in range(len(gallery))
    ]
    order = worst_order(gallery.vectors @ queries.vectors[m], good)
    return any(good[j] for j in order[:k])


def slow_hits_a(queries: Queries, gallery: Gallery, m: int, k: int, threshold: float) -> bool:
    scores = gallery.vectors @ queries.vectors[m]
    own = [bool(image == queries.images[m]) for image in gallery.images]
    iou = [float(elementwise_iou(box, queries.boxes_px[m])) for box in gallery.boxes_px]
    # Equal scores: other photos first, then own instances from the worst fit to the best.
    order = sorted(range(len(gallery)), key=lambda j: (-scores[j], own[j], iou[j]))
    for rank, j in enumerate(order):
        if own[j]:
            return rank < k and iou[j] >= threshold
    return False


def slow_hits_image(queries: Queries, gallery: Gallery, m: int, k: int) -> bool:
    own = [bool(image == queries.images[m]) for image in gallery.images]
    seen: list[int] = []
    for j in worst_order(gallery.vectors @ queries.vectors[m], own):
        if own[j]:
            return len(seen) < k
        if gallery.images[j] not in seen:
            seen.append(int(gallery.images[j]))
    return False


def assert_matches_reference(ranks: ReirRanks, queries: Queries, gallery: Gallery) -> None:
    every = range(len(queries))
    for k in KS:
        assert ranks.hits_image(k).tolist() == [
            slow_hits_image(queries, gallery, m, k) for m in every
        ]
        for threshold in THRESHOLDS:
            assert ranks.hits_a(k, threshold).tolist() == [
                slow_hits_a(queries, gallery, m, k, threshold) for m in every
            ]
            assert ranks.hits_b(k, threshold).tolist() == [
                slow_hits_b(queries, gallery, m, k, threshold) for m in every
            ]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_queries=st.integers(0, 6),
    num_instances=st.integers(0, 40),
    num_images=st.integers(1, 8),
    chunk=st.sampled_from([1, 2, 100]),
    block=st.sampled_from([1, 3, 7, 1000]),
    ties=st.booleans(),
)
def test_reir_ranks_matches_reference(
    seed: int,
    num_queries: int,
    num_instances: int,
    num_images: int,
    chunk: int,
    block: int,
    ties: bool,
) -> None:
    queries, gallery = random_case(seed, num_queries, num_instances, num_images, ties=ties)
    ranks = reir_ranks(queries, gallery, query_chunk=chunk, instance_block=block)
    assert len(ranks) == num_queries
    assert_matches_reference(ranks, queries, gallery)


def test_definitions_agree_at_one_and_differ_beyond() -> None:
    queries, gallery = random_case(3, 200, 60, 6, ties=False)
    ranks = reir_ranks(queries, gallery)
    for threshold in THRESHOLDS:
        a1, b1 = ranks.hits_a(1, threshold), ranks.hits_b(1, threshold)
        np.testing.assert_array_equal(a1, b1)
        assert (ranks.hits_a(10, threshold) <= ranks.hits_b(10, threshold)).all()
    assert ranks.hits_a(10, 0.7).sum() < ranks.hits_b(10, 0.7).sum()


def test_order_of_the_gallery_changes_nothing() -> None:
    queries, gallery = random_case(5, 30, 80, 9, ties=True)
    order = np.random.default_rng(0).permutation(len(gallery))
    shuffled = Gallery(gallery.vectors[order], gallery.images[order], gallery.boxes_px[order])
    one, other = reir_ranks(queries, gallery), reir_ranks(queries, shuffled)
    for field in ("top_iou", "top_rank", "image_rank", "fitting_rank"):
        np.testing.assert_array_equal(getattr(one, field), getattr(other, field))


def test_top_instance_points_into_the_gallery_as_given() -> None:
    queries, gallery = random_case(7, 20, 50, 6, ties=False)
    ranks = reir_ranks(queries, gallery)
    for m, top in enumerate(ranks.top_instance):
        own = np.flatnonzero(gallery.images == queries.images[m])
        assert top == own[np.argmax(gallery.vectors[own] @ queries.vectors[m])]
        assert ranks.top_iou[m] == elementwise_iou(gallery.boxes_px[top], queries.boxes_px[m])


@pytest.mark.parametrize("query_chunk", [1, 3, 100])
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_top_instances_are_those_of_the_full_ranking(query_chunk: int, ties: bool) -> None:
    queries, gallery = random_case(4, 12, 30, 5, ties=ties)
    want = reir_ranks(queries, gallery).top_instance
    np.testing.assert_array_equal(top_instances(queries, gallery, query_chunk=query_chunk), want)
    nothing = Gallery(gallery.vectors[:0], np.empty(0, int), np.empty((0, 4)))
    assert top_instances(queries, nothing).tolist() == [-1] * 12


def test_vectors_that_are_all_alike_score_nothing() -> None:
    queries, gallery = random_case(1, 8, 60, 4, ties=False)
    direction = np.random.default_rng(0).normal(size=8).astype(np.float32)
    alike = np.tile(direction, (len(gallery), 1))
    same = Gallery(alike, gallery.images, gallery.boxes_px)
    ranks = reir_ranks(queries, same, query_chunk=3, instance_block=17)
    assert not ranks.hits_b(10, 0.5).any()
    assert not ranks.hits_image(3).any()
    assert ranks.hits_image(4).all()


def test_true_photo_without_instances_is_unranked() -> None:
    vectors = np.ones((2, 3), dtype=np.float32)
    boxes_px = np.array([[0.0, 0, 1, 1]] * 2)
    gallery = Gallery(vectors, np.array([0, 2]), boxes_px)
    queries = Queries(vectors, np.array([1, 9]), boxes_px)
    ranks = reir_ranks(queries, gallery)
    assert ranks.top_rank.tolist() == [UNRANKED] * 2
    assert ranks.image_rank.tolist() == [UNRANKED] * 2
    assert (ranks.fitting_rank == UNRANKED).all()
    assert ranks.top_instance.tolist() == [-1, -1]
    assert not ranks.hits_image(10**9).any()


def test_threshold_that_was_not_computed_is_refused() -> None:
    ranks = reir_ranks(*random_case(0, 2, 5, 2, ties=False), iou_thresholds=(0.5,))
    assert ranks.hits_b(1, 0.5).shape == (2,)
    with pytest.raises(ValueError, match=r"\(0\.5,\), not for 0\.9"):
        ranks.hits_b(1, 0.9)


def test_wrong_input_is_named() -> None:
    queries, gallery = random_case(0, 3, 5, 2, ties=False)
    halves: Any = queries.images + 0.5
    with pytest.raises(ValueError, match="query_chunk=0"):
        reir_ranks(queries, gallery, query_chunk=0)
    with pytest.raises(ValueError, match="dimension 4, instance vectors 8"):
        reir_ranks(replace(queries, vectors=queries.vectors[:, :4]), gallery)
    with pytest.raises(ValueError, match=r"Gallery\.images must be \(5,\) integers"):
        replace(gallery, images=gallery.images[:4])
    with pytest.raises(ValueError, match=r"Queries\.images must be .*, got \(3,\) float64"):
        replace(queries, images=halves)
    with pytest.raises(ValueError, match=r"Gallery\.boxes_px must have shape \(5, 4\)"):
        replace(gallery, boxes_px=gallery.boxes_px[:, :3])
    with pytest.raises(ValueError, match=r"Queries\.vectors must have shape \(\*, D\)"):
        replace(queries, vectors=queries.vectors[0])
    with pytest.raises(ValueError, match=r"Queries\.vectors must be finite"):
        replace(queries, vectors=queries.vectors * np.nan)
