"""Reads the rows of a Parquet table as plain values that can be attributes."""

from __future__ import annotations

import datetime
import decimal
import math
from collections.abc import Iterator, Mapping
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

# Rows are decoded so many at a time, so that a table of any length can be listed.
ROWS_AT_ONCE = 1024

# Raised for times in years beyond 1 to 9999, and in a time zone that is not known here.
_NOT_REPRESENTABLE = (OverflowError, ValueError)


def parquet_rows(stream: IO[bytes]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield the number of each row, from 1 on, and the columns that can become attributes.

    Raises:
        OSError: the table is damaged.
    """
    number = 0
    try:
        table = pq.ParquetFile(stream)
        # A column with the bytes of images is not among them, so listing a table reads no image.
        wanted = attribute_columns(table.schema_arrow)
        for batch in table.iter_batches(ROWS_AT_ONCE, columns=wanted):
            for row in rows_of(batch):
                number += 1
                yield number, plain(row)
    except pa.ArrowException as error:  # whoever lists a file expects an OSError if it is damaged
        raise OSError(f"row {number}: {error}") from error


def rows_of(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """Return the rows of a batch, with None for times that Python cannot represent."""
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
    except _NOT_REPRESENTABLE:  # cell by cell takes longer, so only if one of them is bad
        cells = [[_value(cell) for cell in column] for column in batch.columns]
        return [dict(zip(batch.schema.names, row, strict=True)) for row in zip(*cells, strict=True)]
    return rows


def _value(cell: pa.Scalar) -> Any:
    try:
        return cell.as_py()
    except _NOT_REPRESENTABLE:
        return None


def attribute_columns(schema: pa.Schema) -> list[str]:
    """Return the names of columns that filters can compare: numbers, strings, booleans, times."""
    tests = (
        pa.types.is_integer,
        pa.types.is_floating,
        pa.types.is_boolean,
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_decimal,
        pa.types.is_temporal,
        pa.types.is_dictionary,  # strings or numbers that pyarrow stores as categories
    )
    return [each.name for each in schema if any(test(each.type) for test in tests)]


def plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with times as ISO 8601 strings, durations in seconds, and None for NaN."""
    return {name: _plain(value) for name, value in row.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, datetime.date | datetime.time):  # a datetime is a date, too
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, decimal.Decimal):
        return float(value)
    # NaN counts as a missing value. As an attribute it would make `validate_attributes` reject the
    # whole row.
    if isinstance(value, float) and math.isnan(value):
        return None
    return value
