"""Makes canaries of a gallery from its search log: from what users said about their searches.

A verdict "right" gives a canary with the photo and box of the hit, "box" one with the box that the
user drew, and "absent" one whose object is not in the gallery. Searches without any verdict can
become canaries without a known answer. Two expressions are the same if encoders get the same text.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from reir.errors import DataError
from reir.operations.canary import (
    Canary,
    add_canaries,
    canaries_of,
    remove_canaries,
    resolve_canaries,
)
from reir.operations.feedback import Feedback, read_feedback
from reir.operations.search_log import read_events
from reir.records import Box
from reir.store.contract import InstanceStore
from reir.text import normalize_expression, without_controls

SIZE, QUERIES = 200, 50


@dataclass(frozen=True, kw_only=True)
class MadeCanaries:
    """Canaries from a search log, newest first.

    Attributes:
        present: from verdicts "right" and "box".
        absent: from verdicts "absent".
        queries: from searches without a verdict.
        num_lost: photos that users found, but that the live version no longer has.
        num_of_tenants: verdicts "absent" that were left out, because the key of a tenant sees only
            the photos of that tenant.
    """

    present: tuple[Canary, ...]
    absent: tuple[Canary, ...]
    queries: tuple[Canary, ...]
    num_lost: int
    num_of_tenants: int

    def __iter__(self) -> Iterator[Canary]:
        yield from self.present
        yield from self.absent
        yield from self.queries


@dataclass
class _Log:
    """What the log says, by normalized expression.

    Attributes:
        verdicts: photo and box of the instance (None for "absent") -> newest verdict. Not the id
            of the instance, whose number can mean another box in another version.
        searches: time and text of the newest search.
        num_of_tenants: see `MadeCanaries`.
    """

    verdicts: dict[str, dict[tuple[str, Box | None], Feedback]] = field(
        default_factory=lambda: defaultdict(dict)
    )
    searches: dict[str, tuple[str, str]] = field(default_factory=dict)
    num_of_tenants: int = 0


def make_canaries(
    store: InstanceStore, gallery: str, folder: Path, *, size: int = SIZE, queries: int = QUERIES
) -> MadeCanaries:
    """Make canaries from the search log of a gallery, without adding them to it.

    Args:
        store: store of the gallery.
        gallery: its name.
        folder: folder of the search log.
        size: maximum number of canaries with a known answer; the newest are taken.
        queries: maximum number of canaries without one.

    Raises:
        DataError: the log contains no feedback about this gallery, or a line of it is damaged.
        GalleryNotFound: the gallery has no live version.
    """
    log = _read(folder, gallery)
    if not log.verdicts and not log.num_of_tenants:
        raise DataError(
            f"the search log in {folder} has no feedback about gallery '{gallery}'. Users give it "
            f"on the search page, with the buttons 'Right', 'Wrong' and 'It is not in this "
            f"gallery', or with POST /v1/feedback, if the server runs with `reir serve "
            f"--search-log FOLDER`; name the same folder here. `reir feedback` gives it, too"
        )
    rights = [
        _canary(said)
        for verdicts in log.verdicts.values()
        for said in verdicts.values()
        if said.verdict in ("right", "box")
    ]
    _, lost = resolve_canaries(store, gallery, store.live_version(gallery), rights)
    best = (_best(verdicts.values(), set(lost)) for verdicts in log.verdicts.values())
    newest = sorted((said for said in best if said), key=lambda said: said.time, reverse=True)
    confirmed = [_canary(said) for said in newest[:size]]
    return MadeCanaries(
        present=tuple(each for each in confirmed if each.is_present),
        absent=tuple(each for each in confirmed if each.absent),
        queries=tuple(_queries(log, queries)),
        num_lost=len({each.uri for each in lost}),
        num_of_tenants=log.num_of_tenants,
    )


def add_made_canaries(store: InstanceStore, gallery: str, made: MadeCanaries) -> int:
    """Add canaries to those of a gallery, so that none contradicts another one.

    A photo that shows the object counts more than the verdict that it is not there. So a new canary
    with a photo replaces those of the same expression without one, and "absent" is not added for
    an expression that has one with a photo. An expression without a known answer is added only if
    the gallery has no canary for it.

    Returns:
        How many are new.
    """
    known: dict[str, list[Canary]] = defaultdict(list)
    for each in canaries_of(store, gallery):
        known[normalize_expression(each.expression)].append(each)
    wanted = [
        each
        for each in made
        if _may_add(each, known.get(normalize_expression(each.expression), ()))
    ]
    replaced = [
        old
        for each in wanted
        for old in known.get(normalize_expression(each.expression), ())
        if not old.is_present and old != each
    ]
    remove_canaries(store, gallery, replaced)
    return add_canaries(store, gallery, wanted)


def _may_add(canary: Canary, known: Sequence[Canary]) -> bool:
    if canary.is_present:
        return True
    return not any(each.is_present for each in known) if canary.absent else not known


def _read(folder: Path, gallery: str) -> _Log:
    log = _Log()
    for event in read_events(folder, gallery):
        if event["event"] == "search":
            expression = _printable(event["expression"])
            key = normalize_expression(expression)
            # Files of several processes are read one after another, not in the order of time.
            log.searches[key] = max(log.searches.get(key, ("", "")), (event["time"], expression))
    for said in read_feedback(folder, gallery):
        if said.verdict == "absent" and said.tenant:
            log.num_of_tenants += 1
        else:
            key = normalize_expression(_printable(said.expression))
            log.verdicts[key][said.uri, said.box] = said
    return log


def _printable(expression: str) -> str:
    # Anybody may have sent the expression, and operators list it in their terminals.
    return " ".join(without_controls(expression).split())


def _canary(said: Feedback) -> Canary:
    return Canary(
        expression=_printable(said.expression),
        uri=said.uri,
        box=said.box,
        absent=said.verdict == "absent",
    )


def _best(verdicts: Iterable[Feedback], lost: set[Canary]) -> Feedback | None:
    """Return the newest verdict on an expression that gives a canary; None if none does."""
    telling = sorted(
        (said for said in verdicts if said.verdict != "wrong"),
        key=lambda said: said.time,
        reverse=True,
    )
    # Once the object was seen in the gallery, an earlier "absent" says nothing, even if the photo
    # has been deleted since.
    if telling and telling[0].verdict == "absent":
        return telling[0]
    return next(
        (said for said in telling if said.verdict != "absent" and _canary(said) not in lost), None
    )


def _queries(log: _Log, limit: int) -> Iterator[Canary]:
    unanswered = [search for key, search in log.searches.items() if key not in log.verdicts]
    for _, expression in sorted(unanswered, reverse=True)[:limit]:
        yield Canary(expression=expression)
