"""Destinations for the progress records of long jobs.

A record is a mapping of JSON values with a key `event`. Training and indexing define which events
they write.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

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
    """Appends each record to a file as one line of JSON."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a")

    def write(self, record: Record) -> None:
        """Write one record."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()  # so that others can follow the job, and a killed one loses no record

    def close(self) -> None:
        """Close the file."""
        self._file.close()
