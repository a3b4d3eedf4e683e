"""Where the records of a long job go. Every sink takes the same records, whatever the job.

A record is a mapping of JSON values with a key `event`. Training and indexing each say which
events they have.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

Record = Mapping[str, Any]


class Sink(Protocol):
    """Takes the records of a job."""

    def write(self, record: Record) -> None:
        """Take one record."""
        ...

    def close(self) -> None:
        """Write what is not yet written."""
        ...


class JsonLines:
    """One line a record, behind those of earlier starts."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a")

    def write(self, record: Record) -> None:
        """Take one record."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
