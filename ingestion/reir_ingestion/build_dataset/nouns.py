"""Plurals of class names, and words for small numbers."""

from __future__ import annotations

COUNTS = ("", "one", "two", "three", "four", "five", "six")
"""Number -> its word."""

_IRREGULAR = {
    "person": "people", "sheep": "sheep", "mouse": "mice", "knife": "knives", "skis": "skis",
    "scissors": "scissors", "broccoli": "broccoli",
}  # fmt: skip


def plural(noun: str) -> str:
    """Return the plural of a class name."""
    *before, last = noun.split(" ")
    if last in _IRREGULAR:
        last = _IRREGULAR[last]
    elif last.endswith(("s", "sh", "ch", "x")):
        last += "es"
    else:
        last += "s"
    return " ".join([*before, last])
