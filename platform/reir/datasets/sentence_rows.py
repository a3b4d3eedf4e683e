"""Reads the rows of a list of photos and sentences: a CSV file, or JSON lines.

A CSV file has commas, semicolons or tabs between its values, and a header, which is usually row 1.
In JSON lines, each line is an object. Both are UTF-8, with or without a byte order mark.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reir.datasets.json_entries import shown
from reir.errors import DataError, nearest_name

PHOTO, SENTENCE = "photo", "sentence"
BOX = ("x1", "y1", "x2", "y2")
"""The optional columns: left, top, right and bottom in pixels of the photo."""
_REQUIRED = (PHOTO, SENTENCE)
_OTHER_BOXES = ("box", "bbox")
_DELIMITERS = (",", ";", "\t")
_MAX_PROBLEMS_SHOWN = 10
_FOREIGN = {
    b"PK\x03\x04": "an Excel workbook (or another zip archive); save its sheet as 'CSV UTF-8'",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook; save its sheet as 'CSV UTF-8'",
    b"\xff\xfe": "UTF-16 text; save it as UTF-8, in Excel as 'CSV UTF-8'",
    b"\xfe\xff": "UTF-16 text; save it as UTF-8, in Excel as 'CSV UTF-8'",
    b"[": "a JSON list; write JSON lines instead, with one object on each line and no brackets",
}
"""First bytes of files that are something else -> what they are, and what to do."""
# What Python decodes bytes to that are not UTF-8, and other halves of characters.
_NOT_UTF8 = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a list.

    Attributes:
        number: number of the row in a CSV file, as spreadsheets count, or of the line.
        where: "row 7" or "line 7".
        values: name of a column, in lower case -> value; text in a CSV file.
        problems: why the row cannot be used, in words; the values are then incomplete.
    """

    number: int
    where: str
    values: Mapping[str, object]
    problems: tuple[str, ...] = ()


def read_rows(path: str | Path) -> Iterator[Row]:
    """Yield the rows of a list that are not blank, without those of its header.

    Raises:
        DataError: the file cannot be read, is something else, or has a header that lacks a column.
    """
    text = _text_of(Path(path))
    if text.lstrip().startswith("{"):
        yield from _json_rows(text)
    else:
        yield from _csv_rows(path, text)


def list_error(path: str | Path, problems: Sequence[str]) -> DataError:
    """Return the error that lists the first ten problems of a file, and says how many it has."""
    num, more = len(problems), len(problems) - _MAX_PROBLEMS_SHOWN
    lines = [
        f"{path} has {num:,} {'problem' if num == 1 else 'problems'}, so nothing of it is used:",
        *problems[:_MAX_PROBLEMS_SHOWN],
        *([f"and {more:,} more"] if more > 0 else []),
    ]
    return DataError("\n  ".join(lines))


def _text_of(path: Path) -> str:
    """Return the text of a file; bytes that are not UTF-8 become lone surrogates."""
    if path.is_dir():
        raise DataError(f"{path} is a folder; give the CSV or JSON lines file")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    content = data.removeprefix(codecs.BOM_UTF8).lstrip()
    if not content:
        raise DataError(
            f"{path} is empty; expected a header row with the columns photo and sentence, and a "
            f"row for each sentence"
        )
    for start, what in _FOREIGN.items():
        if content.startswith(start):
            raise DataError(f"{path} is {what}")
    # For example UTF-16 without a byte order mark, which `_FOREIGN` does not recognize.
    if b"\0" in data.partition(b"\n")[0]:
        raise DataError(f"{path} is no text file: its first line contains bytes that are 0")
    # Bytes that are not UTF-8 raise no error yet, but later, when their row is known
    # (`unreadable_text`).
    return data.decode("utf-8-sig", "surrogateescape")


def _json_rows(text: str) -> Iterator[Row]:
    # Not `splitlines`, since a sentence may contain the other characters at which that splits.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"line {number}"
        try:
            values = json.loads(line, object_pairs_hook=_Object)
        except json.JSONDecodeError as error:
            problem = f"this is not valid JSON: {error.msg} at character {error.pos + 1}"
            yield Row(number, where, {}, (problem,))
            continue
        # A number of thousands of digits raises a plain ValueError, and deep nesting a
        # RecursionError.
        except (ValueError, RecursionError) as error:
            yield Row(number, where, {}, (f"this is not valid JSON: {error}",))
            continue
        if not isinstance(values, _Object):
            problem = f"expected an object with the keys photo and sentence, got {shown(values)}"
            yield Row(number, where, {}, (problem,))
            continue
        columns = [_column(name) for name, _ in values.pairs]
        found = dict(zip(columns, (value for _, value in values.pairs), strict=True))
        yield Row(number, where, found, tuple(_column_problems(columns, "key")))


