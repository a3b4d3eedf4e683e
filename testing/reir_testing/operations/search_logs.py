"""Events of a search log, and what a log contains."""

from __future__ import annotations

import json
from concurrent.futures import Future
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from reir.operations.search_log import Event, SearchLog, read_events

G = "photos"
TODAY = datetime.now(UTC).date().isoformat()


def event(expression: str = "the red mug", day: str = TODAY) -> Event:
    """Return a search that found nothing."""
    head = {"event": "search", "request_id": "r", "version": "v1", "tenant": ""}
    found: dict[str, Any] = {"k": 10, "where": None, "presence": 0.5, "found": True, "hits": []}
    return {"time": f"{day}T12:00:00.000+00:00", **head, "expression": expression, **found}


def write(log: SearchLog, *events: Event, gallery: str = G) -> list[bool]:
    """Write events, and return for each whether it was written."""
    return [future.result(20) for future in [submit(log, each, gallery) for each in events]]


def submit(log: SearchLog, event: Event, gallery: str = G) -> Future[bool]:
    """Have an event written soon."""
    return log.append(gallery, lambda: event)


def files(folder: Path) -> list[str]:
    """Return the names of the files of a log."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*"))


def texts(folder: Path, gallery: str = G) -> list[str]:
    """Return the expressions of a log."""
    return [each["expression"] for each in read_events(folder, gallery)]


def line(**changes: Any) -> bytes:
    """Return a line of a log, with some fields changed."""
    return json.dumps({**event(), **changes}).encode() + b"\n"


def put(folder: Path, data: bytes, name: str = f"{TODAY}-host-1.jsonl") -> Path:
    """Write a file of a log, and return its path."""
    (folder / G).mkdir(parents=True, exist_ok=True)
    (folder / G / name).write_bytes(data)
    return folder / G / name
