"""User columns of lists, archives and tables, on their way to filterable attributes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from reir.records import JsonValue
from reir.store.filters import MAX_INT

IMAGE_COLUMNS = ("uri", "url", "path", "file_name", "file", "filename", "image", "image_path")
"""Names under which the image is looked for, in this order, in any case."""


def flat(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns without lists and objects, which no filter can compare."""
    return {name: value for name, value in columns.items() if not isinstance(value, list | dict)}


def image_column(names: Iterable[str], wanted: str) -> str | None:
    """Return the column that holds images: `wanted`, or the first of `IMAGE_COLUMNS`."""
    if wanted:
        return wanted if wanted in names else None
    known = {name.lower(): name for name in names}
    return next((known[name] for name in IMAGE_COLUMNS if name in known), None)


def typed(text: str) -> JsonValue:
    """Return what a cell of a CSV file says: a boolean, a number, a string; None when empty.

    A number is what is written as one: "007" and "1_000" stay strings.
    """
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            continue
        digits = text.lstrip("+-")
        written_so = digits.isascii() and "_" not in digits and digits == digits.strip()
        leading = len(digits) > 1 and digits[0] == "0" and digits[1].isdigit()
        if written_so and not leading and math.isfinite(value) and abs(value) <= MAX_INT:
            return value
    return text or None
