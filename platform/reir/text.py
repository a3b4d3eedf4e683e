"""Normalization and validation of expressions, and expressions of mirrored photos."""

from __future__ import annotations

import re
import unicodedata

from reir.errors import QueryError

DEFAULT_MAX_CHARS = 512

# The lookahead lists the endings of compounds such as "leftmost", so that "leftover" and "bright",
# in which no side is meant, stay as they are.
_SIDE = re.compile(r"\b(left|right)(?=(?:most|hand|ward|wards|er|ers|y|side)?\b)", re.IGNORECASE)
_OTHER_SIDE = {"left": "right", "right": "left"}
_ORDINAL = re.compile(
    r"\b(?:first|second|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|last"
    r"|\d+(?:st|nd|rd|th))\b",
    re.IGNORECASE,
)


def normalize_expression(text: str) -> str:
    """Return `text` as encoders get it: in NFKC, case-folded, with single spaces.

    Control characters, line breaks and lone surrogates become spaces; invisible format characters
    (zero-width joiners, direction marks) are removed. The function is idempotent.
    """
    folded = unicodedata.normalize("NFKC", text)
    # Case folding can yield text that NFKC changes again, so both repeat until nothing changes.
    while (again := unicodedata.normalize("NFKC", without_controls(folded).casefold())) != folded:
        folded = again
    return " ".join(folded.split())


def without_controls(text: str) -> str:
    """Return `text` without format characters, and with a space for each control character."""
    if text.isprintable():  # nearly all expressions; the loop below would slow them down
        return text
    kept = []
    for character in text:
        category = unicodedata.category(character)
        if category != "Cf":
            kept.append(" " if category in ("Cc", "Cs") else character)
    return "".join(kept)


def validate_expression(text: object, max_chars: int = DEFAULT_MAX_CHARS) -> str:
    """Return the normalized expression, or raise an error that says why it cannot be used.

    Args:
        text: what the user sent.
        max_chars: maximum number of characters after normalization.

    Raises:
        QueryError: on field "expression": not text, blank, or too long.
    """
    if not isinstance(text, str):
        raise QueryError(
            "expression", f"must be text, got {type(text).__name__}; describe one object in words"
        )
    # Normalization takes time on a huge input, and never makes visible text 8 times shorter.
    too_long = len(text.strip()) > 8 * max_chars
    expression = "" if too_long else normalize_expression(text)
    if too_long or len(expression) > max_chars:
        length = len(text.strip()) if too_long else len(expression)
        raise QueryError(
            "expression", f"has {length} characters, at most {max_chars} are allowed; shorten it"
        )
    if not expression:
        raise QueryError(
            "expression", f"is empty ({text!r}); describe one object, e.g. 'the red mug'"
        )
    return expression


def swap_left_right(text: str) -> str:
    """Return the expression for the mirrored photo: "left" and "right" are exchanged.

    This covers the words and their compounds (leftmost, right-hand), in lower case, UPPER CASE or
    Title case, but not words that merely contain them (bright, leftover). It is its own inverse.
    """
    return _SIDE.sub(_swap_word, text)


def _swap_word(match: re.Match[str]) -> str:
    word = match.group()
    other = _OTHER_SIDE[word.lower()]
    if word.isupper():
        return other.upper()
    return other.capitalize() if word[0].isupper() else other


def has_ordinal(text: str) -> bool:
    """Whether the expression contains an ordinal ("the second cup", "the last one")."""
    return _ORDINAL.search(text) is not None
