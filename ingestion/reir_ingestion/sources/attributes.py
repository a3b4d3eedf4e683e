"""User columns of lists, archives and tables, on their way to filterable attributes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from reir.records import Attributes, JsonValue
from reir.store.filters import MAX_INT

MAX_ATTRIBUTES_BYTES = 16 * 1024
"""Of one image, as JSON; every instance carries a copy."""

IMAGE_COLUMNS = ("uri", "url", "path", "file_name", "file", "filename", "image", "image_path")
"""Names under which the image is looked for, in this order, in any case."""


class BadRow(ValueError):
    """A row that cannot be used; the message says why."""


def checked(columns: Mapping[str, Any]) -> Attributes:
    """Return the columns of one image as attributes; empty ones are left out.

    Raises:
        BadRow: a value is no number, string or boolean, or there is too much of it.
    """
    found = {name: _checked(name, value) for name, value in columns.items() if value is not None}
    if len(json.dumps(found)) > MAX_ATTRIBUTES_BYTES:
        raise BadRow(f"the columns take more than {MAX_ATTRIBUTES_BYTES} bytes")
    return found


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


def _checked(name: str, value: Any) -> JsonValue:
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _text(name, value)
    if isinstance(value, int):
        if abs(value) > MAX_INT:
            raise BadRow(f"column {name!a}: {value} has more than 64 bits")
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise BadRow(f"column {name!a}: {value} is no number that can be compared")
        return value
    raise BadRow(
        f"column {name!a} holds {type(value).__name__}; numbers, strings and booleans can be kept"
    )


def _text(name: str, value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRow(f"column {name!a}: {value[:40]!a} is no valid Unicode") from None
    return value
