"""Rows -> the best of each photo."""

from __future__ import annotations

from collections.abc import Iterator

from reir.query.ranking import best_of_each_photo
from reir.store.contract import InstanceRow


def row(name: str, score: float) -> InstanceRow:
    image_id = name.partition("#")[0]
    return InstanceRow(name, image_id, f"file:///{image_id}", (0, 0, 1, 1), 1.0, 1.0, {}, score)


def test_rows_of_equal_score_are_ordered_by_image_and_number() -> None:
    names = ["b#1", "a#10", "a#9", "c#0", "b#0"]
    rows = [row("z#0", 2.0), *(row(name, 1.0) for name in names), row("a#0", 0.5)]
    order = [each.instance_id for each in best_of_each_photo(rows, 99, 99)]
    assert order == ["z#0", "a#9", "a#10", "b#0", "b#1", "c#0", "a#0"]
    alone = [each.instance_id for each in best_of_each_photo(rows, 3, 1)]
    assert alone == ["z#0", "a#9", "b#0"]


def test_rows_beyond_the_last_that_may_count_are_not_looked_at() -> None:
    def rows() -> Iterator[InstanceRow]:
        yield from [row("a#0", 3.0), row("a#1", 2.0), row("c#0", 1.0), row("b#0", 1.0)]
        yield row("d#0", 0.5)
        raise AssertionError("a row more than needed")

    assert [each.instance_id for each in best_of_each_photo(rows(), 2, 1)] == ["a#0", "b#0"]
