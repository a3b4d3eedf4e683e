"""Codes leave out no row that an exact search would find, whatever the vectors."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from reir.records import FloatArray
from reir.store import exact
from reir.store.codes import Codes
from reir.store.exact import Selection
from reir.store.journal import NUM_COLUMNS

NUM = 4_000


def unit(seed: int, num: int, dim: int) -> FloatArray:
    drawn = np.random.default_rng(seed).standard_normal((num, dim))
    return np.asarray(drawn / np.linalg.norm(drawn, axis=1, keepdims=True), dtype=np.float32)


def crowded(dim: int) -> FloatArray:
    """Many vectors close to a few ones."""
    centres, noise = unit(1, 8, dim), unit(2, NUM, dim)
    near = centres[np.arange(NUM) % 8] + 0.05 * noise
    return np.asarray(near / np.linalg.norm(near, axis=1, keepdims=True), dtype=np.float32)


def one_sided(dim: int) -> FloatArray:
    """Nearly all of every vector in one dimension, as some public encoders have it."""
    vectors = unit(3, NUM, dim)
    vectors[:, -1] = 4
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), dtype=np.float32)


def long_and_short(dim: int) -> FloatArray:
    """Of any length, 0 too: too long ones do not fit into their codes."""
    lengths = np.random.default_rng(4).exponential(1, NUM).astype(np.float32)
    lengths[:5] = 0
    return unit(5, NUM, dim) * lengths[:, None]


def equal(dim: int) -> FloatArray:
    """A few vectors, each many times."""
    return unit(6, 40, dim)[np.arange(NUM) % 40]


KINDS = [lambda dim: unit(0, NUM, dim), crowded, one_sided, long_and_short, equal]
NAMES = ["spread", "crowded", "one-sided", "lengths", "equal"]


@pytest.mark.parametrize("make", KINDS, ids=NAMES)
@pytest.mark.parametrize("dim", [1, 8, 256, 300])
def test_no_other_row_exceeds_the_bound(make: Callable[[int], FloatArray], dim: int) -> None:
    vectors, codes = make(dim), Codes(dim)
    for end in range(700, NUM + 700, 700):
        codes.follow(vectors[:end])
    for query in [*unit(7, 10, dim), vectors[11], -3 * vectors[50]]:
        for num in (1, 30, 500):
            rows, bound = codes.now.best(query, num)
            assert len(set(rows.tolist())) == num
            assert (np.diff(rows) > 0).all()
            others = np.setdiff1d(np.arange(NUM), rows)
            scores = vectors.astype(np.float64) @ query.astype(np.float64)
            assert scores[others].max() <= bound


def test_the_bound_is_close_on_unit_vectors() -> None:
    codes, vectors = Codes(256), unit(0, NUM, 256)
    codes.follow(vectors)
    for query in unit(7, 10, 256):
        rows, bound = codes.now.best(query, 200)
        assert bound < np.sort(vectors @ query)[-20], "a search for 20 would look at all rows"
        assert bound - np.delete(vectors @ query, rows).max() < 0.04


def test_what_was_taken_before_stays_as_it_is() -> None:
    codes, vectors = Codes(8), unit(0, 5_500, 8)
    vectors[500:] *= 3
    codes.follow(vectors[:500])
    before, copy = codes.now, codes.now.codes.copy()
    codes.follow(vectors)
    assert np.array_equal(before.codes, copy)
    assert len(codes.now.codes) == 5_500
    assert codes.now.error > before.error


def test_searches_leave_no_memory_behind() -> None:
    codes = Codes(256)
    codes.follow(unit(0, 50, 256))
    now, (query,) = codes.now, unit(1, 1, 256)

    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    sizes = []
    for _ in range(4):
        for _ in range(5_000):
            now.best(query, 5)
        sizes.append(resident_bytes())
    assert sizes[-1] - sizes[0] < 2**20


@pytest.mark.parametrize("make", KINDS, ids=NAMES)
@pytest.mark.parametrize("share", [None, 0.9, 0.4, 0.002])
@pytest.mark.parametrize("num_coded", [NUM, NUM - 100, NUM // 2])
def test_searches_give_the_same_bits_with_and_without_codes(
    make: Callable[[int], FloatArray],
    share: float | None,
    num_coded: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dim = 64
    vectors, codes = make(dim), Codes(dim)
    codes.follow(vectors[:num_coded])
    rows = np.zeros((NUM, NUM_COLUMNS + dim), dtype=np.float32)
    rows[:, NUM_COLUMNS:] = vectors
    kept = None
    if share is not None:
        kept = np.flatnonzero(np.random.default_rng(8).random(NUM) < share)
    selection = Selection(rows, codes.now, kept, [], np.zeros(NUM, dtype=np.int32))
    found: dict[int, list[tuple[FloatArray, npt.NDArray[np.int64]]]] = {}
    queries = np.zeros((7, rows.shape[1]), dtype=np.float32)
    queries[:-1, NUM_COLUMNS:] = unit(9, 6, dim)  # and one of 0
    for coded_from in (1, NUM + 1):
        monkeypatch.setattr(exact, "_CODED_FROM", coded_from)
        found[coded_from] = [selection._nearest(query[None], 5) for query in queries]
    for (scores, numbers), (wanted, of) in zip(found[1], found[NUM + 1], strict=True):
        assert np.array_equal(scores, wanted)
        clear = scores > scores[-1]  # of equal ones any may be last
        assert sorted(numbers[clear]) == sorted(of[clear])
