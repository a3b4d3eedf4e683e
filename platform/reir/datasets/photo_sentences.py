"""Reads a list of photos and sentences about them: what users have who never drew a box.

The list is a CSV file with a header row, or JSON lines; see `sentence_rows`. Its columns (or keys):

* `photo`: path of the photo, relative to the folder of photos;
* `sentence`: describes one instance in that photo;
* `x1`, `y1`, `x2`, `y2`, which may be absent or blank: the box of that instance, in pixels.

Other columns and blank rows are ignored. The sizes of the photos are taken from their files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from reir.datasets.dataset import (
    BoxPx,
    Expression,
    ReferringDataset,
    ReferringImage,
    ReferringInstance,
)
from reir.datasets.json_entries import shown
from reir.datasets.photo_sizes import leaves_folder
from reir.datasets.sentence_rows import (
    BOX,
    PHOTO,
    SENTENCE,
    Row,
    list_error,
    read_rows,
    unreadable_text,
)
from reir.errors import DataError, ImageError, ImageFailure, QueryError, UnknownPhoto
from reir.images.decode import read_bytes, upright_size
from reir.text import validate_expression

ROUNDING_PX = 1.0
"""A box may extend this far beyond its photo."""


def read_photo_sentences(path: str | Path, images_dir: str | Path) -> ReferringDataset:
    """Read a whole list, after checking all of its rows and photos.

    The id of an expression is the number of its row. Rows about the same box of the same photo
    describe one instance; an expression without a box has none.

    Args:
        path: the CSV or JSON lines file.
        images_dir: folder of the photos.

    Raises:
        DataError: the file or the folder cannot be read, or rows cannot be used; the message lists
            the first ten problems with their rows and values, and says how many there are.
    """
    if not Path(images_dir).is_dir():
        raise DataError(f"{images_dir} is not a folder; give the folder with the photos of {path}")
    return read_sentence_list(path, _Photos(Path(images_dir)))


class PhotoFinder(Protocol):
    """Finds the photos that a list names."""

    def of(self, name: str) -> ReferringImage:
        """Return the photo of this name.

        Raises:
            UnknownPhoto: there is no such photo.
            DataError: it is blank, or the photo cannot be used.
        """
        ...


def read_sentence_list(
    path: str | Path, photos: PhotoFinder, *, skipped: list[str] | None = None
) -> ReferringDataset:
    """Read a list whose photos are not in one folder; otherwise as `read_photo_sentences`.

    Args:
        path: the CSV or JSON lines file.
        photos: finds the photos.
        skipped: rows of unknown photos are left out, and their messages are added here; None makes
            them an error.

    Raises:
        DataError: as `read_photo_sentences`.
    """
    pairs: list[_Pair] = []
    problems: list[str] = []
    for row in read_rows(path):
        found, unknown = list(row.problems), list[str]()
        # Unknown photos are kept apart from the other problems only if the caller wants to skip
        # them.
        pair = None if found else _pair(row, photos, found, found if skipped is None else unknown)
        problems += [f"{row.where}: {each}" for each in found]
        if skipped is not None:
            skipped += [f"{row.where}: {each}" for each in unknown]
        if pair is not None:
            pairs.append(pair)
    if problems:
        raise list_error(path, problems)
    if not pairs and skipped:
        raise DataError(f"{path}: no row is about a known photo; {skipped[0]}")
    if not pairs:
        raise DataError(f"{path} has a header but no rows; add a row for each sentence")
    return _dataset(str(path), pairs)


def write_photo_sentences(dataset: ReferringDataset, path: str | Path) -> None:
    """Write a dataset as JSON lines that `read_photo_sentences` reads.

    They have the file names of the photos, the sentences, and the boxes of described instances.
    """
    lines = []
    for each in dataset.expressions:
        values: dict[str, object] = {
            PHOTO: dataset.images_by_id[each.image_id].file_name,
            SENTENCE: each.text,
        }
        if each.instance_id is not None:
            box = dataset.instances_by_id[each.instance_id].box_xyxy_px
            values |= dict(zip(BOX, box, strict=True))
        lines.append(json.dumps(values, ensure_ascii=False) + "\n")
    Path(path).write_text("".join(lines), encoding="utf-8")


@dataclass(frozen=True, slots=True)
class _Pair:
    """A row that can be used."""

    number: int
    photo: ReferringImage
    sentence: str
    box: BoxPx | None


def _pair(row: Row, photos: PhotoFinder, problems: list[str], unknown: list[str]) -> _Pair | None:
    """Return the pair of a row, or None after adding all of its problems to the lists.

    Args:
        row: a row that can be read.
        photos: finds its photo.
        problems: gets everything else than that its photo is unknown.
        unknown: gets that its photo is unknown.
    """
    photo = sentence = box = None
    with _noting(problems, unknown):
        photo = photos.of(_text(row, PHOTO))
    with _noting(problems):
        sentence = _sentence(_text(row, SENTENCE))
    with _noting(problems):
        box = _box(row)
        # Without the photo there is nothing to compare with, and its own problem is noted already.
        if box and photo:
            _check_inside(box, photo)
    if photo is None or sentence is None or problems:
        return None
    return _Pair(row.number, photo, sentence, box)


@contextmanager
def _noting(problems: list[str], unknown: list[str] | None = None) -> Iterator[None]:
    """Add the message of a `DataError` to `problems` or `unknown`, and go on."""
    try:
        yield
    except UnknownPhoto as error:
        (problems if unknown is None else unknown).append(str(error))
    except DataError as error:
        problems.append(str(error))


def _text(row: Row, column: str) -> str:
    """Return a text of a row, without spaces around it; empty if it is missing."""
    value = row.values.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"the {column} must be text, got {shown(value)}")
    if problem := unreadable_text(value):
        raise DataError(f"the {column} {problem}")
    return value.strip()


def _sentence(text: str) -> str:
    try:
        validate_expression(text)
    except QueryError as error:
        which = f" {shown(text, 40)}" if text else ""
        raise DataError(f"the sentence{which} {error.detail}") from error
    return text


class _Photos:
    """The photos that a list names, each opened once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[str, ReferringImage | DataError] = {}

    def of(self, name: str) -> ReferringImage:
        """Return the photo of this name.

        Raises:
            DataError: it is blank, not below the folder, missing or no photo.
        """
        if not name:
            raise DataError(f"the photo is blank; give the path of a photo in {self._folder}")
        # "./a.jpg" and "a.jpg" are the same photo.
        name = str(PurePosixPath(name))
        if name not in self._known:
            try:
                self._known[name] = self._measured(name)
            except DataError as error:
                # Remembered, so that many rows about one unusable photo do not open its file again
                # and again, and each of them still gets the message.
                self._known[name] = error
        found = self._known[name]
        if isinstance(found, DataError):
            raise found
        return found

    def _measured(self, name: str) -> ReferringImage:
        if leaves_folder(name):
            raise DataError(
                f"the photo {shown(name)} is not below {self._folder}; give a path relative to it"
            )
        try:
            width_px, height_px = upright_size(read_bytes(self._folder / name))
        except ImageError as error:
            if error.reason == ImageFailure.MISSING:
                raise UnknownPhoto(f"the photo {shown(name)} is not in {self._folder}") from error
            raise DataError(f"the photo {shown(name)} cannot be read: {error.detail}") from error
        return ReferringImage(image_id=name, file_name=name, width_px=width_px, height_px=height_px)


