"""Expressions as text: what every encoder sees, what is refused, and how a mirrored photo reads.

Pure functions of strings; knows no tokenizer and no model.
"""

from __future__ import annotations

import re
import unicodedata

from reir.errors import QueryError

DEFAULT_MAX_CHARS = 512

_SIDE = re.compile(r"\b(left|right)(?=(?:most|hand|ward|wards|er|ers|y|side)?\b)", re.IGNORECASE)
_OTHER_SIDE = {"left": "right", "right": "left"}
_ORDINAL = re.compile(
    r"\b(?:first|second|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|last"
    r"|\d+(?:st|nd|rd|th))\b",
    re.IGNORECASE,
)


def normalise_expression(text: str) -> str:
    """Return `text` as encoders take it: NFKC, case-folded, one space between words.

    Control characters, line breaks and lone surrogates become spaces; invisible format characters
    (zero-width joiners, direction marks) go. Doing it twice changes nothing.
    """
    folded = unicodedata.normalize("NFKC", text)
    while (again := unicodedata.normalize("NFKC", _printable(folded).casefold())) != folded:
        folded = again
    return " ".join(folded.split())


def _printable(text: str) -> str:
    """Return `text` without format characters, and with a space for each other control."""
    if text.isprintable():
        return text
    kept = []
    for character in text:
        category = unicodedata.category(character)
        if category != "Cf":
            kept.append(" " if category in ("Cc", "Cs") else character)
    return "".join(kept)


def validate_expression(text: object, max_chars: int = DEFAULT_MAX_CHARS) -> str:
    """Return the normalised expression, or say why it cannot be searched for.

    Args:
        text: what the user sent.
        max_chars: most characters, counted after normalisation.

    Raises:
        QueryError: field "expression"; not text, nothing but blanks, or too long.
    """
    if not isinstance(text, str):
        raise QueryError(
            "expression", f"must be text, got {type(text).__name__}; describe one object in words"
        )
    # normalisation never shortens visible text; a huge input is refused before work is spent on it
    too_long = len(text.strip()) > 8 * max_chars
    expression = "" if too_long else normalise_expression(text)
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
    """Return the expression that fits the mirrored photo: left and right change places.

    Whole words and their compounds (leftmost, right-hand), in lower case, UPPER CASE or Title case;
    twice gives the text back. Words that only contain them (bright, leftover) stay.
    """
    return _SIDE.sub(_swapped, text)


def _swapped(found: re.Match[str]) -> str:
    word = found.group()
    other = _OTHER_SIDE[word.lower()]
    if word.isupper():
        return other.upper()
    return other.capitalize() if word[0].isupper() else other


def has_ordinal(text: str) -> bool:
    """Whether the expression counts ("the second cup", "3rd from above", "the last one")."""
    return _ORDINAL.search(text) is not None
