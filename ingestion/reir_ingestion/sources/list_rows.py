"""Reads the records of a list: JSONL, CSV or TSV with a header, plain text, or a Parquet table.

A line that cannot be read is returned as an error, and reading continues with the next line.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from typing import IO, Any

from reir.attributes import BadRow
from reir.errors import SourceError
from reir_ingestion.sources.columns import image_column, typed

MAX_LINE_BYTES = 1024**2
"""Longer lines are skipped, and never held in memory as a whole."""

Record = str | Mapping[str, Any] | BadRow
"""One line: the name of an image, or the values of its columns, or what is wrong with the line."""

_TOO_LONG = f"the line has more than {MAX_LINE_BYTES} bytes"
# Some spreadsheets write it before the first line; it is not part of the first column's name.
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_records(stream: IO[bytes], name: str, column: str) -> Iterator[tuple[int, Record]]:
    """Yield the number of each line, starting at 1, and its record; empty lines are skipped.

    Args:
        stream: the list.
        name: name of the list; its suffix, without ".gz", determines the format.
        column: column of the images, see `image_column`.

    Raises:
        SourceError: the header of a CSV or TSV list is too long to be read.
    """
    form = name.lower().removesuffix(".gz").rpartition(".")[2]
    if form in ("jsonl", "ndjson"):
        yield from _json_records(stream)
    elif form in ("csv", "tsv"):
        yield from _csv_records(stream, "\t" if form == "tsv" else ",", column)
    elif form == "parquet":
        from reir_ingestion.sources.parquet_rows import parquet_rows

        yield from parquet_rows(stream)
    else:
        for number, line in _lines(stream):
            yield number, BadRow(_TOO_LONG) if line is None else _decoded(line)


def _json_records(stream: IO[bytes]) -> Iterator[tuple[int, Record]]:
    for number, line in _lines(stream):
        yield number, BadRow(_TOO_LONG) if line is None else _json_record(line)


def _json_record(line: bytes) -> Record:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return BadRow(f"not valid JSON: {error}")
    if isinstance(value, str | dict):
        return value
    return BadRow(f"expected an object or a string, got {type(value).__name__}")


def _csv_records(stream: IO[bytes], delimiter: str, column: str) -> Iterator[tuple[int, Record]]:
    """Yield each record with the number of its last line: a cell may contain line breaks."""
    number = 0
    is_too_long = False

    def texts() -> Iterator[str]:
        nonlocal number, is_too_long
        for number, line in _lines(stream, empty=True):  # noqa: B007, read while it is in use
            # Both a line that is too long and an empty one become a row without cells. Within a
            # cell, an empty line belongs to the text; the reader needs line ends to keep it.
            is_too_long = line is None
            yield "" if line is None else _decoded(line) + "\n"

    # Without `strict`, the reader would guess what a wrong quote means.
    rows = csv.reader(texts(), delimiter=delimiter, strict=True)
    header: list[str] = []
    image: str | None = None
    # Not a `for` loop, which would end at the first error: the reader continues after one.
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            yield number, BadRow(f"not valid CSV: {error}")
            continue
        if row is None:
            return
        if not row and not is_too_long:
            continue
        if not header and not row:
            raise SourceError(f"the header of the list is too long: {_TOO_LONG}")
        if not header:
            header, image = row, image_column(row, column)
        elif len(row) != len(header):
            yield number, BadRow(f"{len(row)} cells, but the header has {len(header)} columns")
        else:
            # The name of an image stays a string, even if it looks like a number.
            cells = zip(header, row, strict=True)
            yield number, {key: cell if key == image else typed(cell) for key, cell in cells}


def _lines(stream: IO[bytes], *, empty: bool = False) -> Iterator[tuple[int, bytes | None]]:
    """Yield the number and the bytes of each line; None if it is too long.

    Args:
        stream: the list.
        empty: whether to yield empty lines, too.
    """
    number = 0
    while line := stream.readline(MAX_LINE_BYTES):
        number += 1
        if number == 1:
            line = line.removeprefix(_BYTE_ORDER_MARK)
        if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):  # skip the rest of this line
                line = stream.readline(MAX_LINE_BYTES)
            yield number, None
        else:
            text = line.rstrip(b"\r\n")
            if text or empty:
                yield number, text


def _decoded(line: bytes) -> str:
    """Return a line as text; invalid bytes become surrogates, as Python does in file names."""
    return line.decode("utf-8", "surrogateescape")
