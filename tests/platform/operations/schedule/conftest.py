"""Schedules run small programs instead of `reir` commands."""

from __future__ import annotations

import sys

import pytest

from reir.operations.schedule import runs
from reir_testing.operations.scheduled_programs import RUN_PROGRAM


@pytest.fixture(autouse=True)
def commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "_REIR", [sys.executable, "-c", RUN_PROGRAM])
    monkeypatch.setattr(runs, "_POLL_S", 0.02)
