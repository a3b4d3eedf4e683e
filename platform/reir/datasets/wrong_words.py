"""Sentences with one wrong word: hard negatives in training, and probes in evaluation.

"the *red* bus" becomes "the *blue* bus". The idea is that of SugarCrepe (Hsieh et al. 2023),
applied to referring expressions.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from zlib import crc32

from reir.text import swap_left_right

SIDE, ABSENT = "side", "absent"
# A word, or several, and what makes the sentence wrong in their place.
SWAPS: Mapping[str, Mapping[str, str]] = {
    "color": {
        "black": "white",
        "white": "black",
        "red": "blue",
        "blue": "red",
        "green": "orange",
        "yellow": "purple",
        "orange": "green",
        "brown": "green",
        "gray": "red",
        "grey": "red",
        "silver": "red",
        "pink": "green",
        "purple": "yellow",
    },
    "size": {
        "big": "small",
        "large": "small",
        "huge": "tiny",
        "small": "large",
        "little": "big",
        "tiny": "huge",
        "tall": "short",
        "short": "tall",
        "long": "short",
    },
    "number": {"two": "five", "three": "seven", "four": "two", "five": "two", "six": "two"},
    "relation": {
        "in front of": "behind",
        "behind": "in front of",
        "on top of": "under",
        "above": "below",
        "below": "above",
        "under": "on top of",
        "inside": "outside",
        "outside": "inside",
    },
    "action": {
        "sitting": "standing",
        "standing": "sitting",
        "walking": "sitting",
        "running": "sitting",
        "lying": "standing",
        "jumping": "sitting",
        "riding": "pushing",
        "holding": "throwing",
        "eating": "reading",
        "swinging": "dropping",
        "looking": "sleeping",
        "wearing": "carrying",
    },
}
KINDS = ("color", SIDE, "size", "number", "relation", "action", ABSENT)
"""What can be wrong. For `ABSENT`, the named class becomes one that the photo lacks."""

PERSON = "person"
PERSONS = ("person", "man", "woman", "boy", "girl", "child", "player", "lady", "guy", "kid")
"""Words for the class `PERSON`, which expressions hardly ever call by its name."""


def wrong_sentences(
    text: str, category: str, shown: Collection[str], classes: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """Yield (kind, sentence with one wrong word); at most one of each kind.

    Args:
        text: expression.
        category: class of what it describes; empty if unknown.
        shown: classes of all instances of the photo.
        classes: classes to choose an absent one from.
    """
    for kind, words in SWAPS.items():
        sentence = _replaced_once(text, words)
        if sentence is not None:
            yield kind, sentence
    if swap_left_right(text) != text:
        yield SIDE, swap_left_right(text)
    absent = [each for each in classes if each not in shown]
    if category and absent:
        # Chosen by the text, so that every run asks the same and all classes are used.
        other = absent[crc32(text.encode()) % len(absent)]
        words_of = PERSONS if category == PERSON else (category,)
        sentence = _replaced_once(text, dict.fromkeys(words_of, other))
        if sentence is not None:
            yield ABSENT, sentence


def _replaced_once(text: str, words: Mapping[str, str]) -> str | None:
    """Return the text with its first word of `words` replaced; None if it has none of them."""
    longest_first = sorted(words, key=len, reverse=True)
    # In groups, which tell the word that was found: in the text it may have other capitals.
    pattern = "|".join(f"({re.escape(word)})" for word in longest_first)
    found = re.search(rf"\b(?:{pattern})\b", text, re.IGNORECASE)
    if found is None or found.lastindex is None:
        return None
    other = words[longest_first[found.lastindex - 1]]
    return text[: found.start()] + other + text[found.end() :]
