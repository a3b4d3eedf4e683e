"""Validation of the attributes of a photo, which come from columns of the user's data."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from reir.records import Attributes, JsonValue
from reir.store.filters import MAX_INT

TENANT = "tenant"
"""Attribute with the tenant of a photo; the server sets it for keys that have a tenant."""

MAX_ATTRIBUTES_BYTES = 16 * 1024
"""Size limit of one photo's attributes as JSON. Every instance stores a copy of them."""


def tenant_of(attributes: Attributes) -> str:
    """Return the tenant of a photo; empty if it has none."""
    return str(attributes.get(TENANT, ""))


class BadRow(ValueError):
    """A row has a name or value that cannot be stored; the message says which and why."""


def validate_attributes(columns: Mapping[str, Any]) -> Attributes:
    """Return the columns of one image as attributes, without those that are None.

    Raises:
        BadRow: a value is not a number, string or boolean, a name is not valid Unicode, or all of
            them take too much space.
    """
    attributes = {
        name: _validate(name, value) for name, value in columns.items() if value is not None
    }
    # The length in characters is that in bytes, since `json.dumps` escapes whatever is not ASCII.
    if len(json.dumps(attributes)) > MAX_ATTRIBUTES_BYTES:
        raise BadRow(f"the columns take more than {MAX_ATTRIBUTES_BYTES} bytes as JSON")
    return attributes


def _validate(name: str, value: Any) -> JsonValue:
    if not _is_unicode(name):
        raise BadRow(f"the column name {name[:40]!a} is not valid Unicode; write it in UTF-8")
    if isinstance(value, bool):  # first, because for Python a boolean is an int as well
        return value
    if isinstance(value, str):
        if not _is_unicode(value):
            raise BadRow(f"column {name!a}: {value[:40]!a} is not valid Unicode")
        return value
    if isinstance(value, int):
        if abs(value) > MAX_INT:
            # Not the number itself: Python refuses to write one of thousands of digits.
            raise BadRow(
                f"column {name!a}: an integer of {value.bit_length()} bits; use numbers between "
                f"-{MAX_INT} and {MAX_INT}"
            )
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise BadRow(f"column {name!a}: {value} cannot be compared; use a finite number")
        return value
    raise BadRow(
        f"column {name!a} contains a {type(value).__name__}; use numbers, strings and booleans"
    )


def _is_unicode(text: str) -> bool:
    try:
        text.encode()  # a lone surrogate, which Python allows, cannot be stored as UTF-8
    except UnicodeEncodeError:
        return False
    return True
