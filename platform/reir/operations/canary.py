"""Canaries: expressions with known answers, by which a version of a gallery is judged.

Three kinds: an expression of an instance that is in the gallery, with its photo and box; one of
something that is known not to be in it; and one without a known answer, which only serves to
measure how fast and how completely the store finds the nearest instances.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reir.errors import DataError, QueryError
from reir.images.boxes import elementwise_iou
from reir.images.decode import canonical_uri, image_id
from reir.records import Box
from reir.store.contract import InstanceStore
from reir.text import validate_expression

if TYPE_CHECKING:
    from reir.query.search import Gallery
    from reir.results import Hit, SearchResult

KIND = "canary"
"""Kind of the documents; there is one for each canary of each gallery."""

NUM_HITS = 10
MIN_IOU = 0.5
"""A hit is right if it is in the right photo and its box overlaps the right one by so much."""

_KEYS = ("expression", "photo", "box", "absent")


@dataclass(frozen=True, kw_only=True)
class Canary:
    """An expression, and its known answer.

    Attributes:
        expression: describes one object.
        uri: photo that shows it; empty if there is no known answer.
        box: xyxy in [0, 1] of the upright photo; None if any box in the photo is right.
        absent: whether the object is known not to be in the gallery.
    """

    expression: str
    uri: str = ""
    box: Box | None = None
    absent: bool = False

    @property
    def is_present(self) -> bool:
        """Whether the object is known to be in the gallery."""
        return bool(self.uri)

    def is_right(self, hit: Hit) -> bool:
        """Whether a hit is the known answer."""
        if not self.uri or hit.uri != self.uri:
            return False
        return self.box is None or float(elementwise_iou([hit.box], [self.box])[0]) >= MIN_IOU


@dataclass(frozen=True, kw_only=True)
class CanaryAnswer:
    """What a version answered to a canary.

    Attributes:
        rank: rank of the first right hit, from 1; 0 if none of the first ten is right, or if
            there is no known answer.
    """

    canary: Canary
    rank: int
    result: SearchResult


def resolve_canaries(
    store: InstanceStore, gallery: str, version: str, canaries: Sequence[Canary]
) -> tuple[dict[Canary, Canary], list[Canary]]:
    """Find out which canaries a version can answer.

    Returns:
        Each of these canaries with the one that hits are compared with: for a photo whose instances
        are stored under another photo with the same content, it names that photo. And the canaries
        whose photo the version does not have, which it cannot find.
    """
    ids = [image_id(each.uri) for each in canaries if each.uri]
    rows = store.get_images(gallery, version, ids)
    holder_ids = [row.same_as for row in rows.values() if row.same_as]
    holders = store.get_images(gallery, version, holder_ids)
    known: dict[Canary, Canary] = {}
    lost: list[Canary] = []
    for canary in canaries:
        row = rows.get(image_id(canary.uri)) if canary.uri else None
        if canary.uri and (row is None or row.status != "indexed"):
            lost.append(canary)
        # Searches return only photos that hold instances, so the known answer is one of these.
        elif row is not None and row.same_as in holders:
            known[canary] = replace(canary, uri=holders[row.same_as].uri)
        else:
            known[canary] = canary
    return known, lost


def ask_canaries(gallery: Gallery, canaries: Mapping[Canary, Canary]) -> list[CanaryAnswer]:
    """Search for every canary, one after another, as users do; see `resolve_canaries`."""
    answers = []
    for canary, resolved in canaries.items():
        result = gallery.search(canary.expression, k=NUM_HITS)
        right = [rank for rank, hit in enumerate(result, 1) if resolved.is_right(hit)]
        answers.append(CanaryAnswer(canary=canary, rank=min(right, default=0), result=result))
    return answers


def read_canaries(path: Path) -> list[Canary]:
    """Read canaries from a file of JSON lines.

    Each line is an object with `expression`; and either `photo` (a path or URI) and, if it is
    known, `box` ([x1, y1, x2, y2] in [0, 1]); or `absent` (true); or neither of them.

    Raises:
        DataError: the file cannot be read, or a line is wrong; the message names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the canaries in {path}: {error}") from error
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found.append(_parse(line))
            except (ValueError, TypeError, QueryError) as error:
                raise DataError(f"{path}, line {number}: {error}") from error
    if not found:
        raise DataError(f"{path} contains no canaries; write one JSON object in each line")
    return found


