"""The outcome of a check of `reir doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """The outcome of one check.

    Attributes:
        name: what was checked.
        status: "ok", "warn" (works, but not well) or "fail".
        detail: what was found.
        advice: how to fix it; empty if the status is "ok".
    """

    name: str
    status: Status
    detail: str
    advice: str = ""


def age(seconds: float) -> str:
    """Return a time for people, such as "3 days"."""
    for unit, size_s in (("day", 86_400), ("hour", 3600), ("minute", 60)):
        if seconds >= 2 * size_s:
            return f"{seconds / size_s:.0f} {unit}s"
    return f"{seconds:.0f} seconds"
