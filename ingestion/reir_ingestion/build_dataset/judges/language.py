"""Checks the language of expressions: length, characters, repetition, beginning and end."""

from __future__ import annotations

import re
import unicodedata
from itertools import pairwise

from reir.text import normalize_expression

MIN_WORDS, MAX_WORDS, MAX_CHARS = 2, 40, 240
_WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*")
# Words after which something must follow.
_OPEN_END = frozenset(
    (
        "a", "above", "and", "are", "at", "behind", "below", "beside", "by", "for", "from", "in",
        "is", "near", "next", "of", "on", "or", "the", "to", "under", "with",
    )
)  # fmt: skip
_TALK = re.compile(
    r"\b(?:as an ai|i cannot|i can't|i'm sorry|sorry,|bounding box|instance \d|number \d|box \d"
    r"|https?:|www\.|ignore (?:all|the|previous)|json)\b|[{}<>\[\]`|\\]",
    re.IGNORECASE,
)


def language_problem(text: str) -> str:
    """Return what is wrong with the language of an expression; empty if nothing is.

    Letters of any script are accepted.
    """
    words = _WORD.findall(normalize_expression(text))
    if not MIN_WORDS <= len(words) <= MAX_WORDS:
        return f"has {len(words)} words; {MIN_WORDS} to {MAX_WORDS} are allowed"
    if len(text) > MAX_CHARS:
        return f"has {len(text)} characters; at most {MAX_CHARS} are allowed"
    # Unicode's control, format, private, unassigned and surrogate characters.
    odd = next((c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Co", "Cn", "Cs")), "")
    if odd:
        return f"has the character U+{ord(odd):04X}, which is not visible text"
    if found := _TALK.search(text):
        return f"has {found.group()!r}, which does not describe an object"
    repeated = next((a for a, b in pairwise(words) if a == b), "")
    if repeated:
        return f"repeats {repeated!r}"
    if max(map(words.count, words)) > max(4, len(words) // 3):
        return "uses one word too often"
    return f"ends with {words[-1]!r}" if words[-1] in _OPEN_END else ""