class _Object:
    """A JSON object as pairs, so that a repeated key is noticed."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        self.pairs = pairs

    def __repr__(self) -> str:
        return repr(dict(self.pairs))


def _csv_rows(path: str | Path, text: str) -> Iterator[Row]:
    delimiter = _delimiter(text)
    # `newline=""` leaves line breaks within quotes as they are. Without `strict`, a quote that is
    # never closed would silently make the rest of the file part of one value.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    columns: list[str] = []
    number = 0
    # Not a `for` loop, because `next` must be within the `try`. `number` counts rows as a
    # spreadsheet does, blank ones too; the number of the line would differ where a value has a line
    # break.
    while True:
        number += 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            problem = (
                f"the quotes cannot be understood ({error}), so the rows after this one were not "
                f'checked; write "..." around a whole value, and each quote in it twice'
            )
            yield Row(number, f"row {number}", {}, (problem,))
            return
        if not any(cell.strip() for cell in cells):
            continue
        if not columns:
            columns = [_column(cell) for cell in cells]
            problems = [f"row {number}: {each}" for each in _column_problems(columns, "column")]
            if problems:
                raise list_error(path, problems)
        else:
            yield _csv_row(number, columns, cells, delimiter)


def _csv_row(number: int, columns: Sequence[str], cells: Sequence[str], delimiter: str) -> Row:
    where = f"row {number}"
    if len(cells) == len(columns):
        return Row(number, where, dict(zip(columns, cells, strict=True)))
    values = shown(delimiter.join(cells))
    problem = (
        f"expected {len(columns)} values, as many as the header has, got {len(cells)}: {values}; "
        f"write quotes around a sentence that contains {shown(delimiter)}"
    )
    return Row(number, where, {}, (problem,))


def _delimiter(text: str) -> str:
    """Return what separates the values of the header: that which gives the most known columns."""
    header = re.split(r"[\r\n]", text.strip())[0]

    def fit(delimiter: str) -> tuple[int, int]:
        cells = next(csv.reader([header], delimiter=delimiter), [])
        known = {*_REQUIRED, *BOX}.intersection(map(_column, cells))
        return len(known), len(cells)

    return max(_DELIMITERS, key=fit)


def _column(name: str) -> str:
    """Return the name of a column as it is compared: "Photo " is "photo"."""
    return name.strip().casefold()


def _column_problems(columns: Sequence[str], what: str) -> Iterator[str]:
    """Yield what is wrong with the columns of a header, or the keys of an object."""
    named = [name for name in columns if name]
    for name in dict.fromkeys(named):
        if named.count(name) > 1:
            yield f"the {what} {shown(name)} is there {named.count(name)} times; remove the others"
    for name in _REQUIRED:
        if name not in named:
            yield (
                f"there is no {what} {name!r}, only {', '.join(map(shown, named)) or 'blank ones'}"
                f"{nearest_name(name, named)}"
            )
    lacking = [name for name in BOX if name not in named]
    if 0 < len(lacking) < len(BOX):
        yield f"a box needs the {what}s {', '.join(BOX)}; missing: {', '.join(lacking)}"
    for name in _OTHER_BOXES:
        if name in named:
            yield (
                f"the {what} {name!r} is not read: give boxes as the {what}s {', '.join(BOX)}, in "
                f"pixels from the left and the top"
            )


def unreadable_text(text: str) -> str:
    """Return what is wrong with the characters of a value; empty if nothing is."""
    if "\0" in text:
        return f"{shown(text)} contains a character with the number 0; remove it"
    if _NOT_UTF8.search(text):
        # Most such files are in an encoding of Western Europe; its reading is easy to recognize.
        # `surrogateescape` reads byte 0xE9 as U+DCE9, so the lowest eight bits are the byte.
        guess = _NOT_UTF8.sub(lambda found: chr(ord(found.group()) % 0x100), text)
        return f"{shown(guess)} is not stored as UTF-8; save the file as UTF-8"
    return ""
