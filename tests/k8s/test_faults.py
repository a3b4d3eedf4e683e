"""Faults of a real system are reported by the generated rules, through a real Alertmanager."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from reir_k8s.monitoring.rules.files import all_alerts, write_rules
from reir_k8s.monitoring.rules.rule import Durations
from reir_testing import data_dir
from reir_testing.alerting.faults import FAULTS
from reir_testing.alerting.rehearsal import run_fault, unexpanded_texts, watched_by_prometheus
from reir_testing.alerting.watched_system import watched_system

SCALE = 1 / 20
SHORT = ("the backup is old", "a schedule fails", "the disk is nearly full")


def test_the_faults_name_alerts_that_exist() -> None:
    induced = [name for fault in FAULTS for name in fault.alerts]
    assert set(induced) <= {alert.name for alert in all_alerts()}
    assert len(induced) == len(set(induced))


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.skipif(
    shutil.which("prometheus-alertmanager") is None or shutil.which("prometheus") is None,
    reason="needs `apt-get install prometheus prometheus-alertmanager`",
)
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a small disk")
@pytest.mark.skipif(data_dir() is None, reason="needs the shared photos (REIR_DATA)")
def test_faults_fire_their_alerts_and_repairs_end_them(tmp_path: Path) -> None:
    with (
        watched_system(
            tmp_path,
            num_photos=20,
            interval_s=60 * SCALE,
            deep_interval_s=900 * SCALE,
            with_server=False,
        ) as system,
        watched_by_prometheus(
            system,
            tmp_path / "prometheus",
            write_rules(tmp_path / "rules", Durations().scaled(SCALE)),
        ) as (_, received),
    ):
        for fault in FAULTS:
            if fault.name in SHORT:
                run = run_fault(fault, system, received)
                assert None not in run.fired_s.values()
                assert None not in run.cleared_s.values()
        assert received.received
        assert unexpanded_texts(received) == []
