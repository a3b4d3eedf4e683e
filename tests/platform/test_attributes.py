"""Attributes of photos: what can be stored, and what is wrong with the rest."""

from __future__ import annotations

from typing import Any

import pytest

from reir.attributes import BadRow, validate_attributes
from reir.store.filters import MAX_INT


def test_plain_values_are_kept_and_missing_ones_left_out() -> None:
    columns = {"Gr\u00f6\u00dfe": "M", "n": -MAX_INT, "price": 2.5, "sold": True, "none": None}
    assert validate_attributes(columns) == {k: v for k, v in columns.items() if k != "none"}
    assert validate_attributes({"\ud83d": None}) == {}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"Gr\udcf6\udcdfe": 1}, r"column name 'Gr\\udcf6\\udcdfe' is not valid Unicode"),
        ({"\ud83d": True}, r"column name '\\ud83d' is not valid Unicode"),
        ({"n": "\ud83d"}, r"column 'n': '\\ud83d' is not valid Unicode"),
        ({"n": MAX_INT + 1}, rf"column 'n': an integer of 64 bits; .* between -{MAX_INT} and"),
        ({"n": -MAX_INT - 1}, rf"column 'n': an integer of 64 bits; .* between -{MAX_INT} and"),
        ({"n": 10**5000}, "column 'n': an integer of 16610 bits"),
        ({"n": float("inf")}, "column 'n': inf cannot be compared"),
        ({"n": [1]}, "column 'n' contains a list"),
        ({"n": "x" * 20_000}, "more than 16384 bytes"),
    ],
)
def test_what_cannot_be_stored_is_refused(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRow, match=message):
        validate_attributes(columns)