def _box(row: Row) -> BoxPx | None:
    """Return the box of a row; None if it has none."""
    values = {name: row.values.get(name) for name in BOX}
    blank = [name for name, value in values.items() if value is None or not str(value).strip()]
    if len(blank) == len(BOX):
        return None
    if blank:
        raise DataError(
            f"a box needs all of {', '.join(BOX)}, but {', '.join(blank)} is blank; leave out all "
            f"four if nobody drew a box"
        )
    x1, y1, x2, y2 = (_number(name, value) for name, value in values.items())
    if x2 <= x1 or y2 <= y1:
        raise DataError(
            f"the box {_show_box((x1, y1, x2, y2))} has no area: x2 must be larger than x1, and y2 "
            f"larger than y1"
        )
    return x1, y1, x2, y2


def _number(name: str, value: object) -> float:
    number = math.nan
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        # JSON allows whole numbers that no float can hold, which raise an OverflowError.
        with suppress(ValueError, OverflowError):
            number = float(value)
    if not math.isfinite(number):
        raise DataError(f"{name} must be a number of pixels such as 12.5, got {shown(value)}")
    return number


def _check_inside(box: BoxPx, photo: ReferringImage) -> None:
    right, bottom = photo.width_px + ROUNDING_PX, photo.height_px + ROUNDING_PX
    if min(box[:2]) < -ROUNDING_PX or box[2] > right or box[3] > bottom:
        raise DataError(
            f"the box {_show_box(box)} reaches beyond its photo, which has {photo.width_px} x "
            f"{photo.height_px} px; give x1, y1, x2, y2 in pixels of the photo"
        )


def _show_box(box: BoxPx) -> str:
    return "(" + ", ".join(f"{value:g}" for value in box) + ")"


def _dataset(source: str, pairs: list[_Pair]) -> ReferringDataset:
    images: dict[str, ReferringImage] = {}
    instances: dict[tuple[str, BoxPx], ReferringInstance] = {}
    expressions = []
    for pair in pairs:
        image_id, target = pair.photo.image_id, None
        images[image_id] = pair.photo
        if pair.box is not None:
            target = instances.setdefault(
                (image_id, pair.box),
                ReferringInstance(
                    instance_id=str(pair.number), image_id=image_id, box_xyxy_px=pair.box
                ),
            )
        expressions.append(
            Expression(
                expression_id=str(pair.number),
                image_id=image_id,
                instance_id=target.instance_id if target else None,
                text=pair.sentence,
            )
        )
    return ReferringDataset(
        source=source,
        images=tuple(images.values()),
        instances=tuple(instances.values()),
        expressions=tuple(expressions),
    )
