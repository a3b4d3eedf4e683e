"""Settings of `reir schedule`."""

from __future__ import annotations

from pathlib import Path

from reir.config import StrictConfig


class ScheduleSettings(StrictConfig):
    """Settings of `reir schedule`.

    Attributes:
        file: file of the schedules; None for `schedules.yaml` in `$REIR_HOME`.
        folder: folder of their runs; None for `schedule-runs` in `$REIR_HOME`.
    """

    file: Path | None = None
    folder: Path | None = None
