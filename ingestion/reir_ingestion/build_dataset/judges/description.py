"""Parses an expression into the class, colors, place, order, size and relations that it states.

Only simple English is understood. Words that are not are kept, so that a judge knows whether the
parsed parts are everything that the expression says.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from reir.datasets.coco_classes import COCO_CLASSES
from reir.datasets.generated_expressions import COLOR_WORDS, COLORS, ORDINALS
from reir.text import normalize_expression, opening_phrase
from reir_ingestion.build_dataset.nouns import CLASSES_OF, COUNTS, plural

_CORNER = r"(?:top |bottom |upper |lower )?(?:left|right|middle|center|top|bottom)"
_PLACE = re.compile(
    rf"\b(?:on|at|in|to) the (?:far |very )?(?P<where>{_CORNER})(?: side| half| corner| end)?"
    # In "the left hand" and "to the left of the bus", the side belongs to something else.
    r"(?: of the (?:photo|image|picture))?(?= (?:and|at|behind|by|in|near|next|on|with)\b|[,;.]|$)"
    r"|\b(?P<most>left|right|top|bottom)most\b(?! of)"
)
_ADJECTIVE = re.compile(r"\b(left|right|top|bottom)\b")
_ORDINAL = re.compile(rf"\b({'|'.join(ORDINALS)})\b(?=.*\bfrom (?:the )?(left|right)\b)")
_FROM = re.compile(r"\bfrom (?:the )?(?:left|right)\b")
# "Closest to" something is a relation and not a size.
_SIZE = re.compile(r"\b(largest|biggest|closest|smallest)\b(?! to)")
_COLOR = re.compile(rf"\b({'|'.join(COLORS)})\b")
_COLOR_AND = re.compile(rf"\b(?:{'|'.join(COLOR_WORDS)}) and (?=\w)")
# Only if no other word follows: in "in red boots", the color is that of the boots.
_CLOTHES = re.compile(rf"\bin ({'|'.join(COLOR_WORDS)})\b(?! \w)")
_CLAUSE = re.compile(
    r"\b(?:where|which|that|while|as|inside|outside|toward|towards|beyond|among)\b"
)
"""Words after which something else is described; `opening_phrase` does not end at them."""
_PARTICIPLE = re.compile(
    # Neither "red" nor "bed" is a participle, although both end like one.
    r"\b(?:(?!red\b|bed\b)\w+ed|held|worn|seen|swung|hung|made|built|cut|lit|set)\b"
)
_ARTICLE = re.compile(r"^(?:a|an|the) ")
_WORD = re.compile(r"\w+")
_EMPTY = frozenset(
    ("a", "an", "and", "at", "image", "in", "is", "of", "on", "photo", "picture", "the", "to")
)
_SIDE_OF = {"upper": "top", "lower": "bottom", "center": "middle"}
_SIZE_OF = {"biggest": "largest", "closest": "largest"}
_RELATION_OF = {
    "under": "below",
    "underneath": "below",
    "over": "above",
    "closest to": "nearest to",
}


@dataclass(frozen=True, kw_only=True)
class Relation:
    """A relation to something else, such as "left of" a "bus", with the classes that it may be."""

    word: str
    categories: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Description:
    """What an expression states about the instance.

    Attributes:
        text: the normalized expression.
        categories: the classes that its noun may stand for; empty if it is not known.
        colors: colors of the instance.
        sides: "left", "right", "top", "bottom" or "middle".
        order: position, counted from 0, and the side from which it is counted; None if not stated.
        size: "largest" or "smallest"; empty if not stated.
        relations: relations to instances of other classes.
        rest: words that were not understood.
    """

    text: str
    categories: tuple[str, ...] = ()
    colors: tuple[str, ...] = ()
    sides: tuple[str, ...] = ()
    order: tuple[int, str] | None = None
    size: str = ""
    relations: tuple[Relation, ...] = ()
    rest: tuple[str, ...] = ()

    @property
    def says(self) -> bool:
        """Whether anything was understood."""
        parts = (self.categories, self.colors, self.sides, self.order, self.size, self.relations)
        return any(parts)


class Parser:
    """Parses expressions.

    Args:
        categories: class names besides those of COCO.
    """

    def __init__(self, categories: Iterable[str] = ()) -> None:
        # Longest first: the first alternative that fits wins, so "cup" would hide "cup holder".
        names = sorted(
            {*COCO_CLASSES, *CLASSES_OF, *filter(None, categories)}, key=len, reverse=True
        )
        noun = "|".join(map(re.escape, names))
        self._singular = {plural(name): name for name in names}
        several = "|".join(map(re.escape, self._singular))
        self._count = re.compile(rf"\bof the (?:{'|'.join(COUNTS[2:])}) ({several})\b")
        color = "|".join(COLORS)
        words = "nearest to|closest to|above|below|under(?:neath)?|over"
        # In "jacket of white and orange", "orange" is a color; as a thing, it has an article.
        self._last_noun = re.compile(rf"(?:\b(?!orange$)(?:{noun})|(?:^|\b(?:a|an|the) )orange)$")
        self._relation = re.compile(
            rf"\b(?:(?:to the )?(?P<side>left|right) of|(?P<word>{words}))"
            rf" (?:the|a|an) (?:(?:{color}) )?(?P<noun>{noun})\b(?: in (?:{color})\b)?"
        )

    def parse(self, text: str) -> Description:
        """Return what an expression states."""
        whole = left = normalize_expression(text)
        relations = tuple(
            Relation(word=_relation_word(found), categories=classes_of(found["noun"]))
            for found in self._relation.finditer(whole)
        )
        # Taken out first: the side, color and noun of a relation are not those of the instance.
        left = self._relation.sub(" ", left)
        ordinal = _ORDINAL.search(left)
        left = _FROM.sub(" ", _ORDINAL.sub(" ", left))
        # Before places, which leave out "leftmost" before "of": "leftmost of the three dogs"
        # becomes "leftmost dog".
        left = self._count.sub(lambda found: self._singular[found[1]], left)
        place = _PLACE.search(left)
        sides = _sides(place) if place else []
        left = _PLACE.sub(" ", left)
        size = _SIZE.search(left)
        left = " ".join(_SIZE.sub(" ", left).split())
        clothes = _CLOTHES.search(left)
        # The phrase "orange and white canopy" does not end at "and".
        opening = opening_phrase(_before(_CLAUSE, _COLOR_AND.sub("", left)))
        # In "phone held near a cup", the noun is before the participle; in "painted bowl", after.
        noun = self._last_noun.search(_before(_PARTICIPLE, opening)) or self._last_noun.search(
            opening
        )
        before = opening[: noun.start()] if noun else opening
        sides += _ADJECTIVE.findall(before)
        colors = _COLOR.findall(before) + ([clothes[1]] if clothes else [])
        taken = {*_WORD.findall(noun.group() if noun else ""), *colors, *sides}
        return Description(
            text=whole,
            categories=classes_of(_ARTICLE.sub("", noun.group())) if noun else (),
            colors=tuple(COLORS[color] for color in colors),
            sides=tuple(dict.fromkeys(sides)),
            order=(ORDINALS.index(ordinal[1]), ordinal[2]) if ordinal else None,
            size=_SIZE_OF.get(size[1], size[1]) if size else "",
            relations=relations,
            rest=tuple(w for w in _WORD.findall(left) if w not in taken and w not in _EMPTY),
        )


def classes_of(noun: str) -> tuple[str, ...]:
    """Return the classes that a noun may stand for: "person" for "man"."""
    return CLASSES_OF.get(noun, (noun,))


def _before(word: re.Pattern[str], text: str) -> str:
    found = word.search(text)
    return text[: found.start()].strip() if found else text


def _relation_word(found: re.Match[str]) -> str:
    if found["side"]:
        return f"{found['side']} of"
    return _RELATION_OF.get(found["word"], found["word"])


def _sides(found: re.Match[str]) -> list[str]:
    if found["most"]:
        return [found["most"]]
    return [_SIDE_OF.get(word, word) for word in found["where"].split()]
