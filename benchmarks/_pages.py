"""Puts figures between two markers of a page."""

from __future__ import annotations


def replace_section(page: str, begin: str, end: str, text: str) -> str:
    """Return a page with other text between two markers, each on a line of its own.

    Raises:
        ValueError: a marker is missing.
    """
    before, found, rest = page.partition(begin)
    _, also_found, after = rest.partition(end)
    if not (found and also_found):
        raise ValueError(f"the page must contain {begin!r}, and {end!r} after it")
    return f"{before}{begin}\n{text.rstrip()}\n{end}{after}"
