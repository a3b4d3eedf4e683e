"""Groups of hashes that are near to one another, against comparing each with each."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import numpy.typing as npt
import pytest

from reir.images.near_duplicates import NearDuplicates, near_groups
from reir.records import ImageRecord


def hashes_with_near_ones(seed: int, count: int = 400) -> npt.NDArray[np.uint64]:
    """Random hashes, half of them a few bits away from another one."""
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 2**64, count, dtype=np.uint64)
    for place in range(count // 2, count):
        flips = rng.choice(64, size=rng.integers(0, 8), replace=False)
        mask = sum(1 << int(bit) for bit in flips)
        values[place] = values[rng.integers(0, place)] ^ np.uint64(mask)
    return values


def slow_groups(values: npt.NDArray[np.uint64], max_distance: int) -> list[list[int]]:
    """Each with each, then joined until nothing changes."""
    group = list(range(len(values)))
    for one, other in combinations(range(len(values)), 2):
        if (int(values[one]) ^ int(values[other])).bit_count() <= max_distance:
            old, new = group[other], group[one]
            group = [new if each == old else each for each in group]
    members = [[i for i, each in enumerate(group) if each == name] for name in dict.fromkeys(group)]
    return [each for each in members if len(each) > 1]


@pytest.mark.parametrize("max_distance", [0, 1, 4, 7, 15])
@pytest.mark.parametrize("seed", [0, 1])
def test_groups_match_comparing_each_with_each(seed: int, max_distance: int) -> None:
    values = hashes_with_near_ones(seed)
    found = near_groups(values, max_distance)
    assert found == slow_groups(values, max_distance)
    assert found


@pytest.mark.parametrize("count", [0, 1])
def test_one_photo_is_no_group(count: int) -> None:
    assert near_groups(np.zeros(count, dtype=np.uint64)) == []


def test_many_equal_hashes_are_one_group() -> None:
    assert near_groups(np.zeros(50_000, dtype=np.uint64)) == [list(range(50_000))]


def test_a_distance_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="max_distance must be 0 to 15, got 16"):
        near_groups(np.zeros(2, dtype=np.uint64), 16)


def test_rows_are_numbered_as_they_were_added() -> None:
    def row(perceptual_hash: str, same_as: str = "") -> ImageRecord:
        return ImageRecord(
            image_id="x",
            uri="file:///x",
            status="indexed",
            perceptual_hash=perceptual_hash,
            same_as=same_as,
        )

    alike = NearDuplicates()
    for each in (row(""), row("f" * 16), row("0" * 16), row("f" * 16, "y"), row("e" + "f" * 15)):
        alike.add(each)
    assert alike.groups() == [[1, 4]]
