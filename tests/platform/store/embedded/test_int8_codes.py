"""Searches with int8 codes find the same rows as a full scan, whatever the vectors."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from reir.records import FloatArray
from reir.store.embedded import exact_index
from reir.store.embedded.exact_index import Selection
from reir.store.embedded.int8_codes import Int8Codes
from reir.store.embedded.journal import NUM_COLUMNS

NUM = 4_000


def unit(seed: int, num: int, dim: int) -> FloatArray:
    drawn = np.random.default_rng(seed).standard_normal((num, dim))
    return np.asarray(drawn / np.linalg.norm(drawn, axis=1, keepdims=True), dtype=np.float32)


def crowded(dim: int) -> FloatArray:
    """Many vectors close to a few centers."""
    centers, noise = unit(1, 8, dim), unit(2, NUM, dim)
    near = centers[np.arange(NUM) % 8] + 0.05 * noise
    return np.asarray(near / np.linalg.norm(near, axis=1, keepdims=True), dtype=np.float32)


def one_sided(dim: int) -> FloatArray:
    """One dimension holds nearly all of every vector, as with some public encoders."""
    vectors = unit(3, NUM, dim)
    vectors[:, -1] = 4
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), dtype=np.float32)


def long_and_short(dim: int) -> FloatArray:
    """Vectors of any norm, including 0; the codes of very long ones are clipped."""
    lengths = np.random.default_rng(4).exponential(1, NUM).astype(np.float32)
    lengths[:5] = 0
    return unit(5, NUM, dim) * lengths[:, None]


def equal(dim: int) -> FloatArray:
    """A few distinct vectors, each repeated many times."""
    return unit(6, 40, dim)[np.arange(NUM) % 40]


KINDS = [lambda dim: unit(0, NUM, dim), crowded, one_sided, long_and_short, equal]
NAMES = ["spread", "crowded", "one-sided", "lengths", "equal"]


@pytest.mark.parametrize("make", KINDS, ids=NAMES)
@pytest.mark.parametrize("dim", [1, 8, 256, 300])
def test_other_rows_score_below_the_bound(make: Callable[[int], FloatArray], dim: int) -> None:
    vectors, codes = make(dim), Int8Codes(dim)
    for end in range(700, NUM + 700, 700):
        codes.extend(vectors[:end])
    for query in [*unit(7, 10, dim), vectors[11], -3 * vectors[50]]:
        for num in (1, 30, 500):
            rows, bound = codes.snapshot.best(query, num)
            assert len(set(rows.tolist())) == num
            assert (np.diff(rows) > 0).all()
            others = np.setdiff1d(np.arange(NUM), rows)
            scores = vectors.astype(np.float64) @ query.astype(np.float64)
            assert scores[others].max() <= bound


@pytest.mark.parametrize("dim", [256, 305])
@pytest.mark.parametrize("longest", [1.0, 2.3])
def test_the_bound_is_tight(dim: int, longest: float) -> None:
    """Vectors of the shipped checkpoint have 305 dimensions and a norm of 1 to 2.3."""
    lengths = np.random.default_rng(1).uniform(1, longest, NUM).astype(np.float32)
    codes, vectors = Int8Codes(dim), unit(0, NUM, dim) * lengths[:, None]
    codes.extend(vectors)
    for query in unit(7, 10, dim):
        rows, bound = codes.snapshot.best(query, 200)
        assert bound < np.sort(vectors @ query)[-20], "a search for 20 would score all rows"
        assert bound - np.delete(vectors @ query, rows).max() < 0.04 * longest


@pytest.mark.parametrize(("dim", "num_codes"), [(1, 16), (16, 16), (305, 320)])
def test_faiss_can_multiply_several_codes_at_once(dim: int, num_codes: int) -> None:
    codes = Int8Codes(dim)
    codes.extend(unit(0, 10, dim))
    assert len(codes) == 10
    assert codes.snapshot.codes.shape == (10, num_codes)


def test_extending_does_not_change_a_snapshot() -> None:
    codes, vectors = Int8Codes(8), unit(0, 5_500, 8)
    vectors[500:] *= 3
    codes.extend(vectors[:500])
    before, copy = codes.snapshot, codes.snapshot.codes.copy()
    codes.extend(vectors)
    assert np.array_equal(before.codes, copy)
    assert len(codes.snapshot.codes) == 5_500
    assert codes.snapshot.max_error > before.max_error


def test_searches_do_not_leak_memory() -> None:
    codes = Int8Codes(256)
    codes.extend(unit(0, 50, 256))
    snapshot, (query,) = codes.snapshot, unit(1, 1, 256)

    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    sizes = []
    for _ in range(4):
        for _ in range(5_000):
            snapshot.best(query, 5)
        sizes.append(resident_bytes())
    assert sizes[-1] - sizes[0] < 2**20


@pytest.mark.parametrize("make", KINDS, ids=NAMES)
@pytest.mark.parametrize("share", [None, 0.9, 0.4, 0.002])
@pytest.mark.parametrize("num_codes", [NUM, NUM - 100, NUM // 2])
def test_searches_with_and_without_codes_return_the_same_bits(
    make: Callable[[int], FloatArray],
    share: float | None,
    num_codes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dim = 64
    vectors, codes = make(dim), Int8Codes(dim)
    codes.extend(vectors[:num_codes])
    rows = np.zeros((NUM, NUM_COLUMNS + dim), dtype=np.float32)
    rows[:, NUM_COLUMNS:] = vectors
    kept = None
    if share is not None:
        kept = np.flatnonzero(np.random.default_rng(8).random(NUM) < share)
    selection = Selection(rows, codes.snapshot, kept, [], np.zeros(NUM, dtype=np.int32))
    found: dict[int, list[tuple[FloatArray, npt.NDArray[np.int64]]]] = {}
    queries = np.zeros((7, rows.shape[1]), dtype=np.float32)
    queries[:-1, NUM_COLUMNS:] = unit(9, 6, dim)  # the last query is the zero vector
    for codes_from in (1, NUM + 1):
        monkeypatch.setattr(exact_index, "_CODES_FROM_ROWS", codes_from)
        found[codes_from] = [selection._nearest(query[None], 5) for query in queries]
    for (scores, numbers), (wanted, of) in zip(found[1], found[NUM + 1], strict=True):
        assert np.array_equal(scores, wanted)
        clear = scores > scores[-1]  # any of several equal scores may be last
        assert sorted(numbers[clear]) == sorted(of[clear])