def to_line(canary: Canary) -> str:
    """Return a canary as a line of the file that `read_canaries` reads."""
    values: dict[str, Any] = {"expression": canary.expression}
    if canary.uri:
        values["photo"] = canary.uri
    if canary.box is not None:
        values["box"] = [round(side, 4) for side in canary.box]
    if canary.absent:
        values["absent"] = True
    return json.dumps(values, ensure_ascii=False)


def add_canaries(store: InstanceStore, gallery: str, canaries: Iterable[Canary]) -> int:
    """Add canaries to those of a gallery; return how many are new."""
    known = store.find_documents(KIND, f"{gallery}/")
    added = 0
    for canary in canaries:
        name = _name(gallery, canary)
        added += name not in known
        store.put_document(KIND, name, asdict(canary))
    return added


def canaries_of(store: InstanceStore, gallery: str) -> list[Canary]:
    """Return the canaries of a gallery, ordered by expression."""
    found = store.find_documents(KIND, f"{gallery}/").values()
    canaries = [
        Canary(**{**values, "box": tuple(values["box"]) if values["box"] else None})
        for values in found
    ]
    return sorted(canaries, key=lambda each: (each.expression, each.uri))


def remove_canaries(store: InstanceStore, gallery: str, canaries: Iterable[Canary]) -> None:
    """Remove canaries from those of a gallery."""
    store.delete_documents(KIND, [_name(gallery, canary) for canary in canaries])


def select_canaries(canaries: Sequence[Canary], limit: int) -> list[Canary]:
    """Return at most `limit` canaries, the same ones every time, of all kinds in proportion."""
    if len(canaries) <= limit:
        return list(canaries)
    # The hash gives each canary a place that does not depend on the others, so a new one displaces
    # at most one of those that were chosen before.
    ordered = sorted(canaries, key=lambda each: hashlib.sha256(to_line(each).encode()).digest())
    return ordered[:limit]


def _parse(line: str) -> Canary:
    values = json.loads(line)
    if not isinstance(values, dict):
        raise ValueError(f"a canary must be a JSON object, got {line[:60]!r}")
    if unknown := sorted(values.keys() - set(_KEYS)):
        raise ValueError(f"unknown key {unknown[0]!r}; allowed: {', '.join(_KEYS)}")
    # Searches would refuse another one, but only at the check of a finished re-indexing.
    validate_expression(values.get("expression"))
    photo = values.get("photo", "")
    absent = values.get("absent", False)
    if not isinstance(photo, str) or not isinstance(absent, bool):
        raise ValueError("'photo' must be a path or URI, and 'absent' must be true or false")
    if absent and photo:
        raise ValueError("'photo' and 'absent' exclude each other; give only one of them")
    if values.get("box") is not None and not photo:
        raise ValueError("'box' needs the 'photo' that it belongs to")
    return Canary(
        expression=values["expression"].strip(),
        uri=_uri(photo) if photo else "",
        box=_box(values.get("box")),
        absent=absent,
    )


def _uri(photo: str) -> str:
    if "://" in photo:
        return photo
    return canonical_uri(os.path.abspath(os.path.expanduser(photo)))


def _box(value: Any) -> Box | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 4:
        raise ValueError(f"'box' must have four numbers x1, y1, x2, y2, got {value}")
    x1, y1, x2, y2 = map(float, value)
    if not (0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1):
        raise ValueError(
            f"'box' must be x1, y1, x2, y2 in [0, 1] with x1 < x2 and y1 < y2, got {value}"
        )
    return x1, y1, x2, y2


def _name(gallery: str, canary: Canary) -> str:
    # Without the box, so that a canary with a corrected box replaces the old one.
    key = json.dumps([canary.expression, canary.uri])
    return f"{gallery}/{hashlib.sha256(key.encode()).hexdigest()[:24]}"
