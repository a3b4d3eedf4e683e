"""Normalization and validation of expressions, their first phrase, and those of mirrored photos."""

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
# "building" and "king" end in "ing" but are nouns, unlike "smiling" and "holding".
_PHRASE_END = re.compile(
    r"[,;.:]|\b(?:(?:left|right) of|to the|in|on|at|of|with|without|near|next|by|beside|behind"
    r"|under|below|above|over|between|from|against|that|which|who|whose|and|closest"
    r"|(?!parking meter|dining table|(?:building|ceiling|clothing|king|painting|railing|ring"
    r"|string|wing)\b)\w+ing)\b",
    re.IGNORECASE,
)
_WORD = re.compile(r"\w+")
# Words that describe something, but do not say what it is.
_NAMELESS = re.compile(
    r"(?:a|an|the|this|that|these|those|his|her|their|its|to|one|ones|two"
    r"|three|four|five|six|thing|things|something|object|objects|item|left"
    r"|right|leftmost|rightmost|middle|center|centre|top|bottom|front|back|far"
    r"|furthest|side|corner|background|foreground|black|white|red|blue|green"
    r"|yellow|orange|brown|gray|grey|silver|pink|purple|big|bigger|biggest"
    r"|large|larger|largest|huge|small|smaller|smallest|little|tiny|tall|taller"
    r"|tallest|short|shorter|shortest|long)",
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


def opening_phrase(text: str) -> str:
    """Return what stands before the first preposition, relation, "-ing" word or any of ",;.:".

    A period ends it within a number, too, and of the nouns in "-ing", only a few do not. The
    result is empty if the text starts with such a word ("left of the bus"). Only English words are
    known.
    """
    end = _PHRASE_END.search(text)
    return (text[: end.start()] if end else text).strip()


def first_phrase(text: str) -> str:
    """Return the words of an expression up to the end of its first noun phrase.

    "the red cup on the table" gives "the red cup". A phrase that does not say what the thing is
    ends later: "smiling woman in red" gives "smiling woman", and "second from left" is returned
    whole, as is any expression without a longer phrase. The result is empty only for blank text.
    """
    for end in _PHRASE_END.finditer(text):
        phrase = text[: end.start()].strip()
        if any(map(_is_name, _WORD.findall(phrase))):
            return phrase
    return text.strip()


def _is_name(word: str) -> bool:
    """Whether a word may say what something is, as "cup" does, unlike "red", "on" and "second"."""
    return not any(each.fullmatch(word) for each in (_PHRASE_END, _ORDINAL, _NAMELESS))
