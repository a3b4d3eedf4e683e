"""The output folder of a fine-tune, which keeps finished parts, so that a rerun skips them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from reir.errors import ConfigError

REQUEST, PARTS = "request.json", "parts"


class OutputFolder:
    """The folder of one request, and the results of its finished parts.

    Args:
        path: created if it does not exist.
        request: JSON values that determine all results.

    Raises:
        ConfigError: the folder has results of another request.
    """

    def __init__(self, path: Path, request: Mapping[str, Any]) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        file = path / REQUEST
        known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        if known is None:
            _write(file, request)
        elif known != dict(request):
            changed = sorted(k for k in {*known, *request} if known.get(k) != request.get(k))
            raise ConfigError(
                f"{path} has the results of another fine-tune ({', '.join(changed)} differ); "
                f"choose another folder with --output, or delete this one"
            )

    def part(self, name: str, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """Return the result of a part as JSON values, and compute it unless it is known.

        Args:
            name: of the part.
            make: computes the result.
        """
        file = self.path / PARTS / f"{name}.json"
        if not file.is_file():
            started_s = time.monotonic()
            result = make()
            file.parent.mkdir(exist_ok=True)
            _write(file, {"seconds": time.monotonic() - started_s, "result": result})
        # Read again, so that a computed result is exactly what a rerun gets.
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["result"]
        return found

    def minutes(self) -> dict[str, float]:
        """Return how long each finished part took, without interrupted attempts."""
        found = {
            file.stem: json.loads(file.read_text(encoding="utf-8"))["seconds"]
            for file in sorted(
                (self.path / PARTS).glob("*.json"), key=lambda f: f.stat().st_mtime_ns
            )
        }
        return {name: round(seconds / 60, 2) for name, seconds in found.items()}


def _write(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON atomically."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    part.replace(path)
