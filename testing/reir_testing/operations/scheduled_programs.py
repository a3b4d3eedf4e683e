"""Schedules whose commands are small Python programs."""

from __future__ import annotations

import time
from typing import Any

from reir.config import load_config
from reir.operations.schedule.schedules import Schedule

RUN_PROGRAM = "import sys; exec(sys.argv[2])"
"""What stands for `reir`: the word after `data` is a Python program. Real commands take seconds."""


def schedule(program: str = "print('done')", **changes: Any) -> Schedule:
    """Return a schedule for 3:00 whose command is a program."""
    values = {"command": ["data", program], "cron": "0 3 * * *", "timezone": "UTC", "added_s": 1.0}
    return load_config(Schedule, {**values, **changes})


def long_ago() -> float:
    """Return a time before which many runs were due."""
    return time.time() - 10 * 86_400
