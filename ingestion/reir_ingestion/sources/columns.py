"""Turns the user's columns in lists, archives and tables into attributes for filters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from reir.records import JsonValue
from reir.store.filters import MAX_INT

IMAGE_COLUMNS = ("uri", "url", "path", "file_name", "file", "filename", "image", "image_path")
"""Names of the column with the images, in order of preference and in any case."""


def flat(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns without lists and objects, which filters cannot compare."""
    return {name: value for name, value in columns.items() if not isinstance(value, list | dict)}


def image_column(names: Iterable[str], wanted: str) -> str | None:
    """Return the column of the images: `wanted`, or the first of `IMAGE_COLUMNS`; else None."""
    if wanted:
        return wanted if wanted in names else None
    known = {name.lower(): name for name in names}
    return next((known[name] for name in IMAGE_COLUMNS if name in known), None)


def typed(text: str) -> JsonValue:
    """Return the value of a CSV cell: a boolean, a number or a string; None if it is empty.

    Texts such as "007" and "1_000", which Python accepts as numbers, stay strings.
    """
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            continue
        # `int` and `float` also accept underscores, spaces around a number, and digits of other
        # scripts. A leading zero is part of a code, such as "007", which a number would lose.
        digits = text.lstrip("+-")
        is_plain = digits.isascii() and "_" not in digits and digits == digits.strip()
        leading_zero = len(digits) > 1 and digits[0] == "0" and digits[1].isdigit()
        # The store holds finite numbers of up to 64 bits; a cell with any other stays text.
        if is_plain and not leading_zero and math.isfinite(value) and abs(value) <= MAX_INT:
            return value
    return text or None
