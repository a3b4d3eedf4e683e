"""Every photo of a gallery in which the described instance is: one decision for each photo.

The presence in a photo rises with the score of its best instance. So the photos that are found are
the first ones of a search, down to a threshold. A search returns only so many rows. If that is not
enough, the gallery is divided by image id until each part is, and part after part is returned: the
memory that this takes does not grow with the gallery.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import takewhile
from typing import Any, TypedDict

from reir.datasets.generated_expressions import names_color
from reir.errors import CheckpointError, GalleryNotFound, QueryError
from reir.query.photo_curve import DEFAULT_MIN_PRESENCE, Decision
from reir.query.presence import Calibration, count_words
from reir.query.ranking import IdRange, within
from reir.query.request import check_number
from reir.query.retrieval import RetrieveRequest, RetrieveResult, VectorTerm
from reir.query.stages import Stages, VerifyRequest, VerifyResult
from reir.records import Attributes, Box, FloatArray
from reir.store.contract import InstanceRow
from reir.store.filters import parse
from reir.text import validate_expression

FIRST_PHOTOS = 100
"""Photos of the first read, which is enough for most sentences."""

PART_PHOTOS = 2000
"""Photos of every other read. If fewer are found in all, they are returned best first."""

VERIFIED_AT_ONCE = 32
"""Photos whose pixels are read before any of them is returned."""

_EVERYWHERE: IdRange = (None, None)


class EveryPhotoOptions(TypedDict, total=False):
    """Options of a search for every photo; see `EveryPhotoQuery`."""

    where: str | None
    min_presence: float | None
    precision: float | None
    recall: float | None
    verify: bool


@dataclass(frozen=True, kw_only=True)
class EveryPhotoQuery:
    """A search for every photo that has an instance.

    At most one of `min_presence`, `precision` and `recall` is given. Without one, the threshold is
    `reir.query.photo_curve.DEFAULT_MIN_PRESENCE`.

    Attributes:
        expression: describes the instance.
        where: filter that the instance must pass.
        min_presence: threshold of the presence in a photo, 0 to 1.
        precision: share of the found photos that should have the instance, 0 to 1.
        recall: share of the photos with the instance that should be found, 0 to 1.
        verify: compare the colors that the expression names with the pixels of the found photos,
            and leave out those whose presence is then too low; if the checkpoint has a color head.
    """

    expression: str
    where: str | None = None
    min_presence: float | None = None
    precision: float | None = None
    recall: float | None = None
    verify: bool = False


@dataclass(frozen=True, kw_only=True)
class FoundPhoto:
    """A photo that has the described instance, with the instance that fits best.

    Attributes:
        image_id, uri: the photo.
        presence: calibrated probability in [0, 1] that the described instance is in this photo.
        instance_id: `<image_id>#<n>`.
        box: xyxy in [0, 1] of the upright photo.
        score: inner product of instance and expression vector; higher is better.
        attributes: the user's attributes of the photo.
    """

    image_id: str
    uri: str
    presence: float
    instance_id: str
    box: Box
    score: float
    attributes: Attributes = field(default_factory=dict)


@dataclass(frozen=True)
class ScannedPart:
    """What a part of the gallery adds to an answer.

    Attributes:
        photos: the photos that are found.
        num_contradicted: number of photos that are left out, because their pixels contradict a
            color of the expression.
    """

    photos: Sequence[FoundPhoto]
    num_contradicted: int = 0


@dataclass(kw_only=True)
class EveryPhoto(Iterator[FoundPhoto]):
    """The photos that have the described instance; they are read while they are iterated over.

    Up to `PART_PHOTOS` photos come best first, more in the order of their image ids.

    Attributes:
        expression: as it was given.
        gallery, version: the version of a gallery that is searched.
        num_photos: number of photos in the gallery, whether or not they pass the filter; None if
            the API key may not know.
        decision: the threshold, and how often it should be right.
        parts: the answer, part by part.
        num_contradicted: number of photos that have been left out so far, because their pixels
            contradict a color of the expression.
    """

    expression: str
    gallery: str
    version: str
    num_photos: int | None
    decision: Decision
    parts: Iterator[ScannedPart]
    num_contradicted: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        """Begin with the first photo."""
        self._photos = self._iterate()

    def __next__(self) -> FoundPhoto:
        """Return the next photo."""
        return next(self._photos)

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yield the answer as JSON values, one for each line: the search, the photos, the end."""
        yield search_line(
            self.expression, self.gallery, self.version, self.num_photos, self.decision
        )
        num_found = 0
        for photo in self:
            num_found += 1
            yield {"photo": asdict(photo)}
        yield end_line(num_found, self.num_contradicted)

    def _iterate(self) -> Iterator[FoundPhoto]:
        for part in self.parts:
            self.num_contradicted += part.num_contradicted
            yield from part.photos


