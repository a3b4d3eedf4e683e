"""Settings of `reir schedule`, and the default places of its files. Needs no APScheduler."""

from __future__ import annotations

from pathlib import Path

from reir.config import StrictConfig, reir_home


class ScheduleSettings(StrictConfig):
    """Settings of `reir schedule`.

    Attributes:
        file: file of the schedules; None for `schedules.yaml` in `$REIR_HOME`.
        folder: folder of their runs; None for `schedule-runs` in `$REIR_HOME`.
    """

    file: Path | None = None
    folder: Path | None = None


def default_schedule_file() -> Path:
    """Return the file of schedules that commands use if no other is named."""
    return reir_home() / "schedules.yaml"


def default_runs_folder() -> Path:
    """Return the folder of the runs of all schedules."""
    return reir_home() / "schedule-runs"
