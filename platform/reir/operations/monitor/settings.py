"""Settings of `reir monitor`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from reir.config import StrictConfig


class MonitorSettings(StrictConfig):
    """Settings of `reir monitor`.

    Attributes:
        galleries: names of the galleries to look at; None for all.
        host, port: where to serve the metrics.
        interval_s: time between two runs of a check.
        deep_interval_s: the same for checks that load models and scan vectors.
        search_log: folder of the search log; None for `searches` in `$REIR_HOME`.
        schedules: file of the schedules of this machine; None for `schedules.yaml` in `$REIR_HOME`.
        schedule_runs: folder of their runs; None for `schedule-runs` in `$REIR_HOME`.
    """

    galleries: tuple[str, ...] | None = None
    host: str = "127.0.0.1"
    port: int = Field(9464, ge=0, le=65_535)
    interval_s: float = Field(60.0, gt=0)
    deep_interval_s: float = Field(900.0, gt=0)
    search_log: Path | None = None
    schedules: Path | None = None
    schedule_runs: Path | None = None
