"""Attributes of a photo: what a user's columns may hold, wherever they come from."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from reir.records import Attributes, JsonValue
from reir.store.filters import MAX_INT

MAX_ATTRIBUTES_BYTES = 16 * 1024
"""Of one image, as JSON; every instance carries a copy."""


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