def search_line(
    expression: str, gallery: str, version: str, num_photos: int | None, decision: Decision
) -> dict[str, Any]:
    """Return the first line of an answer."""
    told = {"expression": expression, "gallery": gallery, "version": version}
    return {"search": {**told, "num_photos": num_photos, **asdict(decision)}}


def end_line(num_found: int, num_contradicted: int) -> dict[str, Any]:
    """Return the last line of a complete answer."""
    return {"end": {"found": num_found, "contradicted": num_contradicted}}


@dataclass(frozen=True)
class PhotoScan:
    """A search for every photo that has begun: the threshold is known, and the first part is read.

    Attributes:
        query: the checked query.
        expression: that of the query, normalized.
        stages: of the gallery.
        calibration: of the checkpoint.
        decision: the threshold, and how often it should be right.
        background: score of the expression on the background of the calibration.
        num_words: of the expression, as the calibration counts them.
        first: the best `FIRST_PHOTOS` photos of the gallery.
    """

    query: EveryPhotoQuery
    expression: str
    stages: Stages
    calibration: Calibration
    decision: Decision
    background: float
    num_words: int
    first: RetrieveResult

    async def parts(self) -> AsyncIterator[ScannedPart]:
        """Yield the answer, part by part.

        Raises:
            ReirError: an error of the store.
        """
        verifies = self.query.verify and self.stages.verifies and names_color(self.expression)
        async for found in self._by_vectors():
            if verifies:
                for start in range(0, len(found), VERIFIED_AT_ONCE):
                    yield await self._verified(found[start : start + VERIFIED_AT_ONCE])
            else:
                yield ScannedPart(found)

    async def _verified(self, found: Sequence[FoundPhoto]) -> ScannedPart:
        """Compare the colors of photos, and leave out those that are no longer found."""
        requests = [
            VerifyRequest(
                image_id=each.image_id, uri=each.uri, box=each.box, expression=self.expression
            )
            for each in found
        ]
        read = await self.stages.verify(requests, None)
        judged = (
            each
            if colors is None  # the photo cannot be read
            else replace(each, presence=self._presence(each.score, colors))
            for each, colors in zip(found, read, strict=True)
        )
        kept = list(filter(self._is_found, judged))
        return ScannedPart(kept, num_contradicted=len(found) - len(kept))

    async def _by_vectors(self) -> AsyncIterator[list[FoundPhoto]]:
        """Yield the photos that are found if no colors are compared, part by part."""
        found = self._found(self.first.rows)
        # Fewer than were asked for: either the threshold or the end of the gallery was reached.
        if len(found) < FIRST_PHOTOS:
            yield found
            return
        pending = [_EVERYWHERE]
        while pending:
            ids = pending.pop()
            found = self._found(await self._read(ids))
            if len(found) < PART_PHOTOS:
                yield found if ids == _EVERYWHERE else sorted(found, key=_image_id)
            else:
                # Of at least two photos, so both halves have some of them, and parts get smaller.
                middle = sorted(map(_image_id, found))[len(found) // 2]
                # The lower half is taken first, so that parts come in the order of their image ids.
                pending += [(middle, ids[1]), (ids[0], middle)]

    async def _read(self, ids: IdRange) -> Sequence[InstanceRow]:
        # Of the same version, even if another one has become live meanwhile.
        request = _request(
            self.first.vector, within(self.query.where, ids), PART_PHOTOS, self.first.version
        )
        try:
            (found,) = await self.stages.retrieve([request])
        except QueryError as error:
            if error.field != "cursor":  # the retriever's name for a version that is gone
                raise
            raise GalleryNotFound(
                f"version '{self.first.version}' was removed while every photo was searched for, "
                f"so the answer is not complete; search again"
            ) from error
        return found.rows

    def _found(self, rows: Sequence[InstanceRow]) -> list[FoundPhoto]:
        # Rows come best first, and presence rises with the score, which `begin_scan` checks. So
        # after the first row that is not found, no other one can be.
        return list(takewhile(self._is_found, map(self._photo, rows)))

    def _photo(self, row: InstanceRow) -> FoundPhoto:
        return FoundPhoto(
            image_id=row.image_id,
            uri=row.uri,
            presence=self._presence(row.score),
            instance_id=row.instance_id,
            box=row.box,
            score=row.score,
            attributes=row.attributes,
        )

    def _presence(self, score: float, colors: VerifyResult = ()) -> float:
        return self.calibration.of_photo(score, self.background, self.num_words, colors)

    def _is_found(self, photo: FoundPhoto) -> bool:
        return photo.presence >= self.decision.min_presence


async def begin_scan(query: EveryPhotoQuery, stages: Stages) -> PhotoScan:
    """Begin a search for every photo: encode the expression, and read the best photos.

    Raises:
        QueryError: a part of the query is wrong, the checkpoint has no calibration, or no threshold
            reaches the precision.
        CheckpointError: the calibration contradicts the scores.
        ReirError: an error of the text model or of the store.
    """
    checked = _checked(query)
    calibration = stages.calibration
    if calibration is None:
        raise QueryError(
            "expression",
            "cannot be decided for each photo, because the checkpoint has no calibration: create "
            "one with `reir calibrate`, or ask for the k best hits instead",
        )
    weights = dict(zip(calibration.photo.features, calibration.photo.weights, strict=True))
    # Below the background, "excess" is 0 and presence rises by the first weight alone; above it,
    # by both.
    if min(weights["score"], weights["score"] + weights["excess"]) <= 0:
        raise CheckpointError(
            "by the calibration, photos with a higher score are less likely to have the object; "
            "fit it anew with `reir calibrate`"
        )
    expression = validate_expression(checked.expression)
    (encoded,) = await stages.encode([expression])
    request = _request(encoded.vector, checked.where, FIRST_PHOTOS)
    (first,) = await stages.retrieve([request])
    return PhotoScan(
        query=checked,
        expression=expression,
        stages=stages,
        calibration=calibration,
        decision=_decision(checked, calibration, first.num_indexed),
        background=calibration.background.score(first.vector),
        num_words=count_words(expression),
        first=first,
    )


def parts_now(
    scan: PhotoScan, run: Callable[[Coroutine[Any, Any, ScannedPart]], ScannedPart]
) -> Iterator[ScannedPart]:
    """Yield the parts of a scan whose stages never wait.

    Args:
        scan: of a gallery in this process.
        run: runs a coroutine to its end.
    """
    parts = scan.parts()

    # An async generator cannot be iterated over without an event loop, but each of its steps is a
    # coroutine, which can be run alone.
    async def next_part() -> ScannedPart:
        return await anext(parts)

    while True:
        try:
            yield run(next_part())
        except StopAsyncIteration:
            return


def _checked(query: EveryPhotoQuery) -> EveryPhotoQuery:
    given = [
        name for name in ("min_presence", "precision", "recall") if _value(query, name) is not None
    ]
    if len(given) > 1:
        raise QueryError(
            given[1], f"cannot be given together with {given[0]}, because each sets the threshold"
        )
    for name in given:
        check_number(name, _value(query, name), 0.0, 1.0)
    if query.where is not None:
        # Only for its errors: the stores parse the text themselves. A server may have added the
        # condition on a tenant.
        parse(query.where, added=1)
    return query


def _value(query: EveryPhotoQuery, name: str) -> float | None:
    value: float | None = getattr(query, name)
    return value


def _decision(query: EveryPhotoQuery, calibration: Calibration, num_photos: int) -> Decision:
    curve = calibration.photo_curve
    if query.precision is not None:
        return curve.for_precision(query.precision, num_photos)
    if query.recall is not None:
        return curve.for_recall(query.recall, num_photos)
    given = query.min_presence
    return curve.at(DEFAULT_MIN_PRESENCE if given is None else given, num_photos)


def _request(
    vector: FloatArray | None, where: str | None, num_rows: int, version: str = ""
) -> RetrieveRequest:
    return RetrieveRequest(
        terms=(VectorTerm(weight=1.0, vector=vector),),
        num_rows=num_rows,
        per_image=1,
        where=where,
        num_photos=0,
        version=version,
    )


def _image_id(photo: FoundPhoto) -> str:
    return photo.image_id
