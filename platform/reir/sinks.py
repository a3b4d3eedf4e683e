"""Destinations for the progress records of long jobs.

A record is a mapping of JSON values with a key `event`. Training and indexing define which events
they write.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from reir.tracing import Attributes, Period, record_span

Record = Mapping[str, Any]


class Sink(Protocol):
    """A destination for the records of a job."""

    def write(self, record: Record) -> None:
        """Write one record."""
        ...

    def close(self) -> None:
        """Write what is still buffered, and release the destination."""
        ...


class JsonLines:
    """Appends each record to a file as one line of JSON; `records_of` reads them.

    A last line that is incomplete, because the disk was full or the power failed, is ended.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("a")
        if _is_cut_off(path):
            self._file.write("\n")  # or the next record would be part of that line

    def write(self, record: Record) -> None:
        """Write one record."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()  # so that others can follow the job, and a killed one loses no record

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _is_cut_off(path: Path) -> bool:
    if not path.is_file() or not path.stat().st_size:  # a pipe has no last line
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


def records_of(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Yield the records of lines that `JsonLines` wrote, without those that are incomplete."""
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            continue


class Spans:
    """Makes a span of each record that has `stage_times`, and one within it for each stage.

    `stage_times` maps stages to Unix times of their start and end. The numbers of the record become
    attributes of its span, and so do gallery and version of the record "start". Needs
    `start_tracing`.
    """

    def __init__(self) -> None:
        self._names: Attributes = {}

    def write(self, record: Record) -> None:
        """Record the spans of one record."""
        if record["event"] == "start":
            self._names = {f"reir.{name}": record[name] for name in ("gallery", "version")}
        times: Mapping[str, tuple[float, float]] = record.get("stage_times", {})
        if not times:
            return
        periods = [
            Period(stage, round(start_s * 1e9), round(end_s * 1e9))
            for stage, (start_s, end_s) in times.items()
        ]
        start_ns = min(each.start_ns for each in periods)
        end_ns = max(each.end_ns for each in periods)
        whole = record_span(
            Period(record["event"], start_ns, end_ns),
            attributes={**self._names, **_numbers(record)},
        )
        for period in periods:
            record_span(period, parent=whole)

    def close(self) -> None:
        """Do nothing: `stop_tracing` sends the spans that still wait."""


def _numbers(record: Record) -> dict[str, Any]:
    return {
        f"reir.{name}": value
        for name, value in record.items()
        if isinstance(value, int | float) and name != "time"
    }
